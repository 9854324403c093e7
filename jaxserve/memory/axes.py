"""Which sizes of the mesh's axes a model can be served with, and which of them fit; the best first."""

import dataclasses
from collections.abc import Iterator

from jaxserve.config import EngineConfig
from jaxserve.errors import CapacityError, ConfigError
from jaxserve.memory.plan import Plan, lay_out, num_experts
from jaxserve.memory.room import Room, size_text
from jaxserve.models.config import ModelConfig
from jaxserve.sharding.mesh import ONE_DEVICE, Parallel

_ENOUGH = 2 / 3  # of the tokens that the roomiest sizes hold
_MOST_DEVICES = 1024  # looked at where nothing fits
_NAMED = 3  # sizes that an error names


def fitting(config: EngineConfig, cfg: ModelConfig, room: Room) -> list[Plan]:
    """All sizes that are valid for the model and fit, for all of the devices, or else for as many as possible.

    Best first. Sizes that hold two thirds of the tokens that the roomiest hold are preferred; among them those that share
    no tokens (each device would hold all weights), store no KV head twice, and have the fewest devices in a replica,
    because these wait for each other in every layer.
    """
    for count in range(room.num_devices, 0, -1):
        if plans := _fitting_all(config, cfg, room, count):
            return plans
    return []


def closest(config: EngineConfig, cfg: ModelConfig, room: Room) -> Plan:
    """The sizes that lack the least, where none fit."""
    plans = [plan for count in range(1, room.num_devices + 1) for plan in _plans(config, cfg, room, count)]
    return max(plans, key=lambda plan: (plan.free_bytes, -plan.parallel.num_devices))


def with_more_devices(config: EngineConfig, cfg: ModelConfig, room: Room) -> Plan | None:
    """The best sizes for the smallest number of such devices that is enough, doubling it; None if none of up to 1024 is."""
    count = room.num_devices
    while not room.is_host and count < _MOST_DEVICES:
        count *= 2
        if plans := _fitting_all(config, cfg, dataclasses.replace(room, num_devices=count), count):
            return plans[0]
    return None


def refusal(plan: Plan, config: EngineConfig, cfg: ModelConfig) -> CapacityError:
    """The error of a plan that does not fit. It names sizes for these devices that would."""
    fit = [options_of(other.parallel) for other in fitting(config, cfg, plan.room)[:_NAMED]]
    devices = f"On {plan.room.num_devices} devices " if plan.room.num_devices > 1 else "On one device "
    return CapacityError(plan.problem, remedy=f"{devices}{' or '.join(fit)} would fit" if fit else plan.remedy)


def options_of(parallel: Parallel) -> str:
    """Sizes as engine options."""
    return ", ".join(f"{name}={size}" for name, size in as_options(parallel).items()) or "no parallel size"


def as_options(parallel: Parallel) -> dict[str, int]:
    """The engine options of a mesh; those of size one are left out."""
    sizes = {axis: getattr(parallel, axis) for axis in ("tensor", "expert", "sequence", "data")}
    return {f"{axis}_parallel_size": size for axis, size in sizes.items() if size > 1}


def reason(plan: Plan) -> str:
    """One line on what these sizes are good for."""
    sizes, count = plan.parallel, plan.parallel.num_devices // plan.parallel.data
    parts = [f"{plan.most_tokens:,} tokens of KV cache", f"{size_text(plan.needs.weights)} of weights a device"]
    if sizes.data > 1:
        parts.append(f"{sizes.data} replicas" + (" that never wait for each other" if count == 1 else f" of {count}"))
    if sizes.sequence > 1:
        parts.append(f"prompts shared by {sizes.sequence}, each with the same weights")
    if plan.cfg.kv_repeat > 1:
        parts.append(f"every KV head stored {plan.cfg.kv_repeat} times")
    if idle := plan.room.num_devices - sizes.num_devices:
        parts.append(f"{idle} idle")
    return ", ".join(parts)


def _fitting_all(config: EngineConfig, cfg: ModelConfig, room: Room, count: int) -> list[Plan]:
    """Those for exactly so many devices, best first."""
    plans = [plan for plan in _plans(config, cfg, room, count) if not plan.problem]
    enough = _ENOUGH * max((plan.most_tokens for plan in plans), default=0)

    def rank(plan: Plan) -> tuple[float, ...]:
        sizes = plan.parallel
        replica = sizes.num_devices // sizes.data
        has_enough, repeats = plan.most_tokens >= enough, plan.cfg.kv_repeat > 1
        # A whole expert's products are larger than a part of each.
        return (not has_enough, sizes.sequence > 1, repeats, replica, -sizes.expert, -plan.most_tokens)

    return sorted(plans, key=rank)


def _plans(config: EngineConfig, cfg: ModelConfig, room: Room, count: int) -> Iterator[Plan]:
    """For each way to arrange so many devices that is valid for the model.

    Raises:
      ConfigError: options that do not hang on the sizes cannot be met.
    """
    for parallel in _meshes(count, num_experts(cfg)):
        try:
            yield lay_out(config, cfg, room, parallel)
        except ConfigError:
            if parallel == ONE_DEVICE:
                raise


def _meshes(count: int, experts: int) -> Iterator[Parallel]:
    for data in _divisors(count):
        for sequence in _divisors(count // data):
            for expert in _divisors(count // data // sequence):
                tensor = count // data // sequence // expert
                if expert == 1 or (experts and not experts % expert):
                    yield Parallel(data=data, sequence=sequence, expert=expert, tensor=tensor)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
