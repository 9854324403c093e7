"""Our own attention for float32 and bfloat16 on x86 with AVX-512: `cpu.cc`, called through XLA's FFI.

XLA's loops spend most of their time moving keys, scores and weights between small operations. Here a tile of queries
keeps them in the nearest cache. A row's decode is not split along its keys: on a processor with many more cores than
rows x KV heads, some stay idle.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.platform import target_platform
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows

_TARGETS = {"float32": "AttendFloat32", "bfloat16": "AttendBFloat16"}
_LIBRARY = native.Library(Path(__file__).with_name("cpu.cc"), tuple(_TARGETS.values()))


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    if reason := refusal(q_tnh.dtype, options.kv_dtype, q_tnh.shape[2]):
        raise NotImplementedError(reason)
    if extras.kv_scale_2k is not None:
        raise NotImplementedError("no scales")
    num_tokens, num_heads, _ = q_tnh.shape
    results = (
        jax.ShapeDtypeStruct(q_tnh.shape, q_tnh.dtype),
        jax.ShapeDtypeStruct(pages_pkbd.shape, pages_pkbd.dtype),
        jax.ShapeDtypeStruct((num_tokens if options.wants_lse else 0, num_heads), jnp.float32),
    )
    call = jax.ffi.ffi_call(native.target(_TARGETS[str(options.kv_dtype)]), results, input_output_aliases={3: 1})
    kv = (k_tkh.astype(options.kv_dtype), v_tkh.astype(options.kv_dtype))
    ids = (x.astype(jnp.int32) for x in rows)
    sinks_n = jnp.zeros(0, jnp.float32) if extras.sinks_n is None else extras.sinks_n.astype(jnp.float32)
    out_tnh, pages_pkbd, lse_tn = call(
        q_tnh,
        *kv,
        pages_pkbd,
        *ids,
        sinks_n,
        scale=np.float32(options.scale),
        soft_cap=np.float32(options.soft_cap or 0),
        window=np.int64(options.window or 0),
    )
    return Attended(out_tnh, pages_pkbd, lse_tn if options.wants_lse else None)


def refusal(dtype: jnp.dtype, kv_dtype: jnp.dtype, head_size: int) -> str:
    """Why queries of a type over a pool of another cannot be attended here, or nothing."""
    if target_platform() != "cpu":
        return "only CPU"
    if dtype != kv_dtype or str(dtype) not in _TARGETS:
        return "only a float32 model over a float32 pool, or bfloat16 over bfloat16"
    if head_size * dtype.itemsize % 4:
        return "only even head sizes in bfloat16"
    return native.refusal(_LIBRARY)
