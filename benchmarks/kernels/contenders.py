"""Implementations of attention, ours and others', each as a loop of calls that can be timed.

Others read contiguous keys and values of equal length and do not store new ones; ours read pages and store. Both share one
set of numbers, so that their results can be compared.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.scenario import CACHED_BYTES, DTYPE, Inputs, Scenario
from benchmarks.kernels.timing import Loop
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention


class Contender:
    """`seconds` runs it once more and says how long a call took; `result` is what the last call gave: f32[t n h], without
    the first head of the first token, whose query the loop writes into."""

    def __init__(self, loop: Loop, seconds: Callable[[], float]):
        self.seconds, self.loop = seconds, loop

    @property
    def result(self) -> np.ndarray:
        assert self.loop.out is not None
        return _without_first(self.loop.out)


class Pool:
    """The pages, handed from one run to the next: a run may write into them."""

    def __init__(self, pages_pkbd: jax.Array):
        self.pages_pkbd = pages_pkbd


def ours(impl: str, scenario: Scenario, inputs: Inputs, pool: Pool, number: int) -> Contender:
    """One of our backends.

    Raises: NotImplementedError, if it refuses; RuntimeError, if the compiled program copies the pool.
    """
    max_q_len = 1 if scenario.is_decode else None
    scale = scenario.shape.head_size**-0.5

    def call(q_tnh, pages_pkbd, fixed):
        rows, k_tkh, v_tkh = fixed
        done = ragged_paged_attention(
            q_tnh, k_tkh, v_tkh, pages_pkbd, **rows, scale=scale, max_q_len=max_q_len, impl=impl
        )
        return done.out_tnh, done.pages_pkbd

    q_tnh = inputs.q_btnh.reshape(-1, *inputs.q_btnh.shape[2:])
    loop = Loop(call, q_tnh, pool.pages_pkbd, (inputs.rows, inputs.k_tkh, inputs.v_tkh), number)
    is_large = scenario.is_decode and pool.pages_pkbd.nbytes >= CACHED_BYTES and jax.default_backend() == "gpu"
    if is_large and loop.temp_bytes > pool.pages_pkbd.nbytes / 2:
        raise RuntimeError(f"{loop.temp_bytes / 1e9:.1f} GB besides arguments and results: is the pool copied?")

    def seconds() -> float:
        took_s, pool.pages_pkbd = loop.seconds(pool.pages_pkbd)
        return took_s

    return Contender(loop, seconds)


def exact(scenario: Scenario, inputs: Inputs) -> np.ndarray:
    """As `Contender.result`: JAX's own formula with all numbers in float32. Needs memory for all scores."""
    call, lengths = _jax_nn("xla", scenario, inputs)
    numbers = (x.astype(jnp.float32) for x in (inputs.q_btnh, inputs.k_bskh, inputs.v_bskh))
    with jax.default_matmul_precision("highest"):
        return _without_first(jax.jit(call)(*numbers, lengths))


def cudnn(scenario: Scenario, inputs: Inputs, number: int) -> Contender:
    """cuDNN through JAX."""
    return _dense(*_jax_nn("cudnn", scenario, inputs), scenario, inputs, number)


def jax_xla(scenario: Scenario, inputs: Inputs, number: int) -> Contender:
    """JAX's own formula, for rehearsals."""
    return _dense(*_jax_nn("xla", scenario, inputs), scenario, inputs, number)


def _jax_nn(implementation: Any, scenario: Scenario, inputs: Inputs) -> tuple[Callable[..., Any], Any]:
    """The call, and the lengths that it takes after queries, keys and values."""
    lengths = {}
    if scenario.is_ragged:
        queries_s = jnp.full(scenario.batch, scenario.queries, jnp.int32)
        lengths = {"query_seq_lengths": queries_s, "key_value_seq_lengths": inputs.rows["kv_len_s"]}

    def attend(q, k, v, lengths):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=not scenario.is_decode, implementation=implementation, **lengths
        )

    return attend, lengths


def tokamax(scenario: Scenario, inputs: Inputs, number: int) -> Contender:
    """Its own kernels only; by default it would fall back to XLA. Source: github.com/openxla/tokamax, `attention/api.py`."""
    if not importlib.util.find_spec("tokamax"):
        raise NotImplementedError("not installed")
    import tokamax as library

    kernels = ("mosaic", "triton") if jax.default_backend() == "gpu" else ("xla",)
    lengths = {"key_value_seq_lengths": inputs.rows["kv_len_s"]} if scenario.is_ragged else {}

    def attend(q, k, v, lengths):
        return library.dot_product_attention(
            q, k, v, is_causal=not scenario.is_decode, implementation=kernels, **lengths
        )

    return _dense(attend, lengths, scenario, inputs, number)


def _dense(attend: Callable[..., Any], lengths: Any, scenario: Scenario, inputs: Inputs, number: int) -> Contender:
    _needs_whole(scenario)
    fixed = (inputs.k_bskh, inputs.v_bskh, lengths)
    loop = Loop(lambda q, state, fixed: (attend(q, *fixed), state), inputs.q_btnh, (), fixed, number)
    return Contender(loop, lambda: loop.seconds(())[0])


def _without_first(out: jax.Array) -> np.ndarray:
    result = np.array(out, np.float32).reshape(-1, *out.shape[-2:])
    result[0, 0] = 0.0
    return result


def _needs_whole(scenario: Scenario) -> None:
    if scenario.queries not in (1, scenario.context):
        raise NotImplementedError("its causal mask begins at the first key: no chunks of prompts")


JAX_PEERS = {"cudnn": cudnn, "tokamax": tokamax}
TORCH_PEERS = ("torch sdpa", "torch flex")


class Torch:
    """A process of its own with torch, which holds the device at the same time and works when asked.

    Raises: NotImplementedError, if there is no torch that sees the device.
    """

    def __init__(self, python: str = sys.executable):
        worker = Path(__file__).with_name("torch_attention.py")
        hidden = "PYTHONPATH" if python != sys.executable else ""  # another environment has packages of its own
        self._process = subprocess.Popen(
            [python, worker, "cuda" if jax.default_backend() == "gpu" else "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != hidden},
        )
        self._say({"what": "begin"})

    def prepare(self, name: str, scenario: Scenario, number: int) -> "TorchContender":
        """Compile and warm up.

        Raises: NotImplementedError, with the reason, if torch cannot.
        """
        _needs_whole(scenario)
        if scenario.is_ragged:
            raise NotImplementedError("a mask for lengths would take its slow path")
        shape = scenario.shape
        size = {"batch": scenario.batch, "queries": scenario.queries, "context": scenario.context}
        heads = {"heads": shape.num_heads, "kv_heads": shape.num_kv_heads, "head_size": shape.head_size}
        answer = self._say(
            {"what": "prepare", "name": name, "dtype": DTYPE.name, "number": number, "size": size | heads}
        )
        return TorchContender(self, name, answer["compile_s"])

    def seconds(self, name: str) -> float:
        """Of one call."""
        return self._say({"what": "run", "name": name})["seconds"]

    def clear(self) -> None:
        """Give the device's memory back, if the process still lives."""
        with contextlib.suppress(NotImplementedError):
            self._say({"what": "clear"})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _say(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotImplementedError("its process is dead") from None
        for line in self._process.stdout:
            if line.startswith('{"'):
                answer = json.loads(line)
                if "refusal" in answer:
                    raise NotImplementedError(answer["refusal"])
                return answer
        raise NotImplementedError("its process died")


class TorchContender:
    """As `Contender`, in the other process; results stay there."""

    def __init__(self, torch: Torch, name: str, compile_s: float):
        self._torch, self._name, self.compile_s = torch, name, compile_s

    def seconds(self) -> float:
        """Of one call."""
        return self._torch.seconds(self._name)
