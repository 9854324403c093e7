#!/usr/bin/env python3
"""Fit a cost model to this machine: real steps through the real engine, timed, and least squares.

    python scripts/calibrate.py tiny -o tiny.json
    python scripts/calibrate.py FOLDER --dtype bfloat16 --max-num-seqs 64 -o model.json --scenes 60

Steps come in scenes: some requests decode at about the same context, then another one brings its prompt. Each scene runs
several times, with steps one after the other (what does the device take, what the host?) and overlapping (how long is it
from result to result?), in turn. Every other scene is not fitted to but told by the fit, and the errors are printed. The
file is what the engine option `cost_model` and `jaxserve simulate --cost-model` take. Prompts are random, answers greedy;
whatever else the machine does is part of what is measured.
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from jaxserve.build import Built, build  # noqa: E402
from jaxserve.cli.options import add_engine_flags, engine_options  # noqa: E402
from jaxserve.clock import WallClock  # noqa: E402
from jaxserve.config import EngineConfig  # noqa: E402
from jaxserve.cost import files  # noqa: E402
from jaxserve.cost.fit import Sample, errors, fit  # noqa: E402
from jaxserve.cost.here import of_device  # noqa: E402
from jaxserve.cost.model import CostModel  # noqa: E402
from jaxserve.cost.work import Work, work_of  # noqa: E402
from jaxserve.engine import Engine  # noqa: E402
from jaxserve.errors import JaxserveError  # noqa: E402
from jaxserve.kv.store import KVStore  # noqa: E402
from jaxserve.request import Request, SamplingParams  # noqa: E402
from jaxserve.scheduler.core import Scheduler  # noqa: E402
from jaxserve.scheduler.policy import Policy  # noqa: E402
from jaxserve.step import StepPlan, StepResult  # noqa: E402

clock = time.perf_counter  # or that of CPU time
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
DECODES = 8  # steps of each scene in which all of its requests decode
TURNS = 5  # of each scene, alone and overlapping
CPU_TIME = (
    "on a CPU that others use, too: count seconds of this process' CPU time, and let it compute in one thread; what is "
    "found holds for a machine with one core, on which nothing overlaps"
)
LEAST = 3  # times that a kind of step must have been seen


class Scene(NamedTuple):
    """`num_rows` requests with prompts of about `context` tokens decode; then a prompt of `chunk` tokens comes."""

    num_rows: int
    context: int
    chunk: int


class Times(NamedTuple):
    """Of one step, by the wall clock."""

    work: Work
    dispatch_s: float
    dispatched_s: float
    collected_s: float


class Notes(NamedTuple):
    """Seconds of one kind of step, see `cost.fit.Sample`."""

    works: list[Work]
    devices: list[float]
    hosts: list[float]
    periods: list[float]

    def is_enough(self) -> bool:
        return min(len(self.devices), len(self.periods)) >= LEAST

    def sample(self) -> Sample:
        """Means: what one step seems to take too long, because its result is seen late, the next takes too short."""
        middle = sorted(self.works, key=lambda work: work.decode_kv)[len(self.works) // 2]
        return Sample(middle, *map(trimmed_mean, (self.devices, self.hosts, self.periods)))


def trimmed_mean(seconds: Sequence[float]) -> float:
    """Without a tenth of them at either end."""
    end = len(seconds) // 10
    return statistics.mean(sorted(seconds)[end : len(seconds) - end])


class Watch:
    """An executor that notes when the engine calls another one, and what for."""

    def __init__(self, executor: Any):
        self.times: list[Times] = []
        self._executor = executor
        self._num_slots = executor.capacity().num_slots

    def capacity(self) -> Any:
        return self._executor.capacity()

    def dispatch(self, plan: StepPlan) -> Any:
        begin_s = clock()
        pending = self._executor.dispatch(plan)
        return plan, pending, begin_s, clock()

    def collect(self, pending: Any) -> StepResult:
        plan, inner, begin_s, dispatched_s = pending
        result = self._executor.collect(inner)
        collected_s = clock()
        rung = plan.num_tokens + result.padded_tokens
        work = work_of(plan.rows, rung, min(rung, self._num_slots))
        self.times.append(Times(work, begin_s, dispatched_s, collected_s))
        return result


def count_cpu_time() -> None:
    """From now on a second is one of CPU time. Call it before JAX has made its devices."""
    global clock
    clock = time.process_time
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"


def scenes(count: int, seed: int, built: Built) -> list[Scene]:
    """Batches and contexts of all sizes that fit, small ones more often; prompts for each compiled step size as often."""
    rng, capacity = random.Random(seed), built.executor.capacity()
    longest = built.max_model_len - 2 * DECODES - 16
    made = []
    for _ in range(count):
        rows = round(_between(rng, 1, max(capacity.num_slots - 1, 1)))
        room = capacity.num_blocks * capacity.block_size // (rows + 1) - 2 * DECODES - 16
        context = round(_between(rng, 4, max(min(longest, room, 16_384), 4)))
        chunk = round(rng.choice(capacity.token_rungs) * rng.uniform(0.7, 1)) - rows
        made.append(Scene(rows, context, max(min(chunk, longest, room), 2)))
    return made


def _between(rng: random.Random, low: float, high: float) -> float:
    """Uniform in the logarithm."""
    return low * (high / low) ** rng.random()


def play(scene: Scene, built: Built, config: EngineConfig, overlap: bool, seed: int) -> list[Times]:
    """Run one scene on an engine of its own over the executor that there is."""
    rng, watch, capacity = random.Random(seed), Watch(built.executor), built.executor.capacity()
    store = KVStore(capacity.num_blocks, capacity.block_size, caching=config.enable_prefix_caching)
    scheduler = Scheduler([store], Policy(), capacity, token_budget=built.facts["max_num_batched_tokens"])
    engine = Engine(
        scheduler,
        watch,
        built.tokenizer,
        clock=WallClock(),
        vocab_size=built.model.vocab_size,
        max_model_len=built.max_model_len,
        overlap=overlap,
    )

    def ask(name: str, num_tokens: int) -> None:
        prompt = tuple(rng.randrange(built.model.vocab_size) for _ in range(num_tokens))
        params = SamplingParams(temperature=0.0, max_tokens=built.max_model_len, ignore_eos=True)
        engine.add(Request(request_id=name, prompt_token_ids=prompt, params=params))

    def advance(num_decodes: int, num_rows: int) -> None:
        """Until so many more steps of as many decodes have been collected."""
        goal = sum(_all_decode(times.work, num_rows) for times in watch.times) + num_decodes
        while sum(_all_decode(times.work, num_rows) for times in watch.times) < goal:
            engine.step()

    for index in range(scene.num_rows):
        ask(str(index), max(scene.context - rng.randrange(1 + scene.context // 8), 1))
    advance(DECODES, scene.num_rows)
    ask("chunk", scene.chunk)
    advance(2, scene.num_rows + 1)
    for name in [*map(str, range(scene.num_rows)), "chunk"]:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return watch.times


def _all_decode(work: Work, num_rows: int) -> bool:
    return work.is_decode and work.rows == num_rows


def observe(
    notes: Sequence[dict[Work, Notes]], made: Sequence[Scene], built: Built, config: EngineConfig, turns: Iterable[int]
) -> None:
    """Play all scenes in every turn, so that a busy minute of the machine falls on all of them, and note their steps."""
    for turn, index in tqdm(list(itertools.product(turns, range(len(made)))), desc="measuring", unit="scene"):
        for overlap in (False, True):
            note(notes[index], play(made[index], built, config, overlap, seed=1000 * index + turn), overlap)


def samples_of(notes: Sequence[dict[Work, Notes]]) -> list[list[Sample]]:
    """Of the steps of each scene that were seen often enough."""
    return [[taken.sample() for taken in each.values() if taken.is_enough()] for each in notes]


def note(notes: dict[Work, Notes], times: Sequence[Times], overlap: bool) -> None:
    """File the steps of a scene under what they are, contexts of decodes apart."""
    for before, now in itertools.pairwise(times):
        taken = notes.setdefault(now.work._replace(decode_kv=0, pairs=0), Notes([], [], [], []))
        taken.works.append(now.work)
        if not overlap:
            taken.devices.append(now.collected_s - now.dispatch_s)
            taken.hosts.append(now.dispatch_s - before.collected_s)
        elif now.dispatched_s < before.collected_s:
            taken.periods.append(now.collected_s - before.collected_s)


def fitted_model(samples: Sequence[Sample], name: str, built: Built) -> CostModel:
    """Sizes come from the engine; the speed of links to host memory and to other replicas is assumed, not measured."""
    facts, device = built.facts, jax.devices()[0]
    num_programs = facts["warm_up_compiles"] + built.executor.metrics()["programs_from_disk"]
    assumed = of_device(device.device_kind, device.platform, built.model)
    return fit(
        samples,
        name=f"{name} on {facts['backend']}, fitted",
        block_bytes=facts["kv_pool_bytes"] / facts["num_kv_blocks"],
        compile_s=facts["warm_up_s"] / max(num_programs, 1),
        swap_bytes_per_s=assumed.swap_bytes_per_s,
        transfer_bytes_per_s=assumed.transfer_bytes_per_s,
    )


def table(title: str, samples: Sequence[Sample], model: CostModel) -> str:
    """How a model does, over all and by kind of step."""
    lines = [title]
    kinds = {
        "all": samples,
        "decodes": [sample for sample in samples if sample.work.is_decode],
        "with prompts": [sample for sample in samples if not sample.work.is_decode],
    }
    for name, some in kinds.items():
        if len(some) > 2:
            told = errors(model, some)
            lines.append(
                f"  {name:<13}{len(some):>4} kinds of steps: error median {told.median:6.1%}  p90 {told.p90:6.1%}  "
                f"bias {told.bias:+6.1%}  rank correlation {told.rank:.3f}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the cost model, as JSON")
    parser.add_argument("--scenes", type=int, default=40, metavar="N", help="half of them are fitted to (default: 40)")
    parser.add_argument("--cpu-time", action="store_true", help=CPU_TIME)
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    if args.cpu_time:
        count_cpu_time()
    try:
        if args.scenes < 8:
            raise JaxserveError(f"--scenes {args.scenes} must be at least 8")
        config = EngineConfig(**engine_options(args))
        if config.data_parallel_size > 1:
            raise JaxserveError("data_parallel_size must be 1: replicas are measured one by one")
        built = build(args.model, config)
        capacity = built.executor.capacity()
        if capacity.num_slots < 2 or built.max_model_len < 64:
            raise JaxserveError("max_num_seqs must be at least 2 and max_model_len 64, or there is nothing to mix")
    except JaxserveError as error:
        print(f"calibrate.py: {error}", file=sys.stderr)
        return 2
    play(Scene(2, 32, 16), built, config, True, 0)  # what only a first time costs
    made = scenes(args.scenes, config.seed, built)
    notes = [dict[Work, Notes]() for _ in made]
    observe(notes, made, built, config, range(TURNS))
    samples = samples_of(notes)
    fitted, others = (list(itertools.chain(*samples[begin::2])) for begin in (0, 1))
    model = fitted_model(fitted, args.model, built)
    print(table("fitted to:", fitted, model))
    print(table("told, not fitted to:", others, model))
    print(f"host {model.host}, hidden {model.hidden:.2f}")
    files.save(model, args.output)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
