"""Config -> engine. The one place that knows both the scheduler and the local executor."""

import contextlib
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.clock import Clock, WallClock
from jaxserve.config import EngineConfig, cache_folder
from jaxserve.cost.here import of_device
from jaxserve.cost.model import CostModel
from jaxserve.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.executor.base import Executor
from jaxserve.executor.compiles import count_compiles
from jaxserve.executor.experts import ExpertBook
from jaxserve.executor.ladder import build_ladder
from jaxserve.executor.local import LocalExecutor
from jaxserve.executor.lockstep import Followers
from jaxserve.executor.program import DeviceState
from jaxserve.executor.program_store import ProgramStore, instead_of_jaxs_cache, open_store
from jaxserve.kv.store import KVStore
from jaxserve.memory import axes, room
from jaxserve.memory.plan import Plan, lay_out
from jaxserve.model_source import config_of, find_folder
from jaxserve.models import weights
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import empty_pages, stored_dtype
from jaxserve.models.registry import read_config
from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul import op as matmul
from jaxserve.pallas_kernels.ragged_paged_attention import op as attention
from jaxserve.sampling.sampler import empty_state
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.swap import swap_rule
from jaxserve.sharding.links import links_here
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.scheme import Case, choose_scheme, refusal
from jaxserve.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """An engine ready to run, and what is worth knowing about it."""

    engine: Engine
    executor: LocalExecutor
    tokenizer: Tokenizer | None
    model: ModelConfig
    max_model_len: int
    facts: dict[str, Any]  # for metrics: backend, dtype, sizes, start-up seconds

    def metrics(self) -> dict[str, Any]:
        """What the engine is and has done: `counts`, and clients."""
        return self.counts() | {"clients": self.engine.scheduler.accounts.as_dict()}

    def counts(self) -> dict[str, Any]:
        """The facts, token counts, padding, compilations. Any thread may ask; two values may be a step apart."""
        scheduler, pipeline = self.engine.scheduler, self.engine.pipeline
        return self.facts | {
            **dataclasses.asdict(scheduler.counters),
            "computed_tokens": pipeline.computed_tokens,
            "padded_tokens": pipeline.padded_tokens,
            "failed_steps": self.engine.failed_steps,
            **self.executor.metrics(),
            "compiles": count_compiles(),
            "num_waiting": scheduler.num_waiting,
            "num_running": scheduler.num_running,
            "kv_blocks_held": scheduler.num_held_blocks,
        }


def build(
    model: str | Path, config: EngineConfig, followers: Followers | None = None, clock: Clock | None = None
) -> Built:
    """Load a model and compile its steps; in a program of several processes in all of them.

    Raises:
      CheckpointError, ConfigError, CapacityError: before any weight is read, wherever that can be told.
    """
    folder = find_folder(model, config.load_format)
    cfg = config_of(model) if folder is None else read_config(folder)
    tokenizer = None if folder is None else load_tokenizer(folder)
    plan = _plan_here(config, cfg)
    cost = _cost_model_here(config, plan)
    # A mistake in its options is told before weights are read; the policy itself is made when all is known.
    make_policy(config.scheduling_policy, config.scheduling_options, cost=cost, capacity=None, rungs=())
    mesh = make_mesh(plan.parallel) if plan.parallel.num_devices > 1 or jax.process_count() > 1 else None
    programs_folder = _use_compilation_cache(config.compilation_cache)
    native.enable(cache_folder() / "native" if config.native_kernels else None)
    attention_backend = _attention_backend(config, plan)
    compiles = count_compiles()
    if followers is not None:
        sizes = {"num_kv_blocks": plan.num_blocks, "attention_backend": attention_backend}
        followers.load(str(model), dataclasses.replace(config, **sizes, progress=False))

    started_s = time.perf_counter()
    params = _load_weights(folder, config, plan, mesh)
    loaded_s = time.perf_counter()
    store = None
    if programs_folder is not None:
        store = _program_store(programs_folder, config, plan, mesh, params, attention_backend)
    with contextlib.nullcontext() if store is None else instead_of_jaxs_cache():
        executor = _make_executor(config, plan, mesh, params, store)
        executor.warm_up(progress=config.progress)
    runner = executor if followers is None else followers.lead(executor)
    warm_s = time.perf_counter()
    facts = _facts(config, plan) | {
        "attention_backend": attention_backend,
        "load_s": loaded_s - started_s,
        "warm_up_s": warm_s - loaded_s,
        "warm_up_compiles": count_compiles() - compiles,
    }
    engine = _make_engine(config, plan, runner, tokenizer, cost, clock or WallClock())
    return Built(engine, executor, tokenizer, plan.cfg, plan.max_model_len, facts)


def _plan_here(config: EngineConfig, cfg: ModelConfig) -> Plan:
    """Check the options against the model and this machine, and size everything."""
    _check_attention(config.attention_backend)
    if config.expert_rebalance_steps and jax.process_count() > 1:
        # Each process would decide by the counts that have reached it so far.
        raise ConfigError("expert_rebalance_steps needs a single process", remedy="Leave it at 0")
    if config.swap_space:
        _check_swap_space(config)
    plan = lay_out(config, cfg, room.of_this_machine())
    if plan.problem:
        raise axes.refusal(plan, config, cfg)
    return plan


def _check_swap_space(config: EngineConfig) -> None:
    if jax.process_count() > 1:
        raise ConfigError(
            "swap_space needs a single process: blocks of others cannot be read here", remedy="Leave it at 0"
        )
    wanted, free = int(config.swap_space * (1 << 30)) * config.data_parallel_size, room.free_host_bytes()
    if wanted > free:
        raise ConfigError(
            f"swap_space={config.swap_space:g} GiB for each of {config.data_parallel_size} replicas is "
            f"{room.size_text(wanted)}, but {room.size_text(free)} of host memory are free",
            remedy="Lower swap_space",
        )


def _load_weights(folder: Path | None, config: EngineConfig, plan: Plan, mesh: Mesh | None) -> Any:
    if config.load_format == "dummy" or folder is None:
        return weights.random(plan.specs, plan.dtype, config.seed, mesh)
    return weights.load(folder, plan.specs, plan.dtype, mesh)


def _make_executor(
    config: EngineConfig, plan: Plan, mesh: Mesh | None, params: Any, store: ProgramStore | None
) -> LocalExecutor:
    cfg, replicas = plan.cfg, plan.parallel.data
    scheme_of = partial(_scheme_of, config, plan)
    ladder = build_ladder(config.max_num_seqs, plan.token_budget, plan.parallel.sequence, scheme_of)

    def empty() -> DeviceState:
        num_blocks, as_bits = replicas * plan.num_blocks, _keeps_bits(config)
        return DeviceState(
            kv=empty_pages(cfg, num_blocks, config.block_size, plan.kv_dtype, as_bits=as_bits),
            sampler=empty_state(replicas * config.max_num_seqs, cfg.vocab_size + cfg.vocab_padding),
        )

    return LocalExecutor(
        plan.family,
        cfg,
        params,
        empty,
        ladder,
        max_model_len=plan.max_model_len,
        attention_backend=config.attention_backend,
        mesh=mesh,
        experts=ExpertBook(cfg.experts, plan.parallel.expert, config.expert_rebalance_steps) if cfg.experts else None,
        num_host_blocks=plan.num_host_blocks,
        store=store,
    )


def _make_engine(
    config: EngineConfig,
    plan: Plan,
    executor: Executor,
    tokenizer: Tokenizer | None,
    cost: CostModel,
    clock: Clock,
) -> Engine:
    capacity = executor.capacity()
    scheduler = Scheduler(
        [
            KVStore(capacity.num_blocks, capacity.block_size, caching=config.enable_prefix_caching)
            for _ in range(capacity.num_replicas)
        ],
        make_policy(
            config.scheduling_policy,
            config.scheduling_options,
            cost=cost,
            capacity=capacity,
            rungs=capacity.token_rungs,
        ),
        capacity,
        token_budget=plan.token_budget,
        chunked=config.enable_chunked_prefill,
        swap_rule=swap_rule(config.preemption_mode, cost),
        client_quota=config.max_num_seqs_per_client,
    )
    return Engine(
        scheduler,
        executor,
        tokenizer,
        clock=clock,
        vocab_size=plan.cfg.vocab_size,
        max_model_len=plan.max_model_len,
        seed=config.seed,
        overlap=config.async_scheduling,
    )


def _cost_model_here(config: EngineConfig, plan: Plan) -> CostModel:
    """What steps and swaps of one replica take, for those that decide by it."""
    parallel, itemsize = plan.parallel, plan.dtype.itemsize
    return of_device(
        plan.room.kind,
        plan.room.platform,
        plan.cfg,
        choice=config.cost_model,
        tensor=parallel.tensor,
        expert=parallel.expert,
        sequence=parallel.sequence,
        itemsize=itemsize,
        kv_itemsize=plan.kv_dtype.itemsize,
        block_size=plan.block_size,
    )


def _facts(config: EngineConfig, plan: Plan) -> dict[str, Any]:
    return {
        "backend": jax.default_backend(),
        "parallel": str(plan.parallel),
        "matmul_backend": matmul.chosen(plan.dtype),
        "architecture": plan.cfg.architecture,
        "dtype": str(plan.dtype),
        "kv_cache_dtype": str(plan.kv_dtype),
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": plan.token_budget,
        "num_kv_blocks": plan.num_blocks,
        "block_size": config.block_size,
        "weight_bytes": plan.needs.weights,
        "sampler_bytes": plan.needs.sampler,
        "activation_bytes": plan.needs.activations,
        "kv_pool_bytes": plan.pool_bytes,
        "num_host_blocks": plan.num_host_blocks,
    }


def _check_attention(backend: str | None) -> None:
    if backend is not None and backend not in attention.IMPLEMENTATIONS:
        known = ", ".join(attention.IMPLEMENTATIONS)
        raise ConfigError(f"attention_backend={backend!r} does not exist", remedy=f"Choose one of {known}")


def _attention_backend(config: EngineConfig, plan: Plan) -> str:
    """The implementation that will run, by name. Raises ConfigError if the one asked for refuses this model."""
    cfg, kv_dtype, shards = plan.cfg, plan.kv_dtype, plan.parallel.num_shards("pool_heads")
    try:
        return attention.chosen(
            num_heads=cfg.num_heads // shards,
            num_kv_heads=cfg.num_kv_heads // shards,
            head_size=cfg.head_size,
            page_size=config.block_size,
            dtype=plan.dtype,
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


def _scheme_of(config: EngineConfig, plan: Plan, num_tokens: int) -> str | None:
    """How devices share the attention of a prompt of so many tokens; None: as that of any rows, over the pool (Ulysses).

    Raises: ConfigError if the scheme asked for cannot take the model.
    """
    parallel, cfg, asked = plan.parallel, plan.cfg, config.sequence_parallel_scheme
    if parallel.sequence == 1:
        return None
    shards = parallel.num_shards("heads")
    cases = [
        Case(
            num_devices=parallel.sequence,
            num_tokens=-(-num_tokens // parallel.sequence) * parallel.sequence,
            num_heads=cfg.num_heads // shards,
            num_kv_heads=cfg.num_kv_heads // shards,
            head_size=cfg.head_size,
            itemsize=plan.dtype.itemsize,
            window=window,
        )
        for window in dict.fromkeys(cfg.windows or (None,))
    ]
    if asked == "auto":
        chosen = {choose_scheme(case, links_here(), into_pool=True) for case in cases}
        scheme = chosen.pop() if len(chosen) == 1 else "ulysses"
    else:
        scheme = asked
        for refused in filter(None, (refusal(asked, case) for case in cases)):
            raise ConfigError(
                f"sequence_parallel_scheme={asked!r} cannot take prompts of {num_tokens} tokens: {refused}",
                remedy="Leave it at 'auto'",
            )
    return None if scheme == "ulysses" else scheme


def _keeps_bits(config: EngineConfig) -> bool:
    """Whether the pool is stored as bits, which is faster on CPU."""
    return jax.default_backend() == "cpu" and config.attention_backend != "tpu"  # interpreted, for tests


def _use_compilation_cache(choice: str | None) -> Path | None:
    """Keep compiled programs between runs: the executor's in the folder that is returned, others in JAX's own cache. None if
    there is none: it is turned off, or there are several processes, or the user has set JAX's cache and nothing here."""
    if choice in (None, "none"):
        return None
    folder = cache_folder() if choice == "auto" else Path(str(choice)).expanduser()
    programs, others = folder / "programs", folder / "jax"
    jaxs_own = getattr(jax.config, "jax_compilation_cache_dir", None)
    is_users = jaxs_own not in (None, "", str(others))
    if is_users and choice == "auto":
        return None
    try:
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"compilation_cache={str(folder)!r} cannot be used: {error}") from None
    if not is_users:
        jax.config.update("jax_compilation_cache_dir", str(others))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return programs if jax.process_count() == 1 else None


def _program_store(
    folder: Path, config: EngineConfig, plan: Plan, mesh: Mesh | None, params: Any, attention_backend: str
) -> ProgramStore | None:
    """Where the executor's programs are kept, with all that decides them. The C++ kernels are there by now: they were asked
    for when it was settled what attends and what multiplies. A program that is read from disk needs them, too."""
    about = {
        "model": plan.cfg,
        "attention": (config.attention_backend, attention_backend),
        "matmul": matmul.chosen(plan.dtype),
        "native": config.native_kernels,
        "mesh": None if mesh is None else mesh.shape_tuple,
    }
    devices = jax.tree.leaves(params)[0].devices() if mesh is None else mesh.devices.flat
    return open_store(folder, about, tuple(devices))
