"""Throughput through HTTP against offline `LLM.generate`, on the same prompts, in turn (A B A B ...).

    python benchmarks/server/throughput.py tiny
    python benchmarks/server/throughput.py tiny --concurrency 256 --max-num-seqs 256

Server, client and offline engine are a process each on the same cores, so the client's share of them is a part of what
HTTP costs here; it is told. Prompt tokens are sent as ids, answers have a fixed length, and how many tokens a chunk has is
told too. Every text must be that of the offline run.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append
from server.rig import Offline, Work, load, serving

RESULTS = Path(__file__).resolve().parent.parent / "results" / "server.jsonl"


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Flags that the benchmarks of the server share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    return parser


def main() -> int:
    """Measure, compare, print, record."""
    parser = arguments(__doc__)
    parser.add_argument("--stream-interval", type=int, default=1, help="of the server")
    parser.add_argument("--stream-delay", type=float, default=0.05, help="of the server")
    options = parser.parse_args()
    engine = {"max_num_seqs": options.max_num_seqs, "enable_prefix_caching": False}
    sizes = {"num_prompts": options.num_prompts, "prompt": options.prompt, "answer": options.answer}
    tokens = options.num_prompts * options.answer
    offline = Offline(options.model, **engine)
    rows = list[tuple[float, float, float, float, float]]()
    pace = {"stream_interval": options.stream_interval, "stream_delay": options.stream_delay}
    with serving(model=options.model, **pace, **engine) as server:
        for seed in range(options.repeats + 1):
            work = Work(concurrency=options.concurrency, seed=seed, **sizes)
            wall_s, cpu_s, texts = offline.measure(options.model, work)
            result, facts = server.measure(work.load(options.model))
            if [answer.text for answer in result.answers.values()] != texts:
                raise SystemExit("a stream differs from the offline run")
            if any(answer.num_output != options.answer for answer in result.answers.values()):
                raise SystemExit("a stream has lost tokens")
            row = (tokens / wall_s, tokens / result.duration_s, cpu_s, facts["process_s"], result.cpu_s)
            chunks = sum(answer.num_chunks for answer in result.answers.values())
            ratio, served = row[1] / row[0], 1e6 * (row[3] - row[2]) / tokens
            print(
                f"offline {row[0]:8,.0f} tokens/s   HTTP {row[1]:8,.0f}   ratio {ratio:.3f}   server CPU {served:5.1f} us"
                f" more a token   client CPU {1e6 * row[4] / tokens:5.1f}   {tokens / chunks:.1f} tokens a chunk"
                + ("   (warm-up)" if not seed else ""),
                flush=True,
            )
            rows += [row] if seed else []
    ratio = statistics.median(row[1] / row[0] for row in rows)
    print(f"HTTP / offline, median of {len(rows)} pairs: {ratio:.3f}")
    if not options.no_record:
        case = {"model": Path(options.model).name, "concurrency": options.concurrency}
        case |= pace | engine | sizes | load()
        for index, name in enumerate(("offline", "HTTP")):
            values = [row[index] for row in rows]
            append(
                RESULTS, case | {"what": name}, "throughput", "tokens/s", values, ratio_http_to_offline=round(ratio, 3)
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
