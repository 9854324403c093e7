#!/usr/bin/env python3
"""Does the simulator say what the engine does? The same requests through both, under several policies.

    python scripts/agreement.py tiny
    python scripts/agreement.py tiny --requests 200 --load 2 --policies fcfs,priority,sarathi

The cost model is fitted to other steps (the scenes of calibrate.py), half of them before the requests run and half of them
after, so that both have seen the same machine. Requests arrive at random, at `--load` of the rate at which the simulator can
serve them: well above 1, so that policies differ, and a few per cent of speed do not decide whether there is a queue at all.
The engine runs each policy `--repeats` times, in turns; medians are compared. Wanted: throughput and median time to the
first token within 15 %, and the policies in the same order. Besides, the simulator is given the instants at which the real
steps ended: then it must make the very plans of the engine.
"""

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]  # this checkout, whatever is installed

import calibrate  # noqa: E402

from jaxserve.build import Built, build  # noqa: E402
from jaxserve.cli.options import add_engine_flags, engine_options  # noqa: E402
from jaxserve.config import EngineConfig  # noqa: E402
from jaxserve.cost.model import CostModel  # noqa: E402
from jaxserve.engine import Engine  # noqa: E402
from jaxserve.errors import JaxserveError  # noqa: E402
from jaxserve.kv.store import KVStore  # noqa: E402
from jaxserve.scheduler.core import Scheduler  # noqa: E402
from jaxserve.scheduler.make import make_policy  # noqa: E402
from jaxserve.scheduler.policy import Policy  # noqa: E402
from jaxserve.sim.live import LatchedClock, LiveReplica, RepeatedReplica  # noqa: E402
from jaxserve.sim.replica import Replica, ReplicaSpec  # noqa: E402
from jaxserve.sim.report import report  # noqa: E402
from jaxserve.sim.run import run_on  # noqa: E402
from jaxserve.workload.call import Call, Span, Workload, make_workload  # noqa: E402
from jaxserve.workload.lengths import Lognormal, arrivals  # noqa: E402

SHOWN = ("requests_per_s", "output_tokens_per_s", "ttft_s", "tpot_s", "latency_s")


def workload(count: int, rate: float, built: Built, seed: int) -> Workload:
    """Prompts and answers of all lengths, three priorities; of five clients one asks most, for few long programs."""
    rng, longest = random.Random(seed), built.max_model_len
    prompt, answer = Lognormal(longest // 12, 0.9, most=longest // 2), Lognormal(longest // 40, 0.7, most=longest // 4)

    def asker() -> str:
        return "heavy" if rng.random() < 0.6 else f"light {rng.randrange(4)}"

    calls = [
        Call(
            call_id=str(index),
            client=(client := asker()),
            program=f"{client} {rng.randrange(3 if client == 'heavy' else 8)}",
            prompt=tuple(Span(rng.randrange(1, built.model.vocab_size), 1) for _ in range(prompt.draw(rng))),
            output_tokens=answer.draw(rng),
            arrival_s=arrival_s,
            priority=rng.randrange(3),
        )
        for index, arrival_s in enumerate(arrivals(rng, count, rate, 1.0))
    ]
    return make_workload("mixed", calls)


class Clock(LatchedClock):
    """Of the seconds that calibrate.py counts. If these are of CPU time, they do not pass in sleep: it is put off."""

    def __init__(self) -> None:
        super().__init__()
        self._slept_s = 0.0
        self._begin_s = calibrate.clock()

    def latch(self) -> float:
        self._now_s = calibrate.clock() - self._begin_s + self._slept_s
        self.instants.append(self._now_s)
        return self._now_s

    def wait(self, until_s: float) -> None:
        left_s = max(until_s - self.latch(), 0.0)
        if calibrate.clock is time.process_time:
            self._slept_s += left_s
        else:
            time.sleep(left_s)
        self.latch()


def spec_of(built: Built, config: EngineConfig, cost: CostModel) -> ReplicaSpec:
    """The replica that the engine is."""
    capacity = built.executor.capacity()
    return ReplicaSpec(
        cost=cost,
        num_blocks=capacity.num_blocks,
        block_size=capacity.block_size,
        max_num_seqs=capacity.num_slots,
        token_budget=built.facts["max_num_batched_tokens"],
        max_model_len=built.max_model_len,
        caching=config.enable_prefix_caching,
        overlap=config.async_scheduling,
    )


def policy_of(name: str, built: Built, cost: CostModel) -> Policy:
    return make_policy(name, cost=cost, rungs=built.executor.capacity().token_rungs)


def real(name: str, built: Built, spec: ReplicaSpec, calls: Workload) -> tuple[dict[str, Any], bool]:
    """Through a real engine of its own, over the executor that there is; and whether its plans can be repeated."""
    policy = policy_of(name, built, spec.cost)
    clock, capacity = Clock(), built.executor.capacity()
    store = KVStore(capacity.num_blocks, capacity.block_size, caching=spec.caching)
    engine = Engine(
        Scheduler([store], policy, capacity, token_budget=spec.token_budget),
        built.executor,
        built.tokenizer,
        clock=clock,
        vocab_size=built.model.vocab_size,
        max_model_len=built.max_model_len,
        overlap=spec.overlap,
    )
    is_so = report(run_on([LiveReplica(0, spec, engine, built.executor, clock)], calls, knows_lengths=True))
    replica = RepeatedReplica(0, spec, policy_of(name, built, spec.cost), clock.instants)
    again = report(run_on([replica], calls, knows_lengths=True))
    return is_so, again["schedule_digest"] == is_so["schedule_digest"]


def median(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure that is shown."""

    def middle(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: middle([value[key] for value in values]) for key in values[0]}
        return statistics.median(values)

    return {figure: middle([each[figure] for each in reports]) for figure in SHOWN}


def simulated(policy: Policy, spec: ReplicaSpec, calls: Workload) -> dict[str, Any]:
    return report(run_on([Replica(0, spec, policy)], calls, knows_lengths=True))


def main(argv: list[str] | None = None) -> int:
    """Fit, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--load", type=float, default=6.0, metavar="X", help="of what the simulator can serve")
    parser.add_argument("--policies", default="fcfs,plas,priority", metavar="NAMES")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of the real runs (default: 3)")
    parser.add_argument("--scenes", type=int, default=36, metavar="N", help="fitted to, all of them (default: 36)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="all figures as JSON")
    parser.add_argument("--cpu-time", action="store_true", help=calibrate.CPU_TIME)
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    if args.cpu_time:
        calibrate.count_cpu_time()
    try:
        config = EngineConfig(**engine_options(args))
        built = build(args.model, config)
    except JaxserveError as error:
        print(f"agreement.py: {error}", file=sys.stderr)
        return 2
    made = calibrate.scenes(args.scenes, config.seed, built)
    notes: Any = [{} for _ in made]
    half = calibrate.TURNS // 2 + 1

    def fitted() -> CostModel:
        samples = itertools.chain(*calibrate.samples_of(notes))
        return calibrate.fitted_model(list(samples), args.model, built)

    calibrate.play(calibrate.Scene(2, 32, 16), built, config, True, 0)  # what only a first time costs
    calibrate.observe(notes, made, built, config, range(half))
    names, rough = args.policies.split(","), spec_of(built, config, fitted())
    most = simulated(policy_of("fcfs", built, rough.cost), rough, workload(args.requests, 1e6, built, config.seed))[
        "requests_per_s"
    ]
    calls = workload(args.requests, args.load * most, built, config.seed)
    print(f"{args.requests} requests at {args.load * most:.2f} a second, {args.load:.0%} of what can be served")
    real(names[0], built, rough, calls)  # what only a first time costs
    turns = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(args.repeats)]
    runs = [{name: real(name, built, rough, calls) for name in turn} for turn in turns]
    calibrate.observe(notes, made, built, config, range(half, 2 * half))
    spec = dataclasses.replace(rough, cost=fitted())
    # Policies that ask a cost model ask the same one in both, or they would not decide alike.
    told = {name: simulated(policy_of(name, built, rough.cost), spec, calls) for name in names}
    pairs = {name: (runs[0][name][0] | median([run[name][0] for run in runs]), told[name]) for name in names}
    repeated = [is_same for run in runs for _, is_same in run.values()]
    print("\n".join(lines(pairs)))
    print(f"runs whose plans the simulator repeats, given their instants: {sum(repeated)} of {len(repeated)}")
    if args.output:
        args.output.write_text(json.dumps(pairs, indent=2) + "\n")
    return 0


def lines(pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> Sequence[str]:
    """A table, and the order of policies by both."""
    made = [f"{'':<10}{'':<22}{'real':>10}{'simulated':>11}{'ratio':>7}"]
    for name, (is_so, told) in pairs.items():
        for figure in SHOWN:
            for key in ("p50", "p90") if isinstance(is_so[figure], dict) else ("",):
                a, b = (each[figure][key] if key else each[figure] for each in (is_so, told))
                made.append(f"{name:<10}{figure + ' ' + key:<22}{a:>10.4g}{b:>11.4g}{b / a:>7.2f}")
    for figure in ("ttft_s", "latency_s"):
        orders = [sorted(pairs, key=lambda name: pairs[name][index][figure]["p50"]) for index in (0, 1)]
        made.append(f"by {figure} p50: real {' < '.join(orders[0])}; simulated {' < '.join(orders[1])}")
    return made


if __name__ == "__main__":
    sys.exit(main())
