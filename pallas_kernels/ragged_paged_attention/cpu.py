"""Our own attention for float32 and bfloat16 on x86 with AVX-512: `cpu.cc`, called through XLA's FFI.

XLA's loops spend most of their time moving keys, scores and weights between small operations. Here a tile of queries
keeps them in the nearest cache. A row's decode is not split along its keys: on a processor with many more cores than
rows x KV heads, some stay idle.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.ragged_paged_attention import xla

_TARGETS = {"float32": "AttendFloat32", "bfloat16": "AttendBFloat16"}
_LIBRARY = native.Library(Path(__file__).with_name("cpu.cc"), tuple(_TARGETS.values()))


def attend(q_tnh, k_tkh, v_tkh, pages_pk2bh, table_sm, q_start_s, kv_len_s, *, scale, window, max_q_len, kv_dtype):
    """See `op.ragged_paged_attention`."""
    if reason := refusal(q_tnh.dtype, kv_dtype, q_tnh.shape[2]):
        raise NotImplementedError(reason)
    # A program may be compiled here for another platform, ahead of time.
    return jax.lax.platform_dependent(
        q_tnh,
        k_tkh.astype(kv_dtype),
        v_tkh.astype(kv_dtype),
        pages_pk2bh,
        *(ids.astype(jnp.int32) for ids in (table_sm, q_start_s, kv_len_s)),
        cpu=functools.partial(_call, target=native.target(_TARGETS[str(kv_dtype)]), scale=scale, window=window),
        default=functools.partial(xla.attend, scale=scale, window=window, max_q_len=max_q_len, kv_dtype=kv_dtype),
    )


def refusal(dtype: jnp.dtype, kv_dtype: jnp.dtype, head_size: int) -> str:
    """Why queries of a type over a pool of another cannot be attended here, or nothing."""
    if dtype != kv_dtype or str(dtype) not in _TARGETS:
        return "only a float32 model over a float32 pool, or bfloat16 over bfloat16"
    if head_size * dtype.itemsize % 4:
        return "only even head sizes in bfloat16"
    return native.refusal(_LIBRARY)


def _call(q_tnh, k_tkh, v_tkh, pages_pk2bh, table_sm, q_start_s, kv_len_s, *, target, scale, window):
    results = (
        jax.ShapeDtypeStruct(q_tnh.shape, q_tnh.dtype),
        jax.ShapeDtypeStruct(pages_pk2bh.shape, pages_pk2bh.dtype),
    )
    call = jax.ffi.ffi_call(target, results, input_output_aliases={3: 1})
    pool_and_ids = (pages_pk2bh, table_sm, q_start_s, kv_len_s)
    return tuple(call(q_tnh, k_tkh, v_tkh, *pool_and_ids, scale=np.float32(scale), window=np.int64(window or 0)))
