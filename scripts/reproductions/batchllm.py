"""BatchLLM (arXiv 2412.03594): an offline job with shared documents, with and without planned groups."""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from jaxserve.cost.roofline import reference
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.prefix_groups import plan_groups
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.step import RowResult
from jaxserve.workload.call import Call, Span
from jaxserve.workload.generate import documents
from reproductions import picture
from reproductions.section import Options, Section, Table

BLOCK = 16
POOLS = (20_000, 40_000, 80_000, 200_000)  # tokens
LIMIT = 8192


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a job is run."""

    grouped: bool = True  # in planned order
    by_ratio: bool = False
    policy: str = "batchllm"  # with pins; fcfs: without
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_num_seqs: int = 64


BASE, BEST = "shuffled, FCFS + LRU", "groups"
WAYS = {
    BASE: Way(grouped=False, policy="fcfs"),
    "the order only, FCFS + LRU": Way(policy="fcfs"),
    BEST: Way(),
    "groups, by decode ratio": Way(by_ratio=True),
    "groups, by memory": Way(options={"future_share": 1.0}),
    "groups, 256 sequences": Way(max_num_seqs=256),
    "groups, 256 sequences, by memory": Way(max_num_seqs=256, options={"future_share": 1.0}),
    "groups, 256 sequences, by decode ratio": Way(max_num_seqs=256, by_ratio=True),
}
DRAWN = (BASE, "the order only, FCFS + LRU", BEST, "groups, 256 sequences, by decode ratio")
SHARES = {f"at most {share:.0%}": Way(options={"max_pinned_share": share}) for share in (0.1, 0.3, 0.6, 0.8, 1.0)}


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one run took."""

    seconds: float
    cached_share: float  # of prompt tokens
    preemptions: float  # half ones in the middle of two runs


def run(options: Options) -> Section:
    """Makespan of the job over size of the pool."""
    count, pools = (6, (8_000,)) if options.quick else (60, POOLS)
    jobs = [documents(random.Random(seed), count=count).calls for seed in range(options.seeds)]
    found = {name: [_median(jobs, way, pool, options) for pool in pools] for name, way in (WAYS | SHARES).items()}
    gains = {
        name: [base.seconds / outcome.seconds for base, outcome in zip(found[BASE], found[name], strict=True)]
        for name in WAYS
    }
    figure, (axis,) = picture.panels()
    shown = {name: list(zip((p / 1000 for p in pools), gains[name], strict=True)) for name in DRAWN}
    labels = {"xlabel": "KV pool, thousand tokens", "ylabel": "times as fast as shuffled", "title": "offline job"}
    picture.curves(axis, shown, **labels)
    file = picture.save(figure, options.pictures / "batchllm.png")
    return Section(
        title="BatchLLM: groups of prompts that begin alike",
        claim="1.1 to 2 times the throughput of vLLM in the first version, 1.3 to 10.8 times that of vLLM and SGLang in the"
        " MLSys version, on micro-benchmarks and an industry job, of whose prompt tokens vLLM's prefix cache spares 35.8 %"
        " and the best order 58.1 % (arXiv 2412.03594).",
        setup=f"{count} documents of 1000 to 4000 tokens, {len(jobs[0])} questions of 20 to 100 tokens, shuffled; 30 % of"
        " the documents want 200 to 400 tokens of answer, the others 10 to 60. An 8B model on an A100 as a roofline"
        f" (`cost.reference`), 512 tokens a step, {WAYS[BASE].max_num_seqs} sequences where not said otherwise, blocks of"
        f" {BLOCK}. Lengths of answers are known to the planner. No kernel that reads a shared prefix once.",
        tables=[
            Table(
                caption="Seconds (share of prompt tokens from the cache, preemptions), by tokens in the pool:",
                lines=_lines(found, WAYS, pools),
            ),
            Table(
                caption="How much of the pool the prefixes of open groups may take:", lines=_lines(found, SHARES, pools)
            ),
        ],
        verdict=_verdict(found, pools),
        pictures={file: "speed of the job against the size of the pool"},
    )


def _lines(
    found: Mapping[str, Sequence[Outcome]], names: Mapping[str, Way], pools: Sequence[int]
) -> list[dict[str, str]]:
    return [
        {"way": name}
        | {
            f"{pool // 1000}k": f"{outcome.seconds:.1f} ({outcome.cached_share:.2f}, {outcome.preemptions:g})"
            for pool, outcome in zip(pools, found[name], strict=True)
        }
        for name in names
    ]


def _verdict(found: Mapping[str, Sequence[Outcome]], pools: Sequence[int]) -> str:
    def over(name: str, base: str) -> str:
        pairs = zip(found[base], found[name], strict=True)
        return ", ".join(f"{one.seconds / other.seconds:.2f}" for one, other in pairs)

    many = "groups, 256 sequences"
    sizes = ", ".join(f"{pool // 1000}k" for pool in pools)
    return (
        f"Times as fast, for pools of {sizes}: (b) groups over shuffled {over(BEST, BASE)} (wanted: 1.5), of which the"
        f" order alone gives {over('the order only, FCFS + LRU', BASE)}; the rest is waiting for a prefix that another"
        " member computes. A pool that holds nearly all documents leaves little to gain."
        f" (c) By decode ratio over groups without: {over('groups, by decode ratio', BEST)}; with 256 sequences"
        f" {over(many + ', by decode ratio', many)}: it needs room, and slots, to mix what writes with what reads."
        f" (d) Admission by memory: {over('groups, by memory', BEST)}; with 256 sequences"
        f" {over(many + ', by memory', many)}: it buys freedom from preemption, and no speed, as preempted prompts are"
        f" mostly cached. A share of 30 % for prefixes instead of 80 %: {over('at most 30%', 'at most 80%')}."
    )


def _median(jobs: Sequence[Sequence[Call]], way: Way, pool: int, options: Options) -> Outcome:
    outcomes = [run_job(job, way, pool) for job in jobs]
    options.say(f"{way} in {pool} tokens: {outcomes[0]}")
    columns = zip(*(dataclasses.astuple(outcome) for outcome in outcomes), strict=True)
    return Outcome(*(median(column) for column in columns))


def run_job(calls: Sequence[Call], way: Way, pool: int) -> Outcome:
    """One run, all of the job in the queue from the start."""
    spec = ReplicaSpec(
        cost=reference(),
        num_blocks=pool // BLOCK,
        block_size=BLOCK,
        max_num_seqs=way.max_num_seqs,
        token_budget=512,
        max_model_len=LIMIT,
    )
    replica = Replica(0, spec, make_policy(way.policy, way.options, cost=spec.cost, capacity=spec.capacity))
    requests = _requests(calls, way)
    left = Counter(request.pin for request in requests if request.pin)
    for number, request in enumerate(requests):
        assert request.params.max_tokens is not None
        replica.add(request, RowResult(token_id=-1 - number), request.params.max_tokens)
    while replica.has_work:
        for item in replica.advance():
            if item.finish:
                replica.forget(item.sequence)
                name = item.sequence.request.pin
                left[name] -= 1
                if name and not left[name]:
                    replica.scheduler.unpin(name)
    counters = replica.scheduler.counters
    assert not replica.scheduler.num_held_blocks, "something is left in the pool"
    cached = counters.cached_tokens / (counters.cached_tokens + counters.prompt_tokens)
    return Outcome(replica.clock.now_s(), cached, counters.preemptions)


def _requests(calls: Sequence[Call], way: Way) -> list[Request]:
    prompts = [
        np.concatenate([np.full(s.length, s.token, np.int32) for s in c.prompt if isinstance(s, Span)]) for c in calls
    ]
    outputs = [call.output_tokens for call in calls]
    order, pins = [(member, "", 0) for member in range(len(calls))], way.policy == "batchllm"
    if way.grouped:
        groups = plan_groups(prompts, outputs, BLOCK, by_ratio=way.by_ratio)
        order = [
            (member, f"group{number}" if pins and group.num_shared else "", group.num_shared if pins else 0)
            for number, group in enumerate(groups)
            for member in group.members
        ]
    return [
        Request(
            request_id=str(member),
            prompt_token_ids=tuple(prompts[member].tolist()),
            params=SamplingParams(temperature=0.0, max_tokens=outputs[member], ignore_eos=True),
            pin=pin,
            pin_tokens=pin_tokens,
        )
        for member, pin, pin_tokens in order
    ]
