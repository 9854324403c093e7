"""The whole engine on the device: tokens equal to those of a CPU, and the speed of Llama-3.1-8B with random weights."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxserve.errors import ConfigError
from jaxserve.models.published import MODELS
from scripts.gpu.children import Result

ROOT = Path(__file__).resolve().parents[2]
TOKENS, THROUGHPUT = "tokens", "throughput"
PROMPTS = (
    "def add(a, b):",
    "import os\n",
    "class Stack:\n    def push(self",
    "for i in range(10):\n    print(",
    "a " * 300,
)
NUM_TOKENS = 48
# Few programs to compile; prompts in chunks, answers side by side, and less room than all of them want.
SMALL = {"max_model_len": 512, "num_kv_blocks": 24, "max_num_seqs": 4, "max_num_batched_tokens": 64}
MODEL = "llama-3.1-8b"
LEAST_MEMORY = 22 << 30  # bytes: 16 GB of weights, and a pool worth measuring

_SMALLER = {  # for rehearsals
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def items(backends: Sequence[str], dtypes: Sequence[str] = ("float32", "bfloat16")) -> list[str]:
    """One for each backend and dtype, then the measurement."""
    return [*(f"{TOKENS} {dtype} | {name}" for dtype in dtypes for name in backends), THROUGHPUT]


class Run:
    """Runs items; the CPU's tokens are computed once for each dtype."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._expected = args, {}

    def __call__(self, item: str) -> Iterator[Result]:
        """One item."""
        if item == THROUGHPUT:
            yield throughput(is_quick=self._args.quick, is_rehearsal=self._args.rehearse)
            return
        what, backend = item.split(" | ")
        dtype = what.removeprefix(TOKENS).strip()
        try:
            found = greedy(dtype, backend)
        except ConfigError as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            yield Result(what, backend, "refused", str(error.__cause__), {})
            return
        if dtype not in self._expected:
            self._expected[dtype] = greedy_on_cpu(dtype)
        share = equal_share(found, self._expected[dtype])
        # In bfloat16 a rounding may decide between two likely tokens: what differs then is told, and is no fault.
        state = "measured" if dtype != "float32" else "passed" if share == 1 else "failed"
        text = f"{share:.0%} of the tokens before the first difference from the CPU's"
        yield Result(what, backend, state, text, {"equal_share": share})

    def close(self) -> None:
        """Nothing is left to end."""


def greedy(dtype: str, backend: str | None) -> list[list[int]]:
    """What the bundled model answers, on this process's platform, with exact products in float32."""
    import jax

    from jaxserve import LLM, SamplingParams

    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else "default")
    llm = LLM("tiny", dtype=dtype, attention_backend=backend, progress=False, **SMALL)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [list(out.outputs[0].token_ids) for out in llm.generate(list(PROMPTS), params, progress=False)]


def greedy_on_cpu(dtype: str) -> list[list[int]]:
    """The same in a process that sees no GPU, with the backend that a CPU takes by itself."""
    code = f"import json; from scripts.gpu import engine; print(json.dumps(engine.greedy({dtype!r}, None)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise OSError(f"the engine fails on the CPU: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def equal_share(found: list[list[int]], expected: list[list[int]]) -> float:
    """Of the tokens, those before the first difference of their answer."""
    equal = 0
    for ours, theirs in zip(found, expected, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=True))
        equal += next((i for i, (a, b) in pairs if a != b), len(ours))
    return equal / sum(map(len, expected))


def throughput(*, is_quick: bool, is_rehearsal: bool) -> Result:
    """`jaxserve bench throughput` in a process of its own, with all of the device's memory."""
    if not is_rehearsal and (memory := device_memory()) < LEAST_MEMORY:
        reason = f"the device has {memory / 2**30:.0f} GiB; {LEAST_MEMORY / 2**30:.0f} are needed"
        return Result(THROUGHPUT, "jaxserve", "skipped", reason, {})
    size = ("4", "16", "4") if is_rehearsal else ("64", "512", "64") if is_quick else ("256", "1024", "128")
    flags = ["--load-format", "dummy", "--dtype", "bfloat16", "--max-num-seqs", "2" if is_rehearsal else "128"]
    flags += ["--max-model-len", "64" if is_rehearsal else "2048", "--no-progress"]
    flags += ["--max-num-batched-tokens", "16"] if is_rehearsal else []
    for name, value in zip(("--num-prompts", "--input-len", "--output-len"), size, strict=True):
        flags += [name, value]
    with tempfile.TemporaryDirectory() as folder:
        config = MODELS[MODEL] | (_SMALLER if is_rehearsal else {})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "jaxserve", "bench", "throughput", "--model", folder, "--json", str(figures)]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_PYTHON_CLIENT_PREALLOCATE"}
        done = subprocess.run(
            [*command, *flags],
            env=environment | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,  # a dozen programs of 32 layers to compile
        )
        if done.returncode or not figures.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Result(THROUGHPUT, "jaxserve", "failed", last[:300], {})
        numbers = json.loads(figures.read_text())
    del numbers["model"], numbers["what"]
    return Result(THROUGHPUT, "jaxserve", "measured", " ".join(flags), numbers)


def device_memory() -> int:
    """Bytes that JAX may use of the device, asked in another process: this one must leave it alone."""
    code = "import jax; print((jax.devices()[0].memory_stats() or {}).get('bytes_limit', 0))"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return int(done.stdout.split()[-1])
