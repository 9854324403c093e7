"""The products of a layer of experts on this machine: our loop over the experts that have tokens, and XLA's `ragged_dot`.

    python benchmarks/kernels/grouped_matmul.py
    python benchmarks/kernels/grouped_matmul.py --model qwen3-30b-a3b --batch 8 --dtype bfloat16

One call is both products of a layer (gate and up, then down) for a batch of tokens that are given to experts at random.
Implementations take turns; each is compiled and run once before. Wanted on CPU: at batch 8, 64 experts and 8 of them per
token, three times as fast as `ragged_dot`, whose cost there is that of all experts with all tokens.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append

from jaxserve.pallas_kernels.grouped_matmul.cases import MODELS, ModelShape, routed_sizes
from jaxserve.pallas_kernels.grouped_matmul.op import grouped_matmul

RESULTS = Path(__file__).resolve().parent.parent / "results" / "grouped_matmul.jsonl"


def layer(impl: str) -> Any:
    """Both products, jitted."""

    @jax.jit
    def run(x_me: jax.Array, gate_up_xoe: jax.Array, down_xef: jax.Array, sizes_x: jax.Array) -> jax.Array:
        gate_mf, up_mf = jnp.split(grouped_matmul(x_me, gate_up_xoe, sizes_x, x_me.dtype, impl=impl), 2, axis=-1)
        return grouped_matmul(gate_mf * up_mf, down_xef, sizes_x, impl=impl)

    return run


def make_inputs(shape: ModelShape, batch: int, dtype: str) -> tuple[jax.Array, ...]:
    """Rows in the order of experts, weights, and rows of each expert."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes_x = routed_sizes(batch, shape.num_experts, shape.per_token)
    shapes = (
        (batch * shape.per_token, shape.embed_size),
        (shape.num_experts, 2 * shape.ffn_size, shape.embed_size),
        (shape.num_experts, shape.embed_size, shape.ffn_size),
    )
    draws = [(jax.random.normal(k, s) * s[-1] ** -0.5).astype(dtype) for k, s in zip(keys, shapes, strict=True)]
    return *draws, jnp.asarray(sizes_x)


def measure(name: str, batch: int, dtype: str, repeats: int) -> None:
    """Time all implementations of one case, print and record."""
    shape, inputs = MODELS[name], make_inputs(MODELS[name], batch, dtype)
    layers = {impl: layer(impl) for impl in ("cpu", "xla")}
    results = {impl: np.asarray(run(*inputs)) for impl, run in layers.items()}
    error = float(np.abs(results["cpu"] - results["xla"]).max() / np.abs(results["xla"]).max())
    times: dict[str, list[float]] = {impl: [] for impl in layers}
    for _ in range(repeats):
        for impl, run in layers.items():
            begin_s = time.perf_counter()
            run(*inputs).block_until_ready()
            times[impl].append(time.perf_counter() - begin_s)
    ratio = statistics.median(x / c for x, c in zip(times["xla"], times["cpu"], strict=True))
    active = int((inputs[3] > 0).sum())
    read_bytes = active * (inputs[1][0].nbytes + inputs[2][0].nbytes)
    print(
        f"{name} {dtype} batch {batch}: {active} of {shape.num_experts} experts, "
        f"cpu {1e3 * statistics.median(times['cpu']):.2f} ms ({read_bytes / min(times['cpu']) / 1e9:.1f} GB/s at best), "
        f"xla {1e3 * statistics.median(times['xla']):.1f} ms, ratio {ratio:.1f}, difference {error:.1e}",
        flush=True,
    )
    for impl, values in times.items():
        append(
            RESULTS,
            {"model": name, "dtype": dtype, "batch": batch, "impl": impl, "platform": jax.default_backend()},
            "time of both products",
            "s",
            values,
            active_experts=active,
            ratio_xla_to_cpu=round(ratio, 2),
            difference=error,
            jax=jax.__version__,
            load_average=round(os.getloadavg()[0], 1),
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="64-experts", choices=MODELS)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    for dtype in args.dtype.split(","):
        for batch in map(int, args.batch.split(",")):
            measure(args.model, batch, dtype, args.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
