"""The shell scripts: what they say on machines that are not ready, and what launchers start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_COMMANDS = ("bash", "env", "dirname", "df", "awk", "cksum", "cat", "tail", "sed", "mkdir", "chmod")


@pytest.fixture
def machine(tmp_path):
    """A copy of the scripts, and a PATH with the commands they need but no Python."""
    (tmp_path / "repo" / "scripts").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in ("quickstart", "test", "venv.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "repo" / "scripts" / name)
    (tmp_path / "repo" / "pyproject.toml").write_text("[project]\n")
    for name in SYSTEM_COMMANDS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def command(machine: Path, name: str, body: str) -> None:
    """Put a command on the machine's PATH."""
    path = machine / "bin" / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run(machine: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine)}
    path = machine / "repo" / "scripts" / script
    return subprocess.run([path], capture_output=True, text=True, env=environment, check=False, timeout=60)


def python_stub(version: str, refuse: str = "") -> str:
    """Bash that answers the questions which venv.sh asks an interpreter of `version`; `refuse` is a module it lacks."""
    new_enough = tuple(map(int, version.split("."))) >= (3, 11)
    return f"""case "$*" in
    *version_info*) exit {0 if new_enough else 1} ;;
    *python_version*) echo {version} ;;
    *{refuse or "NOTHING"}*) exit 1 ;;
    -V) echo Python {version} ;;
    *"-m venv"*) mkdir -p "$3/bin" && cat >"$3/bin/python" <<<'#!/bin/bash
[ "$5" = --quiet ] && echo "ERROR: no connection" >&2 && exit 1
exit 0' && chmod +x "$3/bin/python" ;;
    esac"""


@pytest.mark.parametrize("script", ["quickstart", "test"])
@pytest.mark.parametrize(
    ("name", "stub", "sentence"),
    [
        ("python3", python_stub("3.9.2"), "needs Python 3.11 or newer (python3 is 3.9.2)"),
        ("nothing", "", "needs Python 3.11 or newer (no python3 on the PATH)"),
        ("python3.12", "exit 127", "no python3 on the PATH"),  # a pyenv shim without its version
        ("python3", python_stub("3.12.0", refuse="ensurepip"), "sudo apt install python3-venv"),
        ("df", 'echo; echo "/dev/sda 100 90 10240 90% /"', "has 10 MB free"),
    ],
)
def test_what_is_missing_is_named(machine, script, name, stub, sentence):
    command(machine, name, stub)
    done = run(machine, script)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_failed_download_is_told_and_not_remembered(machine):
    command(machine, "python3", python_stub("3.12.0"))
    for _ in range(2):
        done = run(machine, "quickstart")
        assert done.returncode == 2
        assert "ERROR: no connection" in done.stderr
        assert "pip could not install jaxserve" in done.stderr


def test_a_second_run_installs_nothing(machine):
    venv = machine / "repo" / ".venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("echo"), venv / "bin" / "jaxserve")
    stamp = subprocess.run(["cksum"], input=b"[project]\n", capture_output=True, check=True).stdout
    (venv / ".installed").write_bytes(stamp)
    done = run(machine, "quickstart")
    assert done.returncode == 0
    assert done.stdout.startswith("generate tiny")
    assert done.stderr == ""


def test_the_scripts_can_be_executed_and_explain_themselves():
    for script in ("scripts/quickstart", "scripts/test", "scripts/launch_gpu.sh", "scripts/launch_tpu.sh"):
        assert os.access(ROOT / script, os.X_OK)
        done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, check=True)
        assert script in done.stdout


def test_sizes_are_printed():
    command_line = [sys.executable, ROOT / "scripts" / "print_sizes.py"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert "host engine" in done.stdout


def launch(machine: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher; whatever it starts by ssh, srun or gcloud is written down by the stubs."""
    paths = {"PATH": str(machine / "bin"), "HOME": str(machine)}
    command_line = [ROOT / "scripts" / script, *arguments]
    stdin = subprocess.DEVNULL
    return subprocess.run(
        command_line, capture_output=True, text=True, env=paths | environment, check=False, timeout=60, stdin=stdin
    )


def test_each_host_runs_the_command_as_the_process_it_is(machine):
    """The stub of ssh runs here what it gets."""
    command(machine, "ssh", 'while [ "$1" != one ] && [ "$1" != me@two ]; do shift; done; cd; shift; bash -c "$*"')
    command(machine, "jaxserve", 'echo "$JAXSERVE_COORDINATOR_ADDRESS $JAXSERVE_NUM_PROCESSES $JAXSERVE_PROCESS_ID $*"')
    options = ("--hosts", "one,me@two", "--port", "77", "--directory", str(machine))
    done = launch(machine, "launch_gpu.sh", *options, "jaxserve", "generate", "a prompt")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["one:77 2 0 generate a prompt", "one:77 2 1 generate a prompt"]
    command(machine, "jaxserve", 'exit "$JAXSERVE_PROCESS_ID"')
    assert launch(machine, "launch_gpu.sh", *options, "jaxserve").returncode == 1


def test_slurm_starts_the_command_itself(machine):
    command(machine, "srun", 'echo "$@"')
    done = launch(machine, "launch_gpu.sh", "jaxserve", "chat", SLURM_JOB_ID="1")
    assert done.stdout == "--kill-on-bad-exit=1 jaxserve chat\n"


def test_a_tpu_slice_gets_the_command_on_all_hosts(machine):
    command(machine, "gcloud", 'printf "%s\n" "$@"')
    options = ("--name", "slice", "--zone", "here", "--project", "ours")
    words = launch(machine, "launch_tpu.sh", *options, "jaxserve", "generate", "a prompt").stdout.splitlines()
    expected = "compute tpus tpu-vm ssh slice --zone here --worker all --project ours --command"
    assert " ".join(words[:-1]) == expected
    assert words[-1].endswith("exec jaxserve generate a\\ prompt ")


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("launch_gpu.sh", [], "there is no command to run"),
        ("launch_gpu.sh", ["jaxserve"], "give --hosts, or run it in a Slurm job"),
        ("launch_gpu.sh", ["--host", "a", "jaxserve"], "unknown option --host"),
        ("launch_gpu.sh", ["--hosts"], "--hosts needs a value"),
        ("launch_tpu.sh", ["jaxserve"], "give --name and --zone"),
        ("launch_tpu.sh", ["--name", "a", "--zone", "b"], "there is no command to run"),
        ("launch_tpu.sh", ["--name", "a", "--zone", "b", "jaxserve"], "gcloud is not on the PATH"),
    ],
)
def test_a_launcher_says_what_it_lacks(machine, script, arguments, sentence):
    done = launch(machine, script, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
