"""What the Triton backend launches for a call, and what compilers make of it, for GPUs that are not here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import cubin
from jaxserve.pallas_kernels.ragged_paged_attention import triton
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows

Arrays = dict[str, jax.ShapeDtypeStruct]  # as `cases.shapes_of` gives them, and the options beside them


def planned(
    chip: triton.Chip, arrays: Arrays, options: dict[str, Any]
) -> list[tuple[triton.Launch, list[jax.ShapeDtypeStruct | int]]]:
    """The launches of a call, and their arguments in order."""
    launches = []

    def record(launch: triton.Launch, inputs, integers, updated: int, created):
        results = [*inputs[len(inputs) - updated :], *created]
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, *results)]
        launches.append((launch, [*arguments[: len(inputs)], *integers, *arguments[len(inputs) :]]))
        return [jnp.zeros(x.shape, x.dtype) for x in results]

    jax.eval_shape(functools.partial(_attend, chip, record, options), arrays)
    return launches


def compiled(
    chip: triton.Chip, arrays: Arrays, options: dict[str, Any]
) -> dict[str, tuple[triton.Launch, cubin.Cubin]]:
    """Each kernel of a call, by name, as NVIDIA's compiler leaves it."""
    done = {}
    for launch, arguments in planned(chip, arrays, options):
        made = cubin.compile_for(
            chip.capability,
            triton.kernel(launch),
            [x if isinstance(x, int) else cubin.type_name(x.dtype) for x in arguments],
            {"shape": launch.shape},
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        done[launch.kernel] = (launch, made)
    return done


def lowered(chip: triton.Chip, arrays: Arrays, options: dict[str, Any]) -> jax.stages.Lowered:
    """The call as jax-triton hands it to XLA, with the pool donated. jax-triton needs JAX's CUDA plugin, but no GPU."""

    def call(pool, rest):
        run = functools.partial(triton.run, chip.capability)
        done = _attend(chip, run, options, {"pages_pkbd": pool} | rest)
        return done.out_tnh, done.pages_pkbd, done.lse_tn

    rest = dict(arrays)
    pool = rest.pop("pages_pkbd")
    return jax.jit(call, donate_argnums=0).trace(pool, rest).lower(lowering_platforms=("cuda",))


def _attend(chip: triton.Chip, call: triton.Call, options: dict[str, Any], arrays) -> Attended:
    pages = arrays["pages_pkbd"]
    known = {"window": None, "soft_cap": None, "max_q_len": None, "kv_dtype": pages.dtype, "wants_lse": False}
    return triton.attend_on(
        chip,
        call,
        arrays["q_tnh"],
        arrays["k_tkh"],
        arrays["v_tkh"],
        pages,
        Rows(arrays["table_sm"], arrays["q_start_s"], arrays["kv_len_s"]),
        Extras(arrays.get("sinks_n"), arrays.get("kv_scale_2k")),
        Options(**(known | options)),
    )
