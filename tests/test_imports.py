"""Who imports whom, what an import costs, and that the wheel holds the tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST_CORE = ("errors", "config", "request", "step", "clock", "kv", "scheduler", "engine", "sim.run", "cli.main")
DEVICE_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax")
PACKAGES = {"jaxserve": "jaxserve", "models": "jaxserve/models", "sharding": "jaxserve/sharding"} | {
    "pallas_kernels": "jaxserve/pallas_kernels"
}


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter that knows nothing of pytest."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["jaxserve", *(f"jaxserve.{name}" for name in HOST_CORE)])
def test_host_side_imports_no_device_library(module):
    loaded = run_python(f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))").split()
    assert not set(loaded) & set(DEVICE_LIBRARIES)


def test_import_time_is_printed():
    timed = "import time; start = time.perf_counter(); import jaxserve; print(time.perf_counter() - start)"
    seconds = float(run_python(timed))
    print(f"import jaxserve: {seconds * 1e3:.0f} ms")


def test_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_to_the_folders():
    for name in ("models", "sharding", "pallas_kernels"):
        link = ROOT / "jaxserve" / name
        assert link.is_symlink(), f"{link} must be a link; a checkout without link support cannot work"
        assert link.resolve() == ROOT / name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_the_tree(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    in_tree = {
        f"{target}/{path.relative_to(ROOT / folder)}"
        for folder, target in PACKAGES.items()
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert in_wheel == in_tree
    assets = {p.relative_to(ROOT).as_posix() for p in (ROOT / "jaxserve" / "assets").rglob("*") if p.is_file()}
    assert assets <= set(zipfile.ZipFile(wheel).namelist())
