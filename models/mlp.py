"""The feed-forward part of a dense layer: a gated product, and the way back (SwiGLU, arXiv 2002.05202)."""

from typing import Generic, TypeVar

import jax
from flax import struct
from jaxtyping import Array, Float

from jaxserve.models.layers import joined_linear
from jaxserve.models.spec import Part, WeightSpec
from jaxserve.pallas_kernels.matmul.op import gated_matmul

T = TypeVar("T")  # what the tree holds: jax.Array, WeightSpec, a sharding, ...


@struct.dataclass
class Mlp(Generic[T]):
    """Weights `[out, in]`; gate and up lie in one array."""

    gate_up_cfe: T  # c = 2: gate, up
    gate_up_bias_cf: T | None
    down_ef: T
    down_bias_e: T | None


def feed_forward(mlp: Mlp[jax.Array], x_te: Float[Array, "t e"]) -> Float[Array, "t e"]:
    """`down @ (silu(gate @ x) * (up @ x))` of every token."""
    return joined_linear(gated(mlp, x_te), mlp.down_ef, mlp.down_bias_e, over="ffn")


def gated(mlp: Mlp[jax.Array], x_te: Float[Array, "t e"]) -> Float[Array, "t f"]:
    """The inner activations, before the way back."""
    _, ffn, embed_size = mlp.gate_up_cfe.shape
    bias = None if mlp.gate_up_bias_cf is None else mlp.gate_up_bias_cf.reshape(2 * ffn)
    return gated_matmul(x_te, mlp.gate_up_cfe.reshape(2 * ffn, embed_size), bias)


def abstract(prefix: str, embed_size: int, ffn_size: int, *, has_bias: bool = False) -> Mlp[WeightSpec]:
    """The weights as specs; `prefix` is what their checkpoint names begin with, final dot included."""
    e, f = embed_size, ffn_size

    def gate_up(shape: tuple[int, ...], axes: tuple[str | None, ...], suffix: str) -> WeightSpec:
        parts = (
            Part(name=f"{prefix}gate_proj.{suffix}", where=(0,)),
            Part(name=f"{prefix}up_proj.{suffix}", where=(1,)),
        )
        return WeightSpec(shape=shape, axes=axes, parts=parts, fan_in=e)

    def down(shape: tuple[int, ...], axes: tuple[str | None, ...], suffix: str, fan_in: int) -> WeightSpec:
        return WeightSpec(shape=shape, axes=axes, parts=(Part(name=f"{prefix}down_proj.{suffix}"),), fan_in=fan_in)

    return Mlp(
        gate_up_cfe=gate_up((2, f, e), (None, "ffn", "embed"), "weight"),
        gate_up_bias_cf=gate_up((2, f), (None, "ffn"), "bias") if has_bias else None,
        down_ef=down((e, f), ("embed", "ffn"), "weight", f),
        down_bias_e=down((e,), ("embed",), "bias", e) if has_bias else None,
    )
