"""The pool on the device: as large as the planner thinks, and wide enough for the chip."""

import jax
import jax.numpy as jnp
import pytest

from jaxserve.models import kv
from jaxserve.models.config import from_hf
from tests.models import toy


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_a_pool_takes_what_is_planned(platform: str, head_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv, "target_platform", lambda: platform)
    cfg = from_hf(toy.CASES["llama3"]["config"] | {"head_dim": head_size})
    pool = jax.eval_shape(lambda: kv.empty_pages(cfg, 7, 16, jnp.dtype("bfloat16"))).pages_pkbd
    assert pool.size * pool.dtype.itemsize == 7 * kv.block_bytes(cfg, 16, jnp.dtype("bfloat16"))
    assert pool.shape[-1] == (256 if platform == "tpu" and head_size > 64 else 2 * head_size)
