"""The leader and its followers, each with an executor that only takes notes."""

import gc
import threading
import time
from multiprocessing.connection import Client, Listener

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, JaxserveError
from jaxserve.executor import lockstep
from jaxserve.executor.line import Line
from jaxserve.executor.lockstep import Followers, follow
from jaxserve.step import StepPlan

CONFIG = EngineConfig()


class Notes:
    """An executor that remembers what it was told; `fails_at` is the index of a plan."""

    def __init__(self, fails_at=None):
        self.dispatched, self.collected = [], []
        self.fails_at = fails_at

    def dispatch(self, plan):
        if plan.index == self.fails_at:
            raise RuntimeError("out of luck")
        self.dispatched.append(plan.index)
        return plan.index

    def collect(self, pending):
        self.collected.append(pending)


class Process(threading.Thread):
    """A follower, in a thread. `load` makes its executors."""

    def __init__(self, line, load):
        super().__init__(daemon=True)
        self.line, self.load = line, load
        self.executors = []

    def run(self):
        follow(self.line, self._load)
        self.line.close()

    def _load(self, model, config):
        self.executors.append(self.load(model))
        return self.executors[-1]


@pytest.fixture
def ended(monkeypatch):
    """Reasons with which processes have ended. Their threads stop there; the test's own raises SystemExit."""
    reasons = []

    def end(reason, tell_others=lambda: None):
        reasons.append(reason)
        tell_others()
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait()
        raise SystemExit

    monkeypatch.setattr(lockstep, "end_process", end)
    monkeypatch.setattr(lockstep, "_GRACE_S", 0.0)
    return reasons


def join(*loads):
    """A leader with followers that load so; None: one that does nothing."""
    here, processes = [], []
    for number, load in enumerate(loads, start=1):
        with Listener(("127.0.0.1", 0)) as listener:
            there = Line(Client(listener.address), "process 0")
            here.append(Line(listener.accept(), f"process {number}"))
        processes.append(Process(there, load))
        if load:
            processes[-1].start()
    return Followers(here), processes


def plan(index):
    return StepPlan(index=index, rows=())


def wait_for(condition):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen within 10 s"
        time.sleep(0.005)


def test_all_run_the_same_steps_and_leave_together(ended):
    followers, processes = join(lambda model: Notes(), lambda model: Notes())
    followers.load("tiny", CONFIG)
    notes = Notes()
    leader = followers.lead(notes)
    for index in range(3):
        leader.collect(leader.dispatch(plan(index)))
    assert followers.leave(10)
    for process in processes:
        process.join(10)
        assert process.executors[0].dispatched == notes.dispatched == [-1, 0, 1, 2]
        assert process.executors[0].collected == [-1, 0, 1]  # one step runs while it waits for the one before
    assert ended == []


def test_a_model_that_one_process_cannot_load_is_an_error_here_and_the_next_one_loads(ended):
    def load(model):
        if model == "bad":
            raise CheckpointError("there is no folder 'bad'")
        return Notes()

    followers, processes = join(lambda model: Notes(), load)
    followers.load("bad", CONFIG)
    with pytest.raises(JaxserveError, match="process 2: there is no folder 'bad'"):
        followers.lead(Notes())
    followers.load("good", CONFIG)
    leader = followers.lead(Notes())
    leader.dispatch(plan(0))
    wait_for(lambda: all(process.executors[-1].dispatched == [-1, 0] for process in processes))
    assert processes[0].executors[0].dispatched == []
    assert ended == []


def test_an_engine_that_is_gone_here_goes_there(ended):
    followers, (process,) = join(lambda model: Notes())
    followers.load("first", CONFIG)
    leader = followers.lead(Notes())
    followers.load("second", CONFIG)
    other = followers.lead(Notes())
    del leader
    gc.collect()
    other.dispatch(plan(0))
    wait_for(lambda: process.executors[1].dispatched == [-1, 0])
    followers.run(0, plan(1))  # nothing has that number any more
    wait_for(lambda: ended)
    assert "KeyError" in ended[0]


def test_a_step_that_fails_in_a_follower_ends_all_with_its_reason(ended):
    followers, processes = join(lambda model: Notes(), lambda model: Notes(fails_at=1))
    followers.load("tiny", CONFIG)
    leader = followers.lead(Notes())
    leader.dispatch(plan(0))
    leader.dispatch(plan(1))
    wait_for(lambda: len(ended) >= 3)
    assert ended[0] == "RuntimeError: out of luck"  # in process 2
    assert ended.count("process 2: RuntimeError: out of luck") == 2  # here, and in process 1
    assert processes[0].executors[0].dispatched == [-1, 0, 1]


def test_a_step_that_fails_in_the_leader_ends_all_with_its_reason(ended):
    followers, _ = join(lambda model: Notes(), lambda model: Notes())
    followers.load("tiny", CONFIG)
    leader = followers.lead(Notes(fails_at=0))
    with pytest.raises(SystemExit):
        leader.dispatch(plan(0))
    wait_for(lambda: len(ended) >= 3)
    assert ended[:3] == ["process 0: RuntimeError: out of luck"] * 3


def test_a_leader_that_has_gone_ends_its_followers(ended):
    with Listener(("127.0.0.1", 0)) as listener:
        process = Process(Line(Client(listener.address), "process 0"), lambda model: Notes())
        process.start()
        listener.accept().close()
    wait_for(lambda: ended)
    assert ended == ["process 0 has gone: it was killed or has crashed; see what it printed"]


def test_a_follower_that_has_gone_ends_the_leader_and_the_others(ended):
    _, processes = join(None, lambda model: Notes())
    processes[0].line.close()
    wait_for(lambda: len(ended) >= 2)
    assert ended == ["process 1 has gone: it was killed or has crashed; see what it printed"] * 2
