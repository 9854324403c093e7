"""Fixtures of the command line's tests."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxserve.cli.main import main
from tests.cli.checkpoint import write_text_checkpoint
from tests.cli.fake_llm import FakeLLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a toy model that takes text."""
    return write_text_checkpoint(tmp_path_factory.mktemp("checkpoint") / "toy")


@pytest.fixture
def fake_llm(monkeypatch):
    """Commands get FakeLLM for `jaxserve.llm.LLM`, and load no jax."""
    monkeypatch.setitem(sys.modules, "jaxserve.llm", SimpleNamespace(LLM=FakeLLM))
    monkeypatch.setattr(FakeLLM, "last", None)
    return FakeLLM


@pytest.fixture
def cli(capsys):
    """Run the command line in this process; gives exit code, standard output, standard error."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def batch(cli, checkpoint, tmp_path, fake_llm):
    """Write the lines, run the command, read the answers."""

    def run(lines, *options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        if lines is not None:
            source.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in lines))
        run.done = cli("run-batch", "-i", source, "-o", target, "--model", checkpoint, *options)
        run.target = target
        return [json.loads(text) for text in target.read_text().splitlines()] if target.exists() else []

    return run
