"""What the engine costs around a step: batch-32 decode through the whole engine against the bare jitted step.

    python benchmarks/engine/overhead.py tiny
    python benchmarks/engine/overhead.py FOLDER --dtype bfloat16

The bare step is the same program compiled from the same function and shapes, called in a loop with inputs that are made
once; each call waits for the one before. Engine and bare loop take turns (A B A B). Wanted: at most 10 % more.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append

from jaxserve.build import build
from jaxserve.config import EngineConfig
from jaxserve.executor.inputs import empty_inputs
from jaxserve.executor.ladder import Rung
from jaxserve.executor.program import DeviceState, run_step
from jaxserve.model_source import find_model
from jaxserve.models import weights
from jaxserve.models.kv import empty_pages
from jaxserve.models.registry import family_of, read_config
from jaxserve.request import Request, SamplingParams
from jaxserve.sampling.sampler import empty_state

BATCH, CONTEXT, STEPS, BLOCK, MAX_LEN = 32, 128, 32, 32, 512
RESULTS = Path(__file__).resolve().parent.parent / "results" / "overhead.jsonl"


def bare_step(folder: Path, dtype: str) -> Callable[[], float]:
    """A function that runs `STEPS` decode steps of the compiled program and returns seconds per step."""
    cfg, kind = read_config(folder), jnp.dtype(dtype)
    family, width = family_of(cfg), MAX_LEN // BLOCK
    params = weights.load(folder, family.abstract(cfg), kind)
    kv = empty_pages(cfg, BATCH * width, BLOCK, kind, as_bits=jax.default_backend() == "cpu")
    state = DeviceState(kv, empty_state(BATCH, cfg.vocab_size))
    inputs = empty_inputs(Rung(BATCH, BATCH, True), table_width=width, num_slots=BATCH, vocab_size=cfg.vocab_size)
    batch = dataclasses.replace(
        inputs.batch,
        q_start_s=np.arange(BATCH + 1, dtype=np.int32),
        kv_len_s=np.full(BATCH, CONTEXT + STEPS, np.int32),  # the middle of the engine's run
        table_sm=np.arange(BATCH * width, dtype=np.int32).reshape(BATCH, width),
    )
    inputs = dataclasses.replace(inputs, batch=batch)
    step = jax.jit(functools.partial(run_step, family, cfg, None), donate_argnums=1)
    compiled = step.lower(params, state, inputs).compile()

    def run() -> float:
        nonlocal state
        begin_s = time.perf_counter()
        for _ in range(STEPS):
            outputs, state = compiled(params, state, inputs)
            np.asarray(outputs.token_s)
        return (time.perf_counter() - begin_s) / STEPS

    return run


def engine_step(folder: Path, dtype: str) -> Callable[[], float]:
    """A function that decodes such a batch through the engine, text included, and returns seconds per step."""
    config = EngineConfig(
        dtype=dtype,
        max_num_seqs=BATCH,
        max_model_len=MAX_LEN,
        num_kv_blocks=BATCH * MAX_LEN // BLOCK,
        block_size=BLOCK,
        enable_prefix_caching=False,
        progress=False,
    )
    engine = build(folder, config).engine
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=3 * STEPS, ignore_eos=True)

    def run() -> float:
        names = {f"request-{i}" for i in range(BATCH)}
        for name in names:
            prompt = tuple(rng.integers(0, 500, CONTEXT).tolist())
            engine.add(Request(request_id=name, prompt_token_ids=prompt, params=params))
        while names:  # until every row decodes
            names -= {event.request_id for event in engine.step()}
        begin_s = time.perf_counter()
        for _ in range(STEPS):
            assert len(engine.step()) == BATCH
        seconds = (time.perf_counter() - begin_s) / STEPS
        while engine.has_work:
            engine.step()
        return seconds

    return run


def main(argv: list[str] | None = None) -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(argv)
    folder = find_model(options.model)
    engine = engine_step(folder, options.dtype)  # first: building it chooses the kernels that both use
    bare = bare_step(folder, options.dtype)
    bare(), engine()
    pairs = [(engine(), bare()) for _ in range(options.repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    names = ("through the engine", "bare jitted step")
    case = {"model": Path(options.model).name, "dtype": options.dtype, "batch": BATCH, "jax": jax.__version__}
    RESULTS.parent.mkdir(exist_ok=True)
    for name, values in zip(names, zip(*pairs, strict=True), strict=True):
        print(f"{name}: {1e3 * statistics.median(values):.2f} ms a step")
        append(RESULTS, case | {"what": name}, "step time", "s", values, ratio_engine_to_bare=round(ratio, 3))
    print(f"engine / bare, median of {len(pairs)} pairs: {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
