"""Times of single steps: what the device, the host and the links have to do, and what of it passes at once."""

import pytest

from jaxserve.clock import VirtualClock
from jaxserve.executor.ladder import build_ladder
from jaxserve.sim.executor import Answer, SimExecutor
from jaxserve.step import BlockSwap, Capacity, Row, RowResult, Seat, StepPlan
from tests.sim.rigs import cost


def executor(
    *, overlap: bool = True, compiles: bool = False, waits_for_swaps: bool = False, **costs
) -> tuple[SimExecutor, VirtualClock]:
    clock = VirtualClock()
    capacity = Capacity(64, 8, 8, (1, 2, 4, 8, 16, 64), 256, num_host_blocks=64)
    options = {"overlap": overlap, "compiles": compiles, "waits_for_swaps": waits_for_swaps}
    made = SimExecutor(capacity, build_ladder(8, 64), cost(**costs), clock, **options)
    made.answers["a"] = Answer(RowResult(token_id=7), 3)
    return made, clock


def plan(num_tokens: int = 1, start: int = 40, index: int = 1, **moves) -> StepPlan:
    row = Row(Seat(seq_id="a", slot=0), start, (1,) * num_tokens, samples=True, output_index=index)
    return StepPlan(index=index, rows=(row,), **moves)


def test_a_step_is_padded_to_a_compiled_size():
    made, clock = executor()
    result = made.collect(made.dispatch(plan(9)))
    assert clock.now_s() == pytest.approx(0.016)
    assert result.padded_tokens == 7


def test_host_time_hides_behind_the_device_or_the_device_behind_it():
    for host_s, period_s in ((0.001, 0.016), (0.030, 0.030)):
        made, clock = executor(host_s=host_s)
        pending = [made.dispatch(plan(16))]
        ends = []
        for _ in range(5):
            pending.append(made.dispatch(plan(16)))
            made.collect(pending.pop(0))
            ends.append(clock.now_s())
        assert ends[-1] - ends[-2] == pytest.approx(period_s)


@pytest.mark.parametrize("host_s", [0.004, 0.040])
def test_what_nothing_hides_is_added(host_s):
    """`CostModel.step_s` says how far apart steps are, and so they are."""
    made, clock = executor(host_s=host_s, hidden=0.25)
    pending, ends = [made.dispatch(plan(16))], []
    for _ in range(4):
        pending.append(made.dispatch(plan(16)))
        made.collect(pending.pop(0))
        ends.append(clock.now_s())
    assert ends[-1] - ends[-2] == pytest.approx(max(0.016, host_s) + 0.75 * min(0.016, host_s))


def test_without_overlap_host_and_device_take_turns():
    made, clock = executor(overlap=False, host_s=0.004, hidden=0.0)
    for _ in range(3):
        made.collect(made.dispatch(plan(16)))
    assert clock.now_s() == pytest.approx(3 * 0.020)


def test_the_first_step_of_each_size_compiles_if_asked():
    made, clock = executor(compiles=True)
    for tokens in (16, 16, 8, 16):
        made.collect(made.dispatch(plan(tokens)))
    assert made.steps.stall_s == 5.0, "8 tokens are padded to 16"
    assert clock.now_s() == pytest.approx(5.0 + 4 * 0.016)


def test_an_answer_ends_with_the_end_token():
    made, _ = executor()
    tokens = [made.collect(made.dispatch(plan(index=index))).rows[0].token_id for index in range(4)]
    assert tokens == [7, 7, 0, 0]


def test_swaps_take_a_link_each_way():
    """A block takes 10 ms. Those that leave do not hold up the step; those that come back do, unless foreseen."""
    made, clock = executor()
    swaps = tuple(BlockSwap(n, n) for n in range(3))
    made.collect(made.dispatch(plan(swap_outs=swaps)))
    assert clock.now_s() == pytest.approx(0.001)
    made.collect(made.dispatch(plan(swap_ins=swaps)))  # they have left at 30 ms, and are back at 60
    assert clock.now_s() == pytest.approx(0.061)
    made.collect(made.dispatch(plan(16, prefetches=swaps)))  # on their way until 91
    assert clock.now_s() == pytest.approx(0.077)
    made.collect(made.dispatch(plan(swap_ins=swaps)))
    assert clock.now_s() == pytest.approx(0.092)
    assert made.steps.swapped_bytes == 9.0
    made.collect(made.dispatch(plan(swap_ins=swaps)))  # what was foreseen once is not there for ever
    assert clock.now_s() == pytest.approx(0.123)


def test_steps_that_wait_for_swaps_wait_both_ways_and_nothing_is_foreseen():
    made, clock = executor(waits_for_swaps=True)
    swaps = tuple(BlockSwap(n, n) for n in range(3))
    made.collect(made.dispatch(plan(swap_outs=swaps)))
    assert clock.now_s() == pytest.approx(0.031)
    made.collect(made.dispatch(plan(16, prefetches=swaps)))
    assert clock.now_s() == pytest.approx(0.047)
    made.collect(made.dispatch(plan(swap_ins=swaps)))
    assert clock.now_s() == pytest.approx(0.078)
    assert made.steps.swapped_bytes == 6.0
