"""Sequences in host memory: cases in which they once waited for ever, or left copies behind."""

from jaxserve.scheduler.draft import Draft
from tests.fakes import ask, check_answer, make_engine


def test_who_comes_back_alone_takes_blocks_that_are_pinned():
    """Nothing runs that would end, so to wait for them would be for ever."""
    rig = make_engine(num_blocks=17, num_slots=2, num_host_blocks=20, overlap=False, policy="priority")
    long = ask("long", [2] * 20, max_tokens=44, ignore_eos=True)
    rig.engine.add(long)
    (sequence,) = rig.scheduler._sequences.values()
    while sequence.num_computed < 55:
        rig.step()
    rig.scheduler._preempt(sequence, 0.0)
    assert sequence.num_parked
    outputs = rig.run(ask("pins", [1] * 24, max_tokens=1, pin="x", pin_tokens=24, priority=-1), max_steps=200)
    check_answer(outputs["long"], long)
    assert rig.scheduler.counters.swap_in_blocks > 0


def test_a_sibling_that_shares_its_parents_prompt_again_lets_go_of_its_copies():
    """It was swapped out before its first token came, so it may share once more when it comes back."""
    rig = make_engine(num_blocks=30, num_slots=4, num_host_blocks=40)
    request = ask("two", [1] * 22, n=2, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    rig.engine.add(request)
    scheduler, (replica,) = rig.scheduler, rig.scheduler.replicas
    while scheduler.num_waiting == 2:
        scheduler._client_quota = 1
        rig.step()
    (second,) = (scheduler._sequences[view.seq_id] for view in scheduler.waiting)
    scheduler._welcome(Draft(budget=8), second, replica.admit(second), 0.0)
    scheduler._preempt(second, 0.0)
    assert second.num_parked == 21
    scheduler._client_quota = None
    check_answer(rig.run()["two"], request)  # every step checks that no copy is left behind
    assert not replica.host.store.seq_ids


def test_only_whole_blocks_of_an_ended_sequence_are_kept():
    """A partly filled one could not be found again."""
    rig = make_engine(num_blocks=30, num_host_blocks=40)
    rig.scheduler._policy.keeps_copy = lambda view: True
    rig.engine.add(ask("r", [1] * 22, max_tokens=4, ignore_eos=True))
    while rig.engine.has_work:
        rig.step()
    assert 22 // 4 <= len(rig.scheduler.replicas[0]._swap_outs) <= 25 // 4
    again = ask("again", [1] * 22, max_tokens=4, ignore_eos=True)
    rig.scheduler.clear_cache()
    check_answer(rig.run(again)["again"], again)
