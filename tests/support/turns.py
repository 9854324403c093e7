"""Whether other threads go on while something is done: what holds Python's lock stops them all."""

import threading
import time
from collections.abc import Callable
from typing import Any


def turns_during(work: Callable[[], Any]) -> int:
    """How often a thread that wants to wake every millisecond did so while `work` ran."""
    num_turns, is_done = 0, threading.Event()

    def take_turns() -> None:
        nonlocal num_turns
        while not is_done.wait(0.001):
            num_turns += 1

    other = threading.Thread(target=take_turns)
    other.start()
    time.sleep(0.01)
    before = num_turns
    work()
    after = num_turns
    is_done.set()
    other.join()
    assert before, "the thread has not begun"
    return after - before
