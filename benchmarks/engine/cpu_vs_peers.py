"""jaxserve and other engines on the same random Qwen2.5-0.5B-shaped checkpoint on this CPU.

    python benchmarks/engine/cpu_vs_peers.py --envs ~/.cache/jaxserve/peer-envs
    python benchmarks/engine/cpu_vs_peers.py --only jaxserve,llama.cpp --dtype bfloat16 --rows decode_128,prefill_512

Every peer is compared with jaxserve in a session of two processes that answer in turn (A B A B), so a machine that is
busy for a while slows both. The table shows each engine's median and how many times faster jaxserve was in that
session; each result is appended to benchmarks/results/cpu_vs_peers.jsonl. Rows are defined in workload.py, peers in
environments.py. First use installs the peers (pip) and writes the checkpoint: minutes and about 20 GB under --envs and
--cache.
"""

import argparse
import os
import statistics
import sys
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import SHAPES, write_checkpoint
from environments import PEERS, NotAvailableError, ensure
from workers import Worker, ask, peak_rss_bytes, start, stop
from workload import ROWS, UNITS, make_workload

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import record

OURS = "jaxserve"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve"
QUIET_LOAD = 0.5
RESULTS = Path(__file__).resolve().parent.parent / "results" / "cpu_vs_peers.jsonl"


@dataclass(kw_only=True)
class Outcome:
    """What one engine did in one session."""

    engine: str
    reason: str = ""  # why it did not run
    values: dict[str, list[float]] = field(default_factory=dict)  # row -> tokens/s per repeat
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    start_s: float = 0.0
    warm_up_s: float = 0.0
    peak_rss_bytes: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    mode: dict[str, str] = field(default_factory=dict)


def missing(name: str, dtype: str, args: argparse.Namespace) -> str:
    """Why an engine cannot even be started; empty if it can. Installs it if needed."""
    if dtype not in PEERS[name].dtypes:
        return f"has no {dtype} on CPU"
    try:
        ensure(name, args.envs)
    except NotAvailableError as error:
        return str(error)
    return ""


def begin(name: str, dtype: str, args: argparse.Namespace, scratch: Path) -> Worker:
    """A warm worker. Raises NotAvailableError."""
    python = ensure(name, args.envs)
    stored = dtype if dtype == "bfloat16" else "float32"
    checkpoint = write_checkpoint(args.cache / f"{args.shape}-{stored}", SHAPES[args.shape], stored)
    converted = args.cache / f"converted-{zlib.crc32((checkpoint / 'config.json').read_bytes()):08x}"
    workload = make_workload(str(checkpoint), str(converted), dtype, args.threads, args.rows)
    workload["options"] = args.options.get(name, {})
    print(f"starting {name} ({dtype}) ...", file=sys.stderr, flush=True)
    return start(name, python, workload, scratch, args.timeout)


def run_session(names: list[str], dtype: str, args: argparse.Namespace) -> list[Outcome]:
    """Runs one or two engines side by side, asking them in turn; one that fails leaves the other its turn."""
    outcomes = {name: Outcome(engine=name) for name in names}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="cpu_vs_peers.") as scratch:
        for name in names:
            try:
                workers[name] = begin(name, dtype, args, Path(scratch))
            except NotAvailableError as error:
                outcomes[name].reason = str(error)
        try:
            for row in [row for row in args.rows for _ in range(args.repeats)]:
                for name in list(workers):
                    measure(workers, outcomes[name], row)
        finally:
            for name, worker in workers.items():
                outcomes[name].start_s, outcomes[name].warm_up_s = worker.start_s, worker.warm_up_s
                outcomes[name].versions, outcomes[name].mode = worker.versions, worker.mode
                outcomes[name].peak_rss_bytes = peak_rss_bytes(worker)
                stop(worker)
    return list(outcomes.values())


def measure(workers: dict[str, Worker], outcome: Outcome, row: str) -> None:
    """Asks once and notes the answer; a worker that fails is dropped from `workers`."""
    try:
        answer = ask(workers[outcome.engine], row)
    except NotAvailableError as error:
        outcome.reason = f"{row}: {error}"
        stop(workers.pop(outcome.engine))
        return
    outcome.values.setdefault(row, []).append(answer["value"])
    outcome.tokens[row] = answer["tokens"]
    print(f"  {row:13} {outcome.engine:13} {answer['value']:9.2f} tokens/s", file=sys.stderr, flush=True)


def ratio(session: list[Outcome], row: str) -> float | None:
    """How many times faster jaxserve was than the other engine of its session; None without both numbers."""
    ours = [o for o in session if o.engine == OURS and row in o.values]
    theirs = [o for o in session if o.engine != OURS and row in o.values]
    if not ours or not theirs:
        return None
    return statistics.median(ours[0].values[row]) / statistics.median(theirs[0].values[row])


def same_tokens(session: list[Outcome], row: str) -> float | None:
    """Share of generated tokens before the first difference from jaxserve, mean over prompts."""
    both = [o.tokens[row] for o in session if row in o.tokens]
    if len(both) < 2:
        return None
    shares = []
    for a, b in zip(*both, strict=True):
        equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        shares.append(equal / len(a))
    return statistics.mean(shares)


def store(session: list[Outcome], dtype: str, args: argparse.Namespace) -> None:
    """Appends all numbers of a session to the results file."""
    for outcome in session:
        against = [other.engine for other in session if other is not outcome]
        case = {
            "benchmark": "cpu_vs_peers",
            "engine": outcome.engine,
            "shape": args.shape,
            "dtype": dtype,
            "threads": args.threads,
        }
        more: dict[str, Any] = {"beside": against, "versions": outcome.versions, "mode": outcome.mode}
        more["load_average"] = round(os.getloadavg()[0], 1)
        for row, values in outcome.values.items():
            unit = UNITS["batch" if row.startswith("mixed") else row.split("_")[0]]
            numbers: dict[str, Any] = {}
            if outcome.engine != OURS and (found := ratio(session, row)):
                numbers = {"jaxserve_times_faster": round(found, 3), "same_tokens": same_tokens(session, row)}
            record.append(args.results, case | {"row": row}, "throughput", unit, values, **numbers, **more)
        if outcome.values:
            record.append(args.results, case, "start", "s", [outcome.start_s], **more)
            record.append(args.results, case, "warm_up", "s", [outcome.warm_up_s], **more)
        if outcome.peak_rss_bytes:
            record.append(args.results, case, "peak_rss", "GiB", [outcome.peak_rss_bytes / 2**30], **more)


def table(sessions: list[list[Outcome]], dtype: str, rows: list[str]) -> str:
    """Markdown: one line per engine, medians in tokens/s, in brackets how many times faster jaxserve was."""
    lines = [f"\n{dtype}: tokens/s, median (in brackets: jaxserve / this engine)\n"]
    lines.append("| engine | " + " | ".join([*rows, "start s", "warm-up s", "peak RSS GiB", "same tokens"]) + " |")
    lines.append("|---" + "|--:" * (len(rows) + 4) + "|")
    shown = []
    for session in sessions:
        for outcome in session:
            if outcome.engine == OURS and OURS in shown:
                continue  # its numbers of other sessions are in the ratios
            shown.append(outcome.engine)
            if not outcome.values:
                lines.append(f"| {outcome.engine} | not available: {outcome.reason} |" + " |" * (len(rows) + 3))
                continue
            cells = []
            for row in rows:
                times = ratio(session, row) if outcome.engine != OURS else None
                text = f"{statistics.median(outcome.values[row]):.1f}" if row in outcome.values else "-"
                cells.append(text + (f" ({times:.2f}x)" if times else ""))
            shares = [same_tokens(session, row) for row in rows if outcome.engine != OURS]
            known = [share for share in shares if share is not None]
            rss = f"{outcome.peak_rss_bytes / 2**30:.1f}" if outcome.peak_rss_bytes else "-"
            cells += [f"{outcome.start_s:.1f}", f"{outcome.warm_up_s:.1f}", rss]
            cells.append(f"{statistics.mean(known):.0%}" if known else "-")
            lines.append(f"| {outcome.engine} | " + " | ".join(cells) + " |")
            if outcome.reason:
                lines.append(f"| | stopped at {outcome.reason} |" + " |" * (len(rows) + 3))
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--only", type=words, default=list(PEERS), help=f"engines, of {','.join(PEERS)}")
    parser.add_argument("--dtype", type=words, default=["float32", "bfloat16"], help="float32, bfloat16, q8_0")
    parser.add_argument("--shape", choices=SHAPES, default="qwen25-05b", help="toy: tries the benchmark, not engines")
    parser.add_argument("--rows", type=words, default=list(ROWS), help=f"rows, of {','.join(ROWS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that each engine may use")
    parser.add_argument("--envs", type=Path, default=CACHE / "peer-envs", help="where peers' environments are made")
    parser.add_argument("--cache", type=Path, default=CACHE / "benchmarks", help="checkpoints and converted models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one answer of an engine")
    parser.add_argument("--option", action="append", default=[], metavar="ENGINE.KEY=VALUE", help="see peers/*.py")
    args = parser.parse_args(argv)
    for chosen, known in ((args.only, PEERS), (args.rows, ROWS)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    args.options = {}
    for text in args.option:
        name, _, rest = text.rpartition("=")[0].rpartition(".")
        args.options.setdefault(name, {})[rest] = text.rpartition("=")[2]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if (load := os.getloadavg()[0]) > QUIET_LOAD:
        print(f"warning: load average {load:.1f}; engines suffer unequally from other processes", file=sys.stderr)
    peers = [name for name in args.only if name != OURS]
    for dtype in args.dtype:
        ours = [OURS] if OURS in args.only and dtype in PEERS[OURS].dtypes else []
        sessions = []
        reasons = {peer: missing(peer, dtype, args) for peer in peers}
        usable = [peer for peer in peers if not reasons[peer]]
        for names in [[*ours, peer] for peer in usable] or [ours]:
            sessions.append(run_session(names, dtype, args))
            if not args.no_record:
                store(sessions[-1], dtype, args)
        sessions += [[Outcome(engine=peer, reason=reason)] for peer, reason in reasons.items() if reason]
        print(table(sessions, dtype, args.rows), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
