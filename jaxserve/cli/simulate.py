"""Replay a workload on replicas that are not there: the scheduler and the KV store of the engine, on a virtual clock.

Steps take as long as a cost model says: from data sheets (--chip), or fitted to measured steps (--cost-model). The
workload is a trace (Azure, Mooncake, or JSON lines of ours) or generated. Several policies are compared; several rates
make a curve; --sweep finds the highest rate that keeps the SLO.

examples:
  jaxserve simulate --model llama-3.1-8b --chip h100 --trace azure_conv.csv --max-num-seqs 256
  jaxserve simulate --model llama-3.1-8b --chip v5e --devices 8 --replicas 2 --workload chains --rate 2 \\
      --policy fcfs --policy plas
  jaxserve simulate --model llama-3.1-8b --chip h100 --workload tenants --policy vtc --policy 'dlpm:{"quantum": 5000}'
  jaxserve simulate --model llama-3.1-8b --chip v5e --chip v6e --devices 4 --workload sharegpt --sweep \\
      --slo-ttft 1 --slo-tpot 0.05 --price v5e=1.2 --price v6e=2.7 --plot rates.png
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxserve.cli.cases import Case, make_cases
from jaxserve.cli.flags import add_dataclass_flags, json_object
from jaxserve.cli.options import ROOM_OPTIONS
from jaxserve.cli.replicas import HERE
from jaxserve.cluster.router import ROUTERS
from jaxserve.config import SCHEDULING_POLICIES, EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.chips import CHIPS
from jaxserve.sim.chrome import save_chrome_trace
from jaxserve.sim.plot import check_matplotlib, plot
from jaxserve.sim.report import Slo, report
from jaxserve.sim.run import Run, simulate
from jaxserve.sim.sweep import Capacity, Trial, highest_rate
from jaxserve.sim.table import table
from jaxserve.workload.call import Workload
from jaxserve.workload.generate import WORKLOADS, generate
from jaxserve.workload.trace import read_trace, save_trace

USAGE = "jaxserve simulate --model MODEL --chip CHIP (--trace FILE | --workload NAME) [options]"
OPTIONS = (
    *ROOM_OPTIONS,
    "enable_prefix_caching",
    "async_scheduling",
    "swap_space",
    "preemption_mode",
    "max_num_seqs_per_client",
    "tensor_parallel_size",
    "sequence_parallel_size",
    "expert_parallel_size",
)
EXIT_INTERRUPTED = 130
BURST = 0.05  # of the time that a run takes: what arrives within it comes at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="published shape, bundled name, folder, hub id")
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--chip", action="append", metavar="CHIP", help=f"{', '.join(CHIPS)}; or {HERE}: this machine; may be repeated"
    )
    group.add_argument("--devices", type=int, default=1, metavar="N", help="in all replicas (default: 1)")
    group.add_argument(
        "--replicas",
        type=int,
        action="append",
        metavar="N",
        help="that share the devices (default: 1); may be repeated",
    )
    group.add_argument(
        "--cost-model",
        dest="cost_file",
        metavar="FILE",
        help="step times fitted by scripts/calibrate.py, instead of the chip's data sheet",
    )
    group.add_argument(
        "--price", action="append", default=[], metavar="CHIP=AMOUNT", help="of a device for an hour; may be repeated"
    )
    group.add_argument("--compiles", action="store_true", help="steps are compiled while it serves, not before")
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="Azure's CSV, Mooncake's JSON lines, or JSON lines of ours"
    )
    group.add_argument("--workload", metavar="NAME", help=f"generated: {', '.join(WORKLOADS)}")
    group.add_argument(
        "--workload-options", type=json_object((str, Any)), default={}, metavar="JSON", help='such as {"cv": 2}'
    )
    group.add_argument(
        "--programs", type=int, metavar="N", help="how many, or the first so many of a trace (default: 200, all)"
    )
    group.add_argument(
        "--rate",
        type=float,
        action="append",
        metavar="X",
        help="programs per second (default: 1, or the trace's own); may be repeated",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of a generated workload (default: 0)")
    group.add_argument("--knows-lengths", action="store_true", help="the scheduler is told how long answers will be")
    group.add_argument("--save-trace", type=Path, metavar="FILE", help="write the workload as JSON lines")
    group = parser.add_argument_group("scheduling")
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME[:JSON]",
        help=f"{', '.join(SCHEDULING_POLICIES)}; may be repeated (default: fcfs)",
    )
    group.add_argument(
        "--router",
        action="append",
        metavar="NAME[:JSON]",
        help=f"which of several replicas takes a call: {', '.join(ROUTERS)}; may be repeated (default: least_loaded)",
    )
    group.add_argument(
        "--snapshot-age",
        type=float,
        default=0.0,
        metavar="X",
        help="seconds between two looks of the router (default: 0)",
    )
    group = parser.add_argument_group("what is asked")
    group.add_argument("--slo-ttft", type=float, metavar="X", help="seconds to the first token")
    group.add_argument("--slo-tpot", type=float, metavar="X", help="seconds per token after the first, mean of a call")
    group.add_argument("--slo-tbt", type=float, metavar="X", help="seconds between any two tokens of a call")
    group.add_argument(
        "--slo-share", type=float, default=0.9, metavar="X", help="--sweep: calls that keep the SLO (default: 0.9)"
    )
    group.add_argument("--sweep", action="store_true", help="find the highest rate that keeps the SLO")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of a table")
    group.add_argument("--chrome-trace", type=Path, metavar="FILE", help="of the first case, for ui.perfetto.dev")
    group.add_argument("--plot", type=Path, metavar="FILE", help="picture of latency against rate")
    add_dataclass_flags(parser, EngineConfig, "engine options", only=OPTIONS)


def run(args: argparse.Namespace) -> int:
    _check(args)
    slo = _slo(args)
    if args.plot:
        check_matplotlib()
    workload = _workload(args)
    if args.save_trace:
        save_trace(workload, args.save_trace)
    cases = make_cases(args)
    if args.sweep:
        assert slo is not None
        return _sweep(args, workload, cases, slo)
    reports, is_partial = dict[str, dict[str, Any]](), False
    rates = args.rate if args.rate and len(args.rate) > 1 else [None]
    for case in cases:
        for rate in rates:
            name = case.name if rate is None else f"{case.name} at {rate:g}/s"
            done = _simulate(args, case, workload if rate is None else workload.at_rate(rate), name)
            if args.chrome_trace and not reports:
                left_out = save_chrome_trace(done, args.chrome_trace, name)
                if left_out:
                    print(f"{args.chrome_trace} ends early: {left_out:,} steps are too many for it", file=sys.stderr)
            reports[name] = {"case": case.name, "policy": case.policy, "router": case.router, "rate": rate} | report(
                done, slo
            )
            is_partial = done.is_partial
            if is_partial:
                break
        if is_partial:
            break
    if args.plot and len(rates) > 1:
        _plot(args, list(reports.values()), slo)
    print(json.dumps(reports) if args.json else _text(args, workload, cases, reports))
    if is_partial:
        print("jaxserve: interrupted; this is what there was so far", file=sys.stderr)
    return EXIT_INTERRUPTED if is_partial else 0


def _check(args: argparse.Namespace) -> None:
    """Mistakes that can be told before anything is read."""
    if (args.trace is None) == (args.workload is None):
        raise ConfigError("give either --trace FILE or --workload NAME")
    counts = [
        ("--devices", args.devices),
        ("--programs", args.programs),
        *(("--replicas", n) for n in args.replicas or ()),
    ]
    for flag, value in counts:
        if value is not None and not 1 <= value <= 1 << 20:
            raise ConfigError(f"{flag} {value} must be a positive whole number")
    limits = [("--slo-ttft", args.slo_ttft), ("--slo-tpot", args.slo_tpot), ("--slo-tbt", args.slo_tbt)]
    for flag, value in [*limits, *(("--rate", rate) for rate in args.rate or ())]:
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{flag} {value:g} must be a positive number")
    if not 0 <= args.snapshot_age < 1e9:
        raise ConfigError(f"--snapshot-age {args.snapshot_age:g} must be 0 or a positive number of seconds")
    if (args.router or args.snapshot_age) and max(args.replicas or [1]) == 1:
        raise ConfigError("a router chooses among replicas, and there is one", remedy="Raise --replicas")
    if not 0 < args.slo_share <= 1:
        raise ConfigError(f"--slo-share {args.slo_share:g} must lie between 0 and 1")
    if args.sweep and all(value is None for _, value in limits):
        raise ConfigError("--sweep needs an SLO", remedy="Give --slo-ttft, --slo-tpot or --slo-tbt")
    if args.plot and not args.sweep and len(args.rate or ()) < 2:
        raise ConfigError("--plot draws latency against rate", remedy="Give --rate several times, or --sweep")
    if args.workload_options and not args.workload:
        raise ConfigError("--workload-options are those of a generated workload", remedy="Give --workload NAME")
    if not args.chip and not args.cost_file:
        raise ConfigError("give a --chip, or --cost-model FILE for this machine")


def _slo(args: argparse.Namespace) -> Slo | None:
    slo = Slo(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot, tbt_s=args.slo_tbt)
    return None if slo == Slo() else slo


def _workload(args: argparse.Namespace) -> Workload:
    rate = args.rate[0] if args.rate else None
    if args.workload:
        count = args.programs or 200
        return generate(args.workload, count=count, rate=rate, seed=args.seed, options=args.workload_options)
    workload = read_trace(args.trace)
    workload = workload.first(args.programs) if args.programs else workload
    return workload.at_rate(rate) if rate else workload


def _simulate(args: argparse.Namespace, case: Case, workload: Workload, name: str) -> Run:
    """One run, with a bar where somebody looks."""
    with contextlib.closing(
        tqdm(total=len(workload.calls), desc=name, unit="call", disable=not sys.stderr.isatty(), leave=False)
    ) as bar:

        def watch(ended: int, now_s: float) -> None:
            bar.set_postfix_str(f"{now_s:,.0f} s simulated", refresh=False)
            bar.update(ended)

        return simulate(
            workload,
            case.specs,
            case.policy,
            case.options,
            router=case.router,
            router_options=case.router_options,
            snapshot_s=args.snapshot_age,
            knows_lengths=args.knows_lengths,
            watch=watch,
        )


def _sweep(args: argparse.Namespace, workload: Workload, cases: list[Case], slo: Slo) -> int:
    """For each case the highest rate; then which of them costs the least for a call."""
    found, reports = dict[str, Capacity](), list[dict[str, Any]]()
    try:
        for case in cases:

            def run_at(rate: float, case: Case = case) -> Trial:
                faster = workload.at_rate(rate)
                done = _simulate(args, case, faster, f"{case.name} at {rate:.3g}/s")
                if done.is_partial:
                    raise KeyboardInterrupt
                facts = {"case": case.name, "policy": case.policy, "router": case.router, "rate": rate} | report(
                    done, slo
                )
                reports.append(facts)
                is_burst = max(call.arrival_s for call in faster.calls) < BURST * done.end_s
                return Trial(rate, facts["slo"]["share"], is_burst)

            found[case.name] = highest_rate(run_at, args.slo_share, args.rate[0] if args.rate else 1.0)
    except KeyboardInterrupt:
        print("jaxserve: interrupted; this is what there was so far", file=sys.stderr)
    if args.plot and reports:
        _plot(args, reports, slo)
    best = _cheapest(cases, found)
    if args.json:
        print(json.dumps({name: capacity._asdict() for name, capacity in found.items()} | {"cheapest": best}))
    else:
        print("\n".join(_sweep_lines(args, cases, found, best)))
    return 0 if len(found) == len(cases) else EXIT_INTERRUPTED


def _cheapest(cases: Sequence[Case], found: Mapping[str, Capacity]) -> str | None:
    priced = {
        c.name: c.price_per_h / found[c.name].rate
        for c in cases
        if c.price_per_h is not None and c.name in found and found[c.name].rate
    }
    return min(priced, key=lambda name: priced[name]) if priced else None


def _sweep_lines(
    args: argparse.Namespace, cases: Sequence[Case], found: Mapping[str, Capacity], best: str | None
) -> Iterator[str]:
    width = max(len(case.name) for case in cases)
    yield f"highest rate at which {args.slo_share:.0%} of calls keep the SLO"
    for case in cases:
        capacity = found.get(case.name)
        if capacity is None:
            continue
        text = f"{capacity.rate:8.3g} programs/s" if capacity.rate else "none: not met at any rate"
        if capacity.rate and not capacity.is_bound:
            text += " or more (the workload is too short to tell)"
        if case.price_per_h is not None and capacity.rate:
            text += f"   {case.price_per_h / capacity.rate / 3.6:.3g} for 1,000 programs"
        yield f"  {case.name:<{width}}  {text}"
    if best and len(cases) > 1:
        yield f"cheapest: {best}"


def _plot(args: argparse.Namespace, reports: Sequence[Mapping[str, Any]], slo: Slo | None) -> None:
    curves = dict[str, list[Mapping[str, Any]]]()
    for each in reports:
        curves.setdefault(each["case"], []).append(each)
    chips = " or ".join(args.chip or [HERE])
    plot(curves, args.plot, title=f"{args.model} on {args.devices} x {chips}, {reports[0]['workload']}", slo=slo)


def _text(
    args: argparse.Namespace, workload: Workload, cases: Sequence[Case], reports: Mapping[str, Mapping[str, Any]]
) -> str:
    spec = cases[0].specs[0]
    pool = f"{spec.num_blocks:,} blocks of {spec.block_size} tokens, {spec.max_num_seqs} sequences at once"
    head = (
        f"{args.model} on {len(cases[0].specs)} x {spec.engine_type}: {pool}"
        if len({c.specs[0].engine_type for c in cases}) == 1
        else args.model
    )
    refusals = [facts["first_refusal"] for facts in reports.values() if facts["first_refusal"]]
    tail = f"\n\nrefused, for example {refusals[0]}" if refusals else ""
    return f"{head}\n{workload.name}: {len(workload.calls):,} calls\n\n{table(reports)}{tail}"
