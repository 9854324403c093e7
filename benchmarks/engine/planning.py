"""What planning and committing a step costs the host, by policy: 256 sequences decode, and others wait.

    python benchmarks/engine/planning.py
    python benchmarks/engine/planning.py --waiting 2000 --policies dlpm,lpm

No device: the scheduler and the KV store alone. Wanted: under 0.5 ms for a plan.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append_line, machine, spread

from jaxserve.config import SCHEDULING_POLICIES
from jaxserve.cost.model import CostModel
from jaxserve.cost.roofline import reference
from jaxserve.kv.store import KVStore
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import Capacity, RowResult, StepPlan, StepResult

PROMPT, ANSWER, BLOCK, BLOCKS = 300, 600, 32, 20_000
RUNGS = (16, 64, 256, 512, 1024, 2048)
RESULTS = Path(__file__).resolve().parent.parent / "results" / "planning.jsonl"
_TOKEN, _NOTHING = RowResult(token_id=5), RowResult()


def make_scheduler(policy: str, num_slots: int, num_waiting: int, cost: CostModel) -> Scheduler:
    """`num_slots` sequences that will run, and others behind them."""
    capacity = Capacity(BLOCKS, BLOCK, num_slots, RUNGS, 8192)
    made = make_policy(policy, cost=cost, rungs=RUNGS)
    scheduler = Scheduler([KVStore(BLOCKS, BLOCK)], made, capacity, token_budget=RUNGS[-1])
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    for number in range(num_slots + num_waiting):
        request = Request(
            request_id=str(number),
            prompt_token_ids=(number + 10,) * PROMPT,
            params=params,
            client=f"client {number % 8}",
            program=f"program {number % 40}",
        )
        sequence = Sequence(seq_id=str(number), request=request, seed=0, max_len=PROMPT + ANSWER, arrival_s=0.0)
        scheduler.add(sequence, 0.0)
    return scheduler


def run(plan: StepPlan) -> StepResult:
    """One token for each row that samples."""
    return StepResult(rows=tuple(_TOKEN if row.samples else _NOTHING for row in plan.rows))


def measure(policy: str, num_slots: int, num_waiting: int, cost: CostModel) -> tuple[list[float], list[float]]:
    """Milliseconds of each plan and each commit in which all slots decode."""
    scheduler = make_scheduler(policy, num_slots, num_waiting, cost)
    plans, commits = list[float](), list[float]()
    for step in range(ANSWER):
        begin_s = time.perf_counter()
        plan = scheduler.plan(step * 0.01)
        planned_s = time.perf_counter()
        assert plan is not None
        result = run(plan)
        before_s = time.perf_counter()
        scheduler.commit(plan, result, step * 0.01)
        if len(plan.rows) == plan.num_tokens == num_slots:
            plans.append(1e3 * (planned_s - begin_s))
            commits.append(1e3 * (time.perf_counter() - before_s))
    return plans, commits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default=",".join(SCHEDULING_POLICIES))
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=100)
    args = parser.parse_args()
    cost = reference()
    gc.disable()
    for policy in args.policies.split(","):
        plans, commits = measure(policy, args.running, args.waiting, cost)
        if not plans:
            print(f"{policy}: never ran {args.running} decodes at once")
            continue
        print(
            f"{policy}: plan {statistics.median(plans):.3f} ms, commit {statistics.median(commits):.3f} ms"
            f" (medians of {len(plans)})"
        )
        facts = {"benchmark": "planning", "policy": policy, "running": args.running, "waiting": args.waiting}
        timings = {"plan_ms": spread(plans), "commit_ms": spread(commits)}
        append_line(RESULTS, facts | timings | {"machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
