"""What a newcomer meets first: help, mistakes, and the end of a pipe."""

import subprocess
import sys

import pytest

from jaxserve.cli.main import COMMANDS


def test_the_overview_names_every_command(cli):
    done = cli("--help")
    assert done.code == 0
    assert all(name in done.out for name in COMMANDS)
    assert cli().code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli, command):
    done = cli(command, "--help")
    assert done.code == 0
    assert f"jaxserve {command}" in done.out.partition("examples:")[2]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["plan", "--help"], ["bench", "serve", "--help"], ["models"]]
)
def test_help_and_listings_load_no_jax(arguments, tmp_path):
    run_it = f"import sys; from jaxserve.cli.main import main\ntry: main({arguments})\n"
    code = run_it + "finally: assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["genrate"], "did you mean 'generate'?"),
        (["xyzzy"], "there are generate, chat"),
        (["generate", "no-such-model", "hi"], "there is no folder 'no-such-model'"),
        (["generate", "tiny", "hi", "--max-token", "3"], "did you mean --max-tokens?"),
        (["generate", "tiny", "hi", "--temperature", "nan"], "temperature=nan must be a finite number"),
        (["generate", "tiny", "hi", "--temperature", "hot"], "invalid float value"),
        (["generate", "tiny", "hi", "--block-size", "7"], "block_size=7 must be a power of two"),
        (["generate", "tiny", "hi", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["generate", "tiny", "--file", "missing.txt"], "no such file or directory: missing.txt"),
        (["generate"], "the following arguments are required: MODEL"),
        (["chat", "no-such-model"], "there is no folder 'no-such-model'"),
        (["plan", "no-such-model"], "there is no folder 'no-such-model'"),
        (["models", "no-such-model"], "there is no folder 'no-such-model'"),
        (["bench", "xyzzy", "--model", "tiny"], "there are throughput, latency, serve"),
        (["bench", "latency", "--model", "tiny", "--num-iters", "0"], "--num-iters must be at least 1"),
        (["bench", "latency", "--model", "tiny", "--prefix-len", "999"], "--prefix-len must lie between 0 and"),
        (
            ["run-batch", "-i", "missing.jsonl", "-o", "o", "--model", "tiny"],
            "no such file or directory: missing.jsonl",
        ),
        (["run-batch", "-i", "x"], "the following arguments are required: -o/--output, --model"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(cli, arguments, sentence, tmp_path, monkeypatch, fake_llm):
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert done.code == 2
    assert sentence in done.err
    assert "Traceback" not in done.err
    assert fake_llm.last is None
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_code_130_without_a_traceback(cli, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxserve.cli.main.dispatch", interrupted)
    done = cli("models")
    assert done.code == 130
    assert done.err == "\njaxserve: interrupted\n"


def test_a_closed_pipe_is_silent():
    code = (
        "import sys\n"
        "from jaxserve.cli import main as m\n"
        "m.dispatch = lambda arguments: print('x\\n' * 100_000) or 0\n"
        "sys.exit(m.main(['models']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_version_is_printed(cli):
    assert cli("--version").out.startswith("jaxserve ")
