"""The device half of the KV store: one pool of pages for all layers. Only this file and the kernels know its layout.

A *block* is `block_size` consecutive tokens of one sequence over all layers (what `jaxserve.kv` counts); a *page* is one
layer's part of it. Page index = block * num_layers + layer, so that a block is one contiguous piece of memory.
"""

import dataclasses
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.platform import target_platform

T = TypeVar("T")  # what the tree holds: an array, a shape, a sharding


POOL_AXES = ("replica", "pool_heads", None, None)  # logical axes of the pool
BLOCKS_AXES = ("replica", None, "pool_heads", None, None)  # ... and of blocks that were taken out of it


@struct.dataclass
class KVPages(Generic[T]):
    """`[page, kv head, slot in page, key and value side by side]`: one head's part of a page is one contiguous read."""

    pages_pkbd: T  # of `dtype`, or unsigned integers of its width
    num_layers: int = struct.field(pytree_node=False)
    dtype: jnp.dtype = struct.field(pytree_node=False)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.pages_pkbd.shape[2]  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.pages_pkbd.shape[0] // self.num_layers  # pyright: ignore[reportAttributeAccessIssue]


def pool_head_size(head_size: int, platform: str | None = None) -> int:
    """Numbers that a head's key, or its value, takes in the pool. On TPU both together fill whole lanes: of a narrower pool
    XLA would keep the pages in lanes, and turn all of it around for the kernels and back."""
    return -(-head_size // 64) * 64 if (platform or target_platform()) == "tpu" else head_size


def block_bytes(cfg: ModelConfig, block_size: int, dtype: jnp.dtype, platform: str | None = None) -> int:
    """Bytes of one block over all layers. `platform`: where it is to lie; None: where programs are traced for."""
    values = 2 * cfg.num_layers * cfg.num_kv_heads * pool_head_size(cfg.head_size, platform)
    return values * block_size * jnp.dtype(dtype).itemsize


def stored_dtype(dtype: jnp.dtype, as_bits: bool) -> jnp.dtype:
    """The array type of a pool of a dtype. `as_bits`: narrow floats as unsigned integers, which XLA on CPU can update in
    place."""
    return jnp.dtype(f"uint{dtype.itemsize * 8}") if as_bits and dtype.itemsize < 4 else dtype


def empty_pages(
    cfg: ModelConfig, num_blocks: int, block_size: int, dtype: jnp.dtype, as_bits: bool = False
) -> KVPages[jax.Array]:
    """A zeroed pool, of `stored_dtype`."""
    shape = (num_blocks * cfg.num_layers, cfg.num_kv_heads, block_size, 2 * pool_head_size(cfg.head_size))
    dtype = jnp.dtype(dtype)
    pages = jnp.zeros(shape, stored_dtype(dtype, as_bits))
    return KVPages(pages_pkbd=pages, num_layers=cfg.num_layers, dtype=dtype)


def copy_blocks(kv: KVPages[jax.Array], source_c: Int[Array, " c"], target_c: Int[Array, " c"]) -> KVPages[jax.Array]:
    """Copy whole blocks, all layers. Pairs whose target lies past the pool are dropped (padding)."""
    blocks = kv.pages_pkbd.reshape(kv.num_blocks, kv.num_layers, *kv.pages_pkbd.shape[1:])
    blocks = blocks.at[target_c].set(blocks[source_c], mode="drop")
    return dataclasses.replace(kv, pages_pkbd=blocks.reshape(kv.pages_pkbd.shape))


def take_blocks(kv: KVPages[jax.Array], source_c: Int[Array, " c"]) -> jax.Array:
    """Whole blocks, all layers, as an array `[block, layer, kv head, slot, key and value]` of their own."""
    return kv.pages_pkbd.reshape(kv.num_blocks, kv.num_layers, *kv.pages_pkbd.shape[1:])[source_c]


def put_blocks(kv: KVPages[jax.Array], blocks_clhbd: jax.Array, target_c: Int[Array, " c"]) -> KVPages[jax.Array]:
    """Write what `take_blocks` took. Blocks whose target lies past the pool are dropped (padding)."""
    blocks = kv.pages_pkbd.reshape(kv.num_blocks, kv.num_layers, *kv.pages_pkbd.shape[1:])
    blocks = blocks.at[target_c].set(blocks_clhbd, mode="drop")
    return dataclasses.replace(kv, pages_pkbd=blocks.reshape(kv.pages_pkbd.shape))
