"""How late the event loop is under load: a timer every 2 ms, and by how much it misses.

    python benchmarks/server/loop.py tiny

Wanted: never more than 20 ms. For the worst ones it says what the thread did meanwhile: ran itself (`on CPU`), waited for a
core because other processes had them (`for a core`), or waited for something else, which is Python's lock that the engine's
thread held (the rest). Garbage collections stop everything; the longest is told.
On a machine that others use, only `longest on CPU` is the server's own: the most that the thread did without looking at
the timer.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append
from server.rig import Work, load, serving
from server.throughput import RESULTS, arguments


def main() -> int:
    """Measure, print, record."""
    options = arguments(__doc__).parse_args()
    engine = {"max_num_seqs": options.max_num_seqs, "enable_prefix_caching": False}
    sizes = {"num_prompts": options.num_prompts, "prompt": options.prompt, "answer": options.answer}
    found: dict[str, list[float]] = {"p50": [], "p99": [], "max": [], "longest on CPU": []}
    with serving(model=options.model, **engine) as server:
        for seed in range(options.repeats + 1):
            if seed == 1:
                server.tell("watch")
            work = Work(concurrency=options.concurrency, seed=seed, **sizes)
            _, facts = server.measure(work.load(options.model))
            if not seed:
                continue
            own = facts["on_cpu_max_s"]
            row = (facts["late_p50_s"], facts["late_p99_s"], facts["late_max_s"], own)
            for name, value in zip(found, row, strict=True):
                found[name].append(1e3 * value)
            print(f"late: p50 {1e3 * row[0]:.2f} ms, p99 {1e3 * row[1]:.2f}, max {1e3 * row[2]:.1f};")
            collected = f"longest garbage collection {1e3 * facts['gc_max_s']:.1f} ms"
            print(f"  most CPU between two turns of the timer {1e3 * own:.1f} ms; {collected}; the worst:")
            for each in facts["worst"]:
                rest = each["late_s"] - each["on_cpu_s"] - each["for_cpu_s"]
                print(
                    f"  {1e3 * each['late_s']:.1f} ms: on CPU {1e3 * each['on_cpu_s']:.1f},"
                    f" for a core {1e3 * each['for_cpu_s']:.1f}, the rest {1e3 * rest:.1f}",
                    flush=True,
                )
    for name, values in found.items():
        print(f"{name:<32}{statistics.median(values):8.2f} ms")
        if not options.no_record:
            case = {"model": Path(options.model).name, "concurrency": options.concurrency} | engine | sizes | load()
            append(RESULTS, case | {"what": f"event loop late, {name}"}, "lateness", "ms", values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
