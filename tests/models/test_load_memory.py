"""Loading streams: the host never holds much more than the weights."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import toy

MEASURE = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from jaxserve.models import llama, weights
from jaxserve.models.registry import read_config
jax.devices()
folder = Path(sys.argv[1])
specs = llama.abstract(read_config(folder))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = jax.block_until_ready(weights.load(folder, specs, jnp.dtype("float32")))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
biggest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
print((after - before) * 1024, weights.nbytes(specs, jnp.dtype("float32")), biggest)
"""


@pytest.mark.slow
def test_peak_memory_is_the_weights_plus_one_tensor(tmp_path: Path):
    config = toy.CASES["llama3"]["config"] | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    toy.write_checkpoint(tmp_path, config | {"head_dim": 64, "vocab_size": 16000}, 0)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, weights, biggest = map(int, done.stdout.split())
    assert weights > 400e6, "too small to measure"
    assert grown < weights + biggest + 40e6  # 40 MB: what the allocator and the reader keep for themselves
