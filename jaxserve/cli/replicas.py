"""Simulated replicas of a model on some devices: sizes by the memory planner, step times by the cost model."""

from pathlib import Path

from jaxserve.config import EngineConfig, reject_unknown
from jaxserve.cost import files
from jaxserve.cost.here import of_device
from jaxserve.errors import CapacityError, ConfigError
from jaxserve.memory import room
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.chips import CHIPS
from jaxserve.sim.replica import ReplicaSpec

HERE = "here"  # instead of a chip: the devices of this machine


def replica_specs(
    cfg: ModelConfig,
    config: EngineConfig,
    *,
    chip: str,
    num_devices: int,
    num_replicas: int,
    cost_file: str | Path | None = None,
    compiles: bool = False,
) -> list[ReplicaSpec]:
    """Equal replicas that share `num_devices` of a chip evenly. A replica's devices share heads, feed-forward columns and
    vocabulary, unless the options give them other sizes. Without a file, this machine's CPU is known only roughly.

    Raises:
      CapacityError: the model does not fit.
      ConfigError: the chip is unknown, or devices cannot be shared so.
    """
    from jaxserve.memory.plan import lay_out  # not at the top: it imports jax
    from jaxserve.sharding.mesh import Parallel

    reject_unknown([chip], [*CHIPS, HERE], what="chip")
    told = None if cost_file is None else files.load(cost_file)
    each, rest = divmod(num_devices, num_replicas)
    if rest or not each:
        raise ConfigError(f"{num_devices} devices cannot be shared evenly by {num_replicas} replicas")
    sequence, expert, tensor = (getattr(config, f"{axis}_parallel_size") for axis in ("sequence", "expert", "tensor"))
    if each % (sequence * expert) or tensor not in (1, each // (sequence * expert)):
        raise ConfigError(
            f"{num_devices} devices for {num_replicas} replicas are {each} each, but the parallel sizes ask for "
            f"{sequence * expert * tensor}"
        )
    tensor = each // (sequence * expert)
    where = room.of_this_machine() if chip == HERE else room.of_chip(chip, each)
    plan = lay_out(config, cfg, where, Parallel(data=1, tensor=tensor, sequence=sequence, expert=expert))
    if plan.problem:
        raise CapacityError(f"on {each} x {chip}: {plan.problem}", remedy=plan.remedy)
    cost = told or of_device(
        where.kind,
        where.platform,
        plan.cfg,
        tensor=tensor,
        expert=expert,
        sequence=sequence,
        itemsize=plan.dtype.itemsize,
        kv_itemsize=plan.kv_dtype.itemsize,
        block_size=config.block_size,
    )
    spec = ReplicaSpec(
        cost=cost,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        token_budget=plan.token_budget,
        max_model_len=plan.max_model_len,
        num_host_blocks=plan.num_host_blocks,
        preemption_mode=config.preemption_mode,
        sequence_shards=sequence,
        client_quota=config.max_num_seqs_per_client,
        chunked=config.enable_chunked_prefill,
        caching=config.enable_prefix_caching,
        overlap=config.async_scheduling,
        compiles=compiles,
        engine_type=f"{chip} x {each}",
    )
    return [spec] * num_replicas
