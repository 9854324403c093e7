"""The memory plan: from options, config.json and the room on the devices to sizes of everything, before a weight is read."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxserve.config import MAX_NUM_SEQS, EngineConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.executor.ladder import build_ladder
from jaxserve.memory.needs import Needs, activation_bytes, needs_of, sampler_bytes
from jaxserve.memory.room import Room, size_text
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import block_bytes
from jaxserve.models.registry import ModelFamily, family_of
from jaxserve.sharding.mesh import AXES, Parallel, check_count

SWAPPING_BLOCKS = 64  # room on the devices for blocks on their way to and from host memory


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A model laid out for some devices. Bytes are those of each device, blocks those of each replica."""

    parallel: Parallel
    room: Room
    cfg: ModelConfig  # as the devices share it
    family: ModelFamily
    specs: Any
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    max_model_len: int
    max_num_seqs: int
    token_budget: int
    step_tokens: int  # the most of a step
    needs: Needs
    usable_bytes: int
    block_size: int
    block_bytes: int
    num_blocks: int
    num_host_blocks: int = 0  # in host memory, of each replica
    problem: str = ""  # why it cannot be; empty: it fits
    remedy: str = ""

    @property
    def free_bytes(self) -> int:
        """What weights and steps leave for the pool; negative if there is too little for them."""
        return self.usable_bytes - self.needs.total

    @property
    def pool_bytes(self) -> int:
        """Of the KV pool."""
        return self.num_blocks * self.block_bytes

    @property
    def most_tokens(self) -> int:
        """Tokens whose keys and values all replicas together have room for."""
        return max(self.free_bytes // self.block_bytes, 0) * self.block_size * self.parallel.data

    def most_sequences(self, context: int) -> int:
        """How many sequences of so many tokens fit a replica at once, if `max_num_seqs` allows as many."""
        fewest, most = 0, MAX_NUM_SEQS
        while fewest < most:
            middle = (fewest + most + 1) // 2
            if self._bytes_for(middle, context) <= self.usable_bytes:
                fewest = middle
            else:
                most = middle - 1
        return fewest

    def _bytes_for(self, num_seqs: int, context: int) -> int:
        tokens, itemsize = max(self.token_budget, num_seqs), self.dtype.itemsize
        return (
            self.needs.weights
            + sampler_bytes(self.cfg, num_seqs, self.parallel)
            + activation_bytes(self.cfg, tokens, num_seqs, itemsize, self.parallel, self.room.kind)
            + num_seqs * _blocks(context, self.block_size) * self.block_bytes
        )


def lay_out(config: EngineConfig, cfg: ModelConfig, room: Room, parallel: Parallel | None = None) -> Plan:
    """Size everything for a mesh, by default the one that the options ask for. Whether it fits, `Plan.problem` says.

    Raises:
      CheckpointError, ConfigError: options that no amount of memory would help: they contradict each other or the model,
        ask for more devices than there are, or for shares that are not even.
    """
    parallel = parallel or parallel_of(config)
    dtype, kv_dtype = _dtypes(config, cfg)
    cfg = _with_redundant_experts(config, cfg)
    _check_experts(cfg, parallel)
    cfg = cfg.for_shards(*(parallel.num_shards(axis) for axis in ("heads", "pool_heads", "experts")))
    check_count(parallel, room.num_devices, room.kind, room.platform)
    max_model_len = _max_model_len(config, cfg)
    token_budget = _token_budget(config, max_model_len, parallel, room.platform)
    family, specs = _family(cfg)
    cfg = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, length=max_model_len))
    ladder = build_ladder(config.max_num_seqs, token_budget, parallel.sequence)
    step_tokens = max(rung.tokens for rung in ladder)
    needs = needs_of(
        cfg,
        specs,
        parallel,
        dtype,
        num_tokens=step_tokens,
        num_rows=max(rung.rows for rung in ladder),
        num_slots=config.max_num_seqs,
        device_kind=room.kind,
    )
    shards = parallel.num_shards("pool_heads")
    bytes_of_block = block_bytes(cfg, config.block_size, kv_dtype, room.platform)
    swaps = config.swap_space > 0 and config.preemption_mode != "recompute"
    plan = Plan(
        parallel=parallel,
        room=room,
        cfg=cfg,
        family=family,
        specs=specs,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        token_budget=token_budget,
        step_tokens=step_tokens,
        needs=needs,
        usable_bytes=room.usable(config.memory_utilization, parallel.num_devices)
        - (SWAPPING_BLOCKS * bytes_of_block // shards if swaps else 0),
        block_size=config.block_size,
        block_bytes=bytes_of_block // shards,
        num_blocks=0,
        num_host_blocks=int(config.swap_space * (1 << 30)) // bytes_of_block if swaps else 0,
    )
    return _with_pool(plan, config)


@functools.lru_cache(maxsize=32)
def _family(cfg: ModelConfig) -> tuple[ModelFamily, Any]:
    """The model's functions and weights. Kept, because most sizes of a mesh share them."""
    family = family_of(cfg)
    return family, family.abstract(cfg)


def _with_pool(plan: Plan, config: EngineConfig) -> Plan:
    """The number of blocks: what is asked for, what is useful, and what fits.

    The longest allowed sequence must fit the pool alone, else it could never finish. A default length shrinks to the
    pool; a length asked for by name is a problem instead.
    """
    need = _blocks(plan.max_model_len, plan.block_size)
    if config.num_kv_blocks is not None:
        plan = dataclasses.replace(plan, num_blocks=config.num_kv_blocks)
        held, limit = plan.needs.weights + plan.needs.sampler, plan.room.limit(plan.parallel.num_devices)
        if held + plan.pool_bytes > limit:
            return _refused(
                plan,
                f"weights and sampler need {size_text(held)} and {plan.num_blocks} KV blocks {size_text(plan.pool_bytes)} "
                f"of each device, which has {size_text(limit)}",
                "Lower num_kv_blocks, or leave it out",
            )
    elif plan.free_bytes <= 0:
        steps = plan.needs.sampler + plan.needs.activations
        return _refused(
            plan,
            f"the weights need {size_text(plan.needs.weights)} and a step {size_text(steps)} of each device, which "
            f"leaves nothing of {size_text(max(plan.usable_bytes, 0))} for the KV pool",
            "Use a smaller dtype, model, max_num_batched_tokens or max_num_seqs, or more memory",
        )
    else:
        pool = plan.room.default_pool(plan.free_bytes, plan.parallel.num_devices)
        plan = dataclasses.replace(plan, num_blocks=min(pool // plan.block_bytes, config.max_num_seqs * need))
    if plan.num_blocks >= need:
        return plan
    holds = plan.num_blocks * plan.block_size
    if config.max_model_len is None and holds:
        return dataclasses.replace(plan, max_model_len=holds)
    return _refused(
        plan,
        f"a sequence of max_model_len={plan.max_model_len} tokens needs {need} KV blocks, but there is room for "
        f"{plan.num_blocks} ({holds} tokens, {size_text(plan.block_bytes)} a block)",
        "Lower max_model_len, or raise num_kv_blocks or memory_utilization",
    )


def _refused(plan: Plan, problem: str, remedy: str) -> Plan:
    return dataclasses.replace(plan, problem=problem, remedy=remedy)


def parallel_of(config: EngineConfig) -> Parallel:
    """The mesh that the options ask for."""
    return Parallel(*(getattr(config, f"{axis}_parallel_size") for axis in AXES))


def num_experts(cfg: ModelConfig) -> int:
    """Experts that a layer's weights are held of; 0 in a model without."""
    return cfg.experts.num_slots if cfg.experts else 0


def _with_redundant_experts(config: EngineConfig, cfg: ModelConfig) -> ModelConfig:
    if cfg.experts is None:
        for name in ("num_redundant_experts", "expert_rebalance_steps"):
            if getattr(config, name):
                raise ConfigError(
                    f"{name}={getattr(config, name)}, but this model has no experts", remedy="Leave it at 0"
                )
        return cfg
    num_slots = cfg.experts.count + config.num_redundant_experts
    if num_slots > 2 * cfg.experts.count:
        raise ConfigError(
            f"num_redundant_experts={config.num_redundant_experts} is more than the {cfg.experts.count} experts there are"
        )
    return dataclasses.replace(cfg, experts=dataclasses.replace(cfg.experts, num_slots=num_slots))


def _check_experts(cfg: ModelConfig, parallel: Parallel) -> None:
    if parallel.expert > 1 and cfg.experts is None:
        raise ConfigError(
            f"expert_parallel_size={parallel.expert}, but {cfg.architecture} has no experts",
            remedy="Use tensor_parallel_size, which shares the weights of every layer",
        )


def _dtypes(config: EngineConfig, cfg: ModelConfig) -> tuple[jnp.dtype, jnp.dtype]:
    name = cfg.dtype if config.dtype == "auto" else config.dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"the checkpoint's dtype {name!r} is not supported", remedy="Choose one with dtype=")
    dtype = jnp.dtype(name)
    kv_name = {"auto": name, "fp8": "float8_e4m3fn"}.get(config.kv_cache_dtype, config.kv_cache_dtype)
    return dtype, jnp.dtype(kv_name)


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


def _token_budget(config: EngineConfig, max_model_len: int, parallel: Parallel, platform: str) -> int:
    default = (512 if platform == "cpu" else 2048) * parallel.sequence
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


def _blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
