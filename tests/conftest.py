"""Test settings. JAX reads its flags from the environment, so they are set here, before anything imports it."""

import gc
import getpass
import itertools
import os
import tempfile
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings

FLAGS = {
    "JAX_PLATFORMS": "cpu",
    # A silent broadcast or up-cast in a model is a bug that a comparison with a loose tolerance hides.
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    # A second run of the tests finds its compiled programs; the folder may be deleted at any time.
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"jaxserve-test-cache-{getpass.getuser()}"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    # Nearly all that the tests cost is compiling, for programs that run once: half of it is saved so. See `optimized`.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    # No test may reach the network by accident; tests marked `network` take this away.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
XLA_FLAGS = {"--xla_force_host_platform_device_count": 8, "--xla_cpu_parallel_codegen_split_count": 1}
EMITTERS = "--xla_cpu_use_fusion_emitters"
if metadata.version("jaxlib").startswith("0.10."):  # 0.11 has no others, and XLA ends at a flag that it does not know
    XLA_FLAGS[EMITTERS] = "false"

for name, value in FLAGS.items():
    os.environ.setdefault(name, value)
for name, value in XLA_FLAGS.items():
    if name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {name}={value}".strip()

# In CI the same examples each time; by hand new ones. No deadline: the first example may compile.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("dev", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker has a long one left when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs():
    """Drop compiled programs now and then. Each takes six memory maps, operations called outside of a jitted function
    compile one for every shape, and beyond 65,530 maps Linux gives a process no more: LLVM aborts."""
    yield
    if next(_tests) % 4 == 0 and _num_maps() > 15_000:
        import jax  # not at the top: the flags above come first

        jax.clear_caches()
        gc.collect()


def _num_maps() -> int:
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        return 0


@pytest.fixture
def optimized():
    """Programs are compiled as users have them, here and in processes that a test starts: for tests of what a compiler
    makes of them, and for those that load the TPU's, which ends at a flag of another version."""
    import jax  # not at the top: the flags above come first

    jax.devices()  # has read its flags
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(EMITTERS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", " ".join(flags))
        patch.delenv(option.upper(), raising=False)
        jax.config.update(option, False)
        yield
        jax.config.update(option, before)


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("native")


@pytest.fixture
def native_folder(compiled_folder):
    """Our C++ kernels are compiled into this folder when they are asked for, once for all tests."""
    from jaxserve.pallas_kernels import native  # not at the top: it imports jax

    native.enable(compiled_folder)
    yield compiled_folder
    native.enable(None)
