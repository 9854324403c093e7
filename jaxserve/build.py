"""Config -> engine. The one place that knows both the scheduler and the local executor."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.clock import WallClock
from jaxserve.config import EngineConfig, cache_folder
from jaxserve.engine import Engine
from jaxserve.errors import CapacityError, CheckpointError, ConfigError
from jaxserve.executor.compiles import count_compiles
from jaxserve.executor.ladder import build_ladder
from jaxserve.executor.local import LocalExecutor
from jaxserve.executor.program import DeviceState
from jaxserve.kv.store import KVStore
from jaxserve.memory import free_host_bytes, step_bytes
from jaxserve.models import weights
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import block_bytes, empty_pages, stored_dtype
from jaxserve.models.registry import ModelFamily, family_of, read_config
from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul import op as matmul
from jaxserve.pallas_kernels.ragged_paged_attention import op as attention
from jaxserve.sampling.sampler import empty_state
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.policies.fcfs import Fcfs
from jaxserve.scheduler.policies.priority import Priority
from jaxserve.sharding.mesh import AXES, Parallel, make_mesh
from jaxserve.tokenizer import Tokenizer, load_tokenizer

POLICIES = {"fcfs": Fcfs, "priority": Priority}
_CPU_POOL_BYTES = 2 << 30  # a default pool takes at most this much host memory


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """An engine ready to run, and what is worth knowing about it."""

    engine: Engine
    executor: LocalExecutor
    tokenizer: Tokenizer | None
    model: ModelConfig
    max_model_len: int
    facts: dict[str, Any]  # for metrics: backend, dtype, sizes, start-up seconds


@dataclasses.dataclass(frozen=True, slots=True)
class _Settled:
    """What can be told from the options and config.json alone."""

    parallel: Parallel
    mesh: Mesh | None  # None: one device
    cfg: ModelConfig
    family: ModelFamily
    specs: Any
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    max_model_len: int
    token_budget: int
    num_blocks: int


def build(folder: Path, config: EngineConfig) -> Built:
    """Load a model and compile its steps.

    Raises:
      CheckpointError, ConfigError, CapacityError: before any weight is read, wherever that can be told.
    """
    cfg = read_config(folder)
    tokenizer = load_tokenizer(folder)
    settled = _settle(config, cfg)
    _use_compilation_cache(config.compilation_cache)
    native.enable(cache_folder() / "native" if config.native_kernels else None)
    attention_backend = _attention_backend(config, settled)
    compiles = count_compiles()

    started_s = time.perf_counter()
    params = _load_weights(folder, config, settled)
    loaded_s = time.perf_counter()
    executor = _make_executor(config, settled, params)
    executor.warm_up(progress=config.progress)
    warm_s = time.perf_counter()
    facts = _facts(config, settled) | {
        "attention_backend": attention_backend,
        "load_s": loaded_s - started_s,
        "warm_up_s": warm_s - loaded_s,
        "warm_up_compiles": count_compiles() - compiles,
    }
    engine = _make_engine(config, settled, executor, tokenizer)
    return Built(engine, executor, tokenizer, settled.cfg, settled.max_model_len, facts)


def _settle(config: EngineConfig, cfg: ModelConfig) -> _Settled:
    """Check the options against the model, and size everything."""
    dtype, kv_dtype = _dtypes(config, cfg)
    _check_attention(config.attention_backend)
    parallel = parallel_of(config)
    shards = (parallel.num_shards(axis) for axis in ("heads", "pool_heads", "experts"))
    cfg = cfg.for_shards(*shards)
    mesh = make_mesh(parallel) if parallel.num_devices > 1 else None
    max_model_len = _max_model_len(config, cfg)
    token_budget = _token_budget(config, max_model_len)
    cfg = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, length=max_model_len))
    family = family_of(cfg)
    specs = family.abstract(cfg)
    max_model_len, num_blocks = _size_pool(config, parallel, cfg, specs, dtype, kv_dtype, max_model_len, token_budget)
    return _Settled(parallel, mesh, cfg, family, specs, dtype, kv_dtype, max_model_len, token_budget, num_blocks)


def parallel_of(config: EngineConfig) -> Parallel:
    """The mesh that the options ask for."""
    return Parallel(*(getattr(config, f"{axis}_parallel_size") for axis in AXES))


def _load_weights(folder: Path, config: EngineConfig, settled: _Settled) -> Any:
    if config.load_format == "dummy":
        return weights.random(settled.specs, settled.dtype, config.seed, settled.mesh)
    return weights.load(folder, settled.specs, settled.dtype, settled.mesh)


def _make_executor(config: EngineConfig, settled: _Settled, params: Any) -> LocalExecutor:
    cfg, replicas = settled.cfg, settled.parallel.data
    ladder = build_ladder(config.max_num_seqs, settled.token_budget, settled.parallel.sequence)

    def empty() -> DeviceState:
        num_blocks, as_bits = replicas * settled.num_blocks, _keeps_bits(config)
        return DeviceState(
            kv=empty_pages(cfg, num_blocks, config.block_size, settled.kv_dtype, as_bits=as_bits),
            sampler=empty_state(replicas * config.max_num_seqs, cfg.vocab_size + cfg.vocab_padding),
        )

    return LocalExecutor(
        settled.family,
        cfg,
        params,
        empty,
        ladder,
        max_model_len=settled.max_model_len,
        attention_backend=config.attention_backend,
        mesh=settled.mesh,
    )


def _make_engine(
    config: EngineConfig, settled: _Settled, executor: LocalExecutor, tokenizer: Tokenizer | None
) -> Engine:
    scheduler = Scheduler(
        KVStore(settled.num_blocks, config.block_size, caching=config.enable_prefix_caching),
        POLICIES[config.scheduling_policy](),
        executor.capacity(),
        token_budget=settled.token_budget,
        chunked=config.enable_chunked_prefill,
    )
    return Engine(
        scheduler,
        executor,
        tokenizer,
        clock=WallClock(),
        vocab_size=settled.cfg.vocab_size,
        max_model_len=settled.max_model_len,
        seed=config.seed,
        overlap=config.async_scheduling,
    )


def _facts(config: EngineConfig, settled: _Settled) -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "parallel": str(settled.parallel),
        "matmul_backend": matmul.chosen(settled.dtype),
        "architecture": settled.cfg.architecture,
        "dtype": str(settled.dtype),
        "kv_cache_dtype": str(settled.kv_dtype),
        "max_model_len": settled.max_model_len,
        "max_num_batched_tokens": settled.token_budget,
        "num_kv_blocks": settled.num_blocks,
        "block_size": config.block_size,
        "weight_bytes": weights.nbytes(settled.specs, settled.dtype, settled.parallel),
        "kv_pool_bytes": settled.num_blocks
        * block_bytes(settled.cfg, config.block_size, settled.kv_dtype)
        // settled.parallel.num_shards("pool_heads"),
    }


def _dtypes(config: EngineConfig, cfg: ModelConfig) -> tuple[jnp.dtype, jnp.dtype]:
    name = cfg.dtype if config.dtype == "auto" else config.dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"the checkpoint's dtype {name!r} is not supported", remedy="Choose one with dtype=")
    dtype = jnp.dtype(name)
    kv_name = {"auto": name, "fp8": "float8_e4m3fn"}.get(config.kv_cache_dtype, config.kv_cache_dtype)
    return dtype, jnp.dtype(kv_name)


def _check_attention(backend: str | None) -> None:
    if backend is not None and backend not in attention.IMPLEMENTATIONS:
        known = ", ".join(attention.IMPLEMENTATIONS)
        raise ConfigError(f"attention_backend={backend!r} does not exist", remedy=f"Choose one of {known}")


def _attention_backend(config: EngineConfig, settled: _Settled) -> str:
    """The implementation that will run, by name. Raises ConfigError if the one asked for refuses this model."""
    cfg, kv_dtype, shards = settled.cfg, settled.kv_dtype, settled.parallel.num_shards("pool_heads")
    try:
        return attention.chosen(
            num_heads=cfg.num_heads // shards,
            num_kv_heads=cfg.num_kv_heads // shards,
            head_size=cfg.head_size,
            page_size=config.block_size,
            dtype=settled.dtype,
            kv_dtype=kv_dtype,
            pool_dtype=stored_dtype(kv_dtype, _keeps_bits(config)),
            window=next((window for window in cfg.windows if window), None),
            impl=config.attention_backend,
        )
    except NotImplementedError as refusal:
        raise ConfigError(
            f"attention_backend={config.attention_backend!r} cannot run this model here: {refusal}",
            remedy="Leave it out, and the first that can is taken",
        ) from refusal


def _keeps_bits(config: EngineConfig) -> bool:
    """Whether the pool is stored as bits, which is faster on CPU."""
    return jax.default_backend() == "cpu" and config.attention_backend != "tpu"  # interpreted, for tests


def _max_model_len(config: EngineConfig, cfg: ModelConfig) -> int:
    """The wanted length, or the model's own; only dynamic rope may go beyond what the model was trained for."""
    trained = cfg.max_position
    wanted = config.max_model_len or trained
    if wanted > trained and cfg.rope.kind != "dynamic":
        raise ConfigError(
            f"max_model_len={wanted} is beyond the {trained} positions the model was trained for",
            remedy=f"Use at most {trained}",
        )
    return wanted


def _token_budget(config: EngineConfig, max_model_len: int) -> int:
    default = 512 if jax.default_backend() == "cpu" else 2048
    if config.enable_chunked_prefill:
        return config.max_num_batched_tokens or default
    # A whole prompt must fit beside the decodes, which are never left out, or it could wait for ever.
    needed = max_model_len + config.max_num_seqs
    budget = config.max_num_batched_tokens or max(default, needed)
    if budget < needed:
        raise ConfigError(
            f"without chunked prefill a step must hold a whole prompt and all decodes, but max_num_batched_tokens={budget} "
            f"is below max_model_len + max_num_seqs = {needed}",
            remedy="Raise the one or lower the others",
        )
    return budget


def _size_pool(
    config: EngineConfig,
    parallel: Parallel,
    cfg: ModelConfig,
    specs: Any,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    max_model_len: int,
    token_budget: int,
) -> tuple[int, int]:
    """Length limit and number of blocks: what is asked for, what is useful, and what fits.

    The longest allowed sequence must fit the pool alone, else it could never finish. A default length shrinks to the
    pool; a length asked for by name is an error instead.
    """
    per_block = block_bytes(cfg, config.block_size, kv_dtype) // parallel.num_shards("pool_heads")
    need = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    else:
        kind = jax.devices()[0].device_kind
        needed = step_bytes(cfg, token_budget, config.max_num_seqs, dtype.itemsize, kind)
        budget = _pool_budget(config, parallel.num_devices, weights.nbytes(specs, dtype, parallel), needed)
        num_blocks = min(budget // per_block, config.max_num_seqs * need)
    if num_blocks >= need:
        return max_model_len, num_blocks
    holds = num_blocks * config.block_size
    if config.max_model_len is None and holds >= config.block_size:
        return holds, num_blocks
    raise CapacityError(
        f"a sequence of max_model_len={max_model_len} tokens needs {need} KV blocks, but there is room for {num_blocks} "
        f"({holds} tokens, {per_block} bytes a block)",
        remedy="Lower max_model_len, or raise num_kv_blocks or memory_utilization",
    )


def _pool_budget(config: EngineConfig, num_devices: int, weight_bytes: int, step: int) -> int:
    """Bytes the KV pool may take of each device by default: what weights and steps leave."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        usable = int(stats["bytes_limit"] * config.memory_utilization) - stats.get("bytes_in_use", 0)
        free = usable - weight_bytes - step
    else:
        usable = int(free_host_bytes() * config.memory_utilization / 2) // num_devices  # emulated, they share it
        free = min(usable - weight_bytes - step, _CPU_POOL_BYTES // num_devices)
    if free <= 0:
        raise CapacityError(
            f"the weights need {weight_bytes / 1e9:.1f} GB and a step {step / 1e9:.1f} GB, which leaves nothing of "
            f"{usable / 1e9:.1f} GB for the KV pool",
            remedy="Use a smaller dtype, model, max_num_batched_tokens or max_num_seqs, or more memory",
        )
    return free


def _use_compilation_cache(choice: str | None) -> None:
    """Keep compiled programs between runs, unless the user has set JAX's own option or turned it off."""
    if choice in (None, "none") or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    folder = cache_folder() / "xla" if choice == "auto" else Path(str(choice)).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compilation_cache={str(folder)!r} cannot be used: {error}") from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
