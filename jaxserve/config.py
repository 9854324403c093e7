"""Engine options: parsed and checked once, here, and trusted everywhere else. The only reader of the environment."""

import dataclasses
import difflib
import functools
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jaxserve.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
# One file each; a new one is found by being there.
SCHEDULING_POLICIES = tuple(
    sorted(path.stem for path in (Path(__file__).parent / "scheduler" / "policies").glob("[a-z]*.py"))
)
LOAD_FORMATS = ("auto", "dummy")
SEQUENCE_SCHEMES = ("auto", "ulysses", "gather", "ring", "bidirectional", "zigzag", "tokenring", "pass_q")
PREEMPTION_MODES = ("auto", "recompute", "swap")
MAX_NUM_SEQS = 4096


T = TypeVar("T")


def names_unknown_options(cls: type[T]) -> type[T]:
    """For dataclasses that users make: a keyword that does not exist is a ConfigError that suggests the nearest one."""
    known, init = [field.name for field in dataclasses.fields(cls)], cls.__init__  # pyright: ignore[reportArgumentType]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **options: Any) -> None:
        reject_unknown(options, known, what=f"{cls.__name__} option")
        init(self, *args, **options)

    cls.__init__ = checked
    return cls


def option(default: Any, text: str, choices: tuple[Any, ...] = ()) -> Any:
    """A dataclass field with the help text (and choices) that command-line flags are made from."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@names_unknown_options
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Every engine option, under vLLM's names where it has one. `None` means: chosen when the model is loaded."""

    dtype: str = option("auto", "number format of weights and activations; auto: the checkpoint's own", DTYPES)
    kv_cache_dtype: str = option(
        "auto", "number format of cached keys and values; auto: as dtype; fp8: float8_e4m3fn", (*DTYPES, "fp8")
    )
    load_format: str = option("auto", "auto: read safetensors; dummy: random weights made on the device", LOAD_FORMATS)
    max_model_len: int | None = option(None, "longest sequence in tokens, prompt and answer; default: the model's own")
    max_num_seqs: int = option(32, "most sequences running at once (on each replica)")
    max_num_batched_tokens: int | None = option(
        None,
        "token budget of one step (of each replica); default 512 on CPU, 2048 elsewhere, times sequence_parallel_size",
    )
    block_size: int = option(32, "tokens per KV block; a power of two from 8 to 256")
    num_kv_blocks: int | None = option(None, "blocks in the KV pool; default: what memory_utilization leaves")
    memory_utilization: float = option(0.9, "share of accelerator memory (on CPU: of half the free memory) to use")
    enable_prefix_caching: bool = option(True, "share the KV blocks of equal prompt beginnings")
    enable_chunked_prefill: bool = option(True, "split long prompts over steps and mix them with decodes")
    async_scheduling: bool = option(True, "plan and dispatch a step while the one before it runs")
    scheduling_policy: str = option("fcfs", "which request goes first", SCHEDULING_POLICIES)
    scheduling_options: Mapping[str, Any] | None = option(
        None, "options of the policy; its file in scheduler/policies/ lists them"
    )
    swap_space: float = option(
        0.0, "host memory in GiB (of each replica) that preempted sequences are swapped to; 0: none"
    )
    preemption_mode: str = option(
        "auto", "what becomes of who is preempted; auto: swapped if that is quicker", PREEMPTION_MODES
    )
    max_num_seqs_per_client: int | None = option(
        None, "most sequences of one client that run at once; default: no limit"
    )
    cost_model: str = option(
        "auto",
        "what steps take, for policies and swaps that ask: a file of scripts/calibrate.py; auto: by the kind of device",
    )
    attention_backend: str | None = option(None, "attention implementation by name; default: the first that fits")
    native_kernels: bool = option(True, "compile our C++ kernels for CPU, if a C++ compiler is there")
    seed: int = option(0, "seed of sampling for requests that bring none, and of dummy weights")
    tensor_parallel_size: int = option(1, "devices that share each layer's weights")
    data_parallel_size: int = option(1, "replicas of the weights, each with its own requests")
    sequence_parallel_size: int = option(1, "devices that share the tokens of a step")
    sequence_parallel_scheme: str = option(
        "auto", "how devices share the attention of a prompt that is computed in one step", SEQUENCE_SCHEMES
    )
    expert_parallel_size: int = option(1, "devices that share a layer's experts, and otherwise its weights")
    num_redundant_experts: int = option(
        0, "experts of each layer that are held twice, so that devices can share their load"
    )
    expert_rebalance_steps: int = option(0, "steps after which experts move to where recent loads want them; 0: never")
    quantization: str | None = option(None, "weight quantisation (none so far)")
    compilation_cache: str | None = option("auto", "folder of compiled programs kept between runs; auto, or none")
    progress: bool = option(True, "show a progress bar while the engine warms up")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ConfigError(f"{field.name}={value!r} must be one of {', '.join(map(str, choices))}")
            if field.type in (bool, "bool") and not isinstance(value, bool):
                raise ConfigError(f"{field.name}={value!r} must be True or False")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_kv_blocks"):
            value = getattr(self, name)
            optional = value is None and name != "max_num_seqs"
            if not optional and not (isinstance(value, int) and _is_int(value) and 1 <= value <= 1 << 30):
                raise ConfigError(f"{name}={value!r} must be a positive whole number")
        quota, options, swap_gib = self.max_num_seqs_per_client, self.scheduling_options, self.swap_space
        if quota is not None and not (_is_int(quota) and quota >= 1):
            raise ConfigError(f"max_num_seqs_per_client={quota!r} must be a positive whole number")
        if options is not None and not (isinstance(options, Mapping) and all(isinstance(key, str) for key in options)):
            raise ConfigError(f"scheduling_options={options!r:.80} must map names of options to values")
        if not isinstance(swap_gib, (int, float)) or isinstance(swap_gib, bool) or not 0 <= swap_gib <= 1 << 20:
            raise ConfigError(f"swap_space={swap_gib!r:.40} must be a number of GiB, 0 or more")
        if self.preemption_mode == "swap" and not swap_gib:
            raise ConfigError("preemption_mode='swap' needs host memory", remedy="Set swap_space to some GiB")
        if self.max_num_seqs > MAX_NUM_SEQS:
            raise ConfigError(f"max_num_seqs={self.max_num_seqs} must be at most {MAX_NUM_SEQS}")
        if not _is_int(self.block_size) or self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ConfigError(f"block_size={self.block_size!r} must be a power of two from 8 to 256")
        if not _is_int(self.seed) or not -(1 << 63) <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed!r:.40} must be a whole number that fits 64 bits")
        share = self.memory_utilization
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise ConfigError(f"memory_utilization={self.memory_utilization!r} must be above 0 and at most 1")
        if not isinstance(self.cost_model, str) or not self.cost_model:
            raise ConfigError(f"cost_model={self.cost_model!r:.80} must be a file, or 'auto'")
        for name in ("attention_backend", "compilation_cache"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a string or None")
        for name in ("tensor", "data", "sequence", "expert"):
            size = getattr(self, f"{name}_parallel_size")
            if not _is_int(size) or not 1 <= size <= 1 << 16:
                raise ConfigError(f"{name}_parallel_size={size!r} must be a positive whole number")
        for name in ("num_redundant_experts", "expert_rebalance_steps"):
            if not _is_int(getattr(self, name)) or not 0 <= getattr(self, name) <= 1 << 30:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number, 0 or more")
        if self.quantization is not None:
            raise ConfigError(f"quantization={self.quantization!r} is not supported yet", remedy="Leave it out")

    @property
    def max_running(self) -> int:
        """Sequences that all replicas together run at once, at most."""
        return self.max_num_seqs * self.data_parallel_size


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def nearest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known word most like a misspelt one, or None when nothing is near."""
    return next(iter(difflib.get_close_matches(word[:100], list(words), n=1, cutoff=likeness)), None)


def reject_unknown(names: Iterable[str], known: Iterable[str], *, what: str) -> None:
    """Raise ConfigError for the first name that is not known, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(name, known, 0.5)
            hint = f"Did you mean {near!r}" if near else f"Known: {', '.join(known)}"
            raise ConfigError(f"unknown {what} {name!r}", remedy=hint + ("?" if near else ""))


def from_options(cls: type[T], options: Mapping[str, Any] | None, *, what: str, **parts: Any) -> T:
    """A dataclass made of options that users gave by name, for `what`: "router 'd2lpm'".

    `parts` are no options; it gets those that it has a field for.

    Raises:
      ConfigError: no such option, or a value of the wrong type.
    """
    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    options = dict(options or {})
    reject_unknown(options, [field for field in fields if field not in parts], what=f"option of the {what}:")
    hints = get_type_hints(cls)
    for name, value in options.items():
        _check_type(what, name, value, hints[name])
    return cls(**options, **{part: value for part, value in parts.items() if part in fields})


def _check_type(what: str, option: str, value: Any, hint: Any) -> None:
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    plain = tuple(kind for kind in (get_origin(each) or each for each in allowed) if isinstance(kind, type))
    is_good = isinstance(value, plain) and (bool in plain or not isinstance(value, bool)) and value == value
    if plain and not is_good:
        names = " or ".join("None" if each is type(None) else each.__name__ for each in plain)
        raise ConfigError(f"option {option}={value!r:.60} of the {what} must be a {names}")


def processes_of_environment() -> tuple[str | None, int | None, int | None]:
    """Coordinator address, number of processes and id of this one, as `scripts/launch_gpu.sh` sets them."""
    address = os.environ.get("JAXSERVE_COORDINATOR_ADDRESS")
    numbers = (os.environ.get(f"JAXSERVE_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    count, index = (int(number) if number and number.isdecimal() else None for number in numbers)
    return address, count, index


def api_keys_of_environment() -> tuple[str, ...]:
    """$JAXSERVE_API_KEY or vLLM's $VLLM_API_KEY, for servers that are given no key otherwise."""
    found = (os.environ.get("JAXSERVE_API_KEY"), os.environ.get("VLLM_API_KEY"))
    return next(((key,) for key in found if key), ())


def cache_folder() -> Path:
    """The per-user folder for what can be made again: $JAXSERVE_CACHE, else $XDG_CACHE_HOME/jaxserve, else ~/.cache."""
    own = os.environ.get("JAXSERVE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "jaxserve"


def compiler_flags() -> list[tuple[str, str]]:
    """What the environment tells JAX, compilers and drivers, sorted. With other flags a program may become another one."""
    prefixes = ("CUDA_", "JAX_", "LIBTPU_", "LLVM_", "MOSAIC_", "NVIDIA_", "PALLAS_", "TF_", "TPU_", "TRITON_", "XLA_")
    return sorted((name, value) for name, value in os.environ.items() if name.startswith(prefixes))


def gpu_share() -> float:
    """The share of a GPU's memory that JAX takes for a process: $XLA_CLIENT_MEM_FRACTION (or its older name), else 0.75.

    Source: https://docs.jax.dev/en/latest/gpu_memory_allocation.html.

    Raises:
      ConfigError: it is no such share.
    """
    text = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"XLA_CLIENT_MEM_FRACTION={text!r} must be above 0 and at most 1")
    return share
