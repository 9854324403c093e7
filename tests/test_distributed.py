"""How processes join, without any: the real thing is in `executor/test_two_processes.py`."""

import json
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import jax
import pytest

from jaxserve import LLM, distributed
from jaxserve.errors import ConfigError
from jaxserve.executor.line import Failed, Hello, Line


@pytest.fixture
def two_processes(monkeypatch):
    """JAX tells of two processes; gives what process 0 says to the other."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "_broadcast", lambda content: said.append(json.loads(content)))
    return said


def in_background(said, act):
    """Call `act` with the address of process 0 as soon as it is known."""

    def run():
        while not said:
            time.sleep(0.005)
        act((said[0]["host"], said[0]["port"]), bytes.fromhex(said[0]["key"]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_strangers_are_turned_away_and_the_right_process_is_taken(two_processes):
    refused = []

    def strangers_then_the_right_one(address, key):
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        try:
            Client(address, authkey=b"a guess")
        except AuthenticationError as error:
            refused.append(error)
        Line(Client(address, authkey=key), "process 0").send(Hello(1, "there", distributed._versions()))

    thread = in_background(two_processes, strangers_then_the_right_one)
    (line,) = distributed._accept("127.0.0.1:1")
    thread.join(10)
    assert len(refused) == 1
    assert line.name == "process 1 (there)"


def test_processes_with_other_versions_end_with_the_reason(two_processes, monkeypatch):
    heard = []

    def end(reason, tell_others):
        tell_others()
        raise SystemExit(reason)

    def old(address, key):
        line = Line(Client(address, authkey=key), "process 0")
        line.send(Hello(1, "there", "jaxserve 0.0.0"))
        heard.append(line.receive())

    monkeypatch.setattr("jaxserve.executor.lockstep.end_process", end)
    thread = in_background(two_processes, old)
    with pytest.raises(SystemExit) as ended:
        distributed._accept("127.0.0.1:1")
    thread.join(10)
    reason = str(ended.value)
    assert reason.startswith("process 1 (there) has jaxserve 0.0.0, process 0 has jaxserve ")
    assert heard == [Failed(reason)]


def test_what_is_missing_is_named(monkeypatch):
    def incomplete(*args, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", incomplete)
    with pytest.raises(ConfigError, match=r"coordinator_address should be defined.*Give coordinator_address"):
        distributed.initialize()


def test_the_environment_says_what_the_arguments_do_not(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: asked.append(args))
    for name, value in {"COORDINATOR_ADDRESS": "there:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(f"JAXSERVE_{name}", value)
    distributed.initialize()  # one process after all, so it returns
    distributed.initialize("here:1", 1, 0)
    assert asked == [("there:1", 2, 1), ("here:1", 1, 0)]


def test_processes_that_have_not_joined_are_refused(two_processes):
    with pytest.raises(ConfigError, match=r"JAX runs 2 processes.*distributed\.initialize\(\) in all of them"):
        LLM("tiny")
