"""Gaps of service, step by step."""

from types import SimpleNamespace

from jaxserve.scheduler.progress import Progress
from jaxserve.sim.fairness import Fairness
from jaxserve.sim.record import Record
from jaxserve.step import Row, RowResult, Seat
from tests.sim.rigs import call, work


class Two:
    """Clients a and b, whose calls are told apart by number."""

    def __init__(self):
        calls = [call(f"{client}{n}", 10, client=client) for client in "ab" for n in range(4)]
        self.fairness = Fairness(work(*calls))
        self.records = {each.call_id: Record(each, 0.0, 10) for each in calls}

    def arrive(self, *names):
        for name in names:
            self.fairness.arrive(name[0])

    def step(self, *parts):
        """(name, prompt tokens, answer tokens) of each row."""
        progress = []
        for name, prompt, answers in parts:
            row = Row(Seat(seq_id=name, slot=0), 0 if prompt else 10, (1,) * max(prompt, 1), samples=bool(answers))
            progress.append(Progress(SimpleNamespace(seq_id=name), row, RowResult(), None))
        self.fairness.note(progress, self.records)
        for name, _, _ in parts:
            self.records[name].begin(0.0, 0)
        return self.fairness.worst_gap


def test_a_gap_is_how_far_services_moved_while_both_waited():
    two = Two()
    two.arrive("a0", "a1", "b0", "b1")
    assert two.step(("a0", 10, 0)) == 10
    assert two.step(("a0", 0, 1)) == 12, "an answer token counts twice"
    assert two.step(("b0", 10, 1)) == 12
    assert two.step(("b1", 5, 0)) == 12, "b waits for nothing any more"
    assert two.step(("a0", 0, 1), ("b1", 5, 1)) == 12


def test_what_was_given_while_one_did_not_wait_is_no_gap():
    two = Two()
    two.arrive("a0", "a1", "b0")
    two.step(("b0", 10, 0))
    for _ in range(50):
        two.step(("a0", 0, 1))
    assert two.fairness.worst_gap == 0
    two.arrive("b1")
    assert two.step(("a0", 0, 1)) == 2
    assert two.step(("b0", 0, 1), ("b0", 0, 1)) == 4
    assert two.fairness.service == {"a": 102.0, "b": 14.0}
