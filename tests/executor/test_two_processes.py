"""One engine in two processes with four devices each, started as a user starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxserve import LLM
from tests.models import toy
from tests.support import joined

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CONFIG = toy.CASES["llama3"]["config"] | {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "num_hidden_layers": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.write_checkpoint(tmp_path_factory.mktemp("llama3"), CONFIG, seed=3)


@pytest.fixture(scope="module")
def expected(folder):
    """Answers of one process, on one device."""
    return joined.answers(LLM(folder, **joined.OPTIONS))


@pytest.fixture
def start(tmp_path):
    """Start a command in two processes; `{}` in it is the process id. What was started is ended with the test."""
    started = []

    def start(*command, num_devices=4):
        xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"  # the last one counts
        flags = {"XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)}
        for process_id in (0, 1):
            errors = tmp_path / f"stderr-{process_id}"
            words = [sys.executable, *(str(word).replace("{}", str(process_id)) for word in command)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with errors.open("w") as file:
                started.append(subprocess.Popen(words, **pipes, stderr=file, env=os.environ | flags, cwd=tmp_path))
        return [SimpleNamespace(process=p, errors=tmp_path / f"stderr-{i}") for i, p in enumerate(started[-2:])]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def ask(leader, **sizes):
    """One request of `tests.support.joined`, and its answer."""
    leader.process.stdin.write(json.dumps(sizes) + "\n")
    leader.process.stdin.flush()
    return json.loads(leader.process.stdout.readline())


def check(found, expected):
    """The same tokens, and log-probabilities that differ by rounding."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [logprob for _, logprob in found] == pytest.approx([logprob for _, logprob in expected], abs=1e-3)


SIZES = [{"data_parallel_size": 2, "tensor_parallel_size": 4}, {"sequence_parallel_size": 2, "tensor_parallel_size": 4}]


@pytest.mark.parametrize(("victim", "sizes"), list(enumerate(SIZES)), ids=["leader", "follower"])
def test_two_answer_as_one_and_when_one_is_killed_the_other_ends(start, folder, expected, victim, sizes):
    processes = start("-m", "tests.support.joined", free_address(), "{}", folder)
    leader, other = processes[0], processes[1 - victim]
    assert leader.process.stdout.readline() == "joined\n"
    refused = "one device cannot be spread evenly over 2 processes with 4 devices each"
    assert refused in ask(leader, tensor_parallel_size=1)
    check(ask(leader, **sizes), expected)
    ask(leader, forever=True)  # from now on there is a step under way at all times
    processes[victim].process.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    while other.process.poll() is None:
        assert time.monotonic() < killed_s + 15, "it hangs"
        time.sleep(0.05)
    told = other.errors.read_text()
    if other.process.returncode == -signal.SIGABRT:  # JAX has noticed first
        assert victim == 0
        assert "JAX distributed service detected fatal errors" in told
    else:
        assert other.process.returncode == 1
        assert f"jaxserve: process {victim}" in told
        assert "has gone: it was killed or has crashed" in told


def test_the_same_command_in_both_answers_once_and_both_leave(start, folder, expected):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in joined.OPTIONS.items() if name != "progress"]
    options += ["--max-tokens=12", "--ignore-eos", "--no-progress", "--token-ids", "--tensor-parallel-size=8"]
    joining = ["--coordinator-address", free_address(), "--num-processes=2", "--process-id={}"]
    prompt = " ".join(map(str, joined.PROMPTS[0]))
    leader, follower = start("-m", "jaxserve", "generate", folder, prompt, *options, *joining)
    answer, nothing = leader.process.communicate(timeout=120)[0], follower.process.communicate(timeout=120)[0]
    assert (leader.process.returncode, follower.process.returncode) == (0, 0), follower.errors.read_text()
    assert [int(word) for word in answer.split()] == expected[0][0]
    assert nothing == ""
    assert "[12 tokens, " in leader.errors.read_text()
    assert "tokens, " not in follower.errors.read_text()


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_alone_ends_with_the_reason(process_id):
    code = f"from jaxserve import distributed; distributed.initialize({free_address()!r}, 2, {process_id}, timeout_s=1)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("jaxserve: not all processes have joined within 1 s")
