"""CPU of the server for each streamed token, and where it goes.

    python benchmarks/server/overhead.py tiny
    python benchmarks/server/overhead.py tiny --profile

Counted: the CPU time of the event loop's thread (all of it is the server's), and what the whole process takes more than
`LLM.generate` does for the same work in turn. `--profile` runs the event loop's thread under Python's profiler, which makes
small functions look dearer than they are: for shares, not for microseconds. Wanted: below 50 microseconds.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append
from server.rig import Offline, Work, load, serving
from server.throughput import RESULTS, arguments


def main() -> int:
    """Measure, print, record."""
    parser = arguments(__doc__)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    engine = {"max_num_seqs": options.max_num_seqs, "enable_prefix_caching": False}
    sizes = {"num_prompts": options.num_prompts, "prompt": options.prompt, "answer": options.answer}
    tokens = options.num_prompts * options.answer
    offline = Offline(options.model, **engine) if not options.profile else None
    found: dict[str, list[float]] = {
        name: [] for name in ("event loop", "engine thread", "process", "process, offline")
    }
    with serving(model=options.model, **engine) as server:
        for seed in range(options.repeats + 1):
            work = Work(concurrency=options.concurrency, seed=seed, **sizes)
            if options.profile and seed == 1:
                server.tell("profile")
            result, facts = server.measure(work.load(options.model))
            offline_s = offline.measure(options.model, work)[1] if offline else 0.0
            spent = (facts["loop_s"], facts["engine_s"], facts["process_s"], offline_s)
            chunks = sum(answer.num_chunks for answer in result.answers.values())
            row = dict(zip(found, (1e6 * each / tokens for each in spent), strict=True))
            told = ", ".join(f"{name} {value:.1f}" for name, value in row.items())
            print(
                f"us a token: {told}; {tokens / chunks:.2f} tokens a chunk" + ("" if seed else " (warm-up)"), flush=True
            )
            for name, value in row.items() if seed else ():
                found[name].append(value)
        if options.profile:
            print(server.tell("report"))
            return 0
    more = [a - b for a, b in zip(found["process"], found["process, offline"], strict=True)]
    for name, values in {**found, "process more than offline": more}.items():
        print(f"{name:<28}{statistics.median(values):8.1f} us a token")
        if not options.no_record:
            case = {"model": Path(options.model).name, "concurrency": options.concurrency} | engine | sizes | load()
            append(RESULTS, case | {"what": name}, "CPU time per streamed token", "us", values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
