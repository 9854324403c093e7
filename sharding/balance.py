"""Which experts each device holds, and which are held more than once, so that all have about equally much to do.

Host only: numpy in, numpy out. A *slot* is room for one expert's weights; each device has as many, the first device the
first ones. A plan's arrays keep their shapes when experts move, so a step that takes them as data is not compiled again.

Source: EPLB, https://github.com/deepseek-ai/EPLB; arXiv 2412.19437, section 3.4.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from jaxserve.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Both ways from experts to slots, of every layer."""

    expert_ls: Int[np.ndarray, "l s"]  # i32, what each slot holds
    slots_lxc: Int[np.ndarray, "l x c"]  # i32, where an expert is held: its copies, ascending, then the last one again
    copies_lx: Int[np.ndarray, "l x"]  # i32, how often; at least 1

    def shares(self, load_lx: np.ndarray, num_devices: int) -> Float[np.ndarray, "l d"]:
        """Every device's part of the load, if copies of an expert share it evenly."""
        each_lx = load_lx / self.copies_lx
        return np.take_along_axis(each_lx, self.expert_ls, axis=1).reshape(len(load_lx), num_devices, -1).sum(axis=-1)


def plan(load_lx: np.ndarray, num_slots: int, num_devices: int, *, num_nodes: int = 1, num_groups: int = 1) -> Plan:
    """Give slots to experts: the more loaded ones get several, the others one, and devices about the same load.

    Args:
      load_lx: tokens that each expert of each layer was given, counted or averaged.
      num_slots: on all devices together; each has the same number.
      num_nodes: hosts that the devices are on, the first ones on the first. With several, groups of experts are first
        given to nodes, so that a token whose experts are of few groups is sent to few nodes.
      num_groups: groups of experts that follow each other. Nodes count only if they divide these.

    Raises: ConfigError if the numbers do not divide, or if there are fewer slots than experts.
    """
    num_experts = load_lx.shape[1]
    if num_slots % num_devices or num_slots < num_experts:
        least = -(-num_experts // num_devices) * num_devices
        raise ConfigError(
            f"{num_experts} experts cannot be held in {num_slots} slots of {num_devices} devices",
            remedy=f"Use {least} slots, or more by multiples of {num_devices}",
        )
    if num_devices % num_nodes or num_experts % num_groups:
        raise ConfigError(
            f"{num_devices} devices are not the same number on each of {num_nodes} nodes, or {num_experts} experts not in "
            f"each of {num_groups} groups"
        )
    if num_groups % num_nodes or num_slots // num_nodes < num_experts // num_nodes:
        num_nodes = num_groups = 1
    rows = [_plan_layer(load_x, num_slots, num_devices, num_nodes, num_groups) for load_x in load_lx]
    return from_slots(np.stack(rows), num_experts)


def from_slots(expert_ls: np.ndarray, num_experts: int) -> Plan:
    """The plan in which slots hold these experts; every expert is in at least one."""
    num_layers, num_slots = expert_ls.shape
    copies_lx = np.stack([np.bincount(expert_s, minlength=num_experts) for expert_s in expert_ls]).astype(np.int32)
    if copies_lx.min() < 1 or copies_lx.shape[1] > num_experts:
        raise ValueError("a plan must hold each expert, and no other")
    slots_lxc = np.empty((num_layers, num_experts, num_slots - num_experts + 1), np.int32)
    for layer, expert_s in enumerate(expert_ls):
        order_s, ends_x = np.argsort(expert_s, kind="stable"), np.cumsum(copies_lx[layer])
        for expert, (end, copies) in enumerate(zip(ends_x, copies_lx[layer], strict=True)):
            slots_lxc[layer, expert, :copies] = order_s[end - copies : end]
            slots_lxc[layer, expert, copies:] = order_s[end - 1]
    return Plan(expert_ls.astype(np.int32), slots_lxc, copies_lx)


def in_turn(num_layers: int, num_experts: int, num_slots: int) -> Plan:
    """Slot s holds expert s, and those past the last expert begin again: how weights are loaded."""
    return from_slots(np.tile(np.arange(num_slots, dtype=np.int32) % num_experts, (num_layers, 1)), num_experts)


def sources(old: Plan, new: Plan, num_devices: int) -> Int[np.ndarray, "l s"]:
    """The slot of `old` that each slot of `new` takes its weights from: itself, else one of its device, else any."""
    num_slots = old.expert_ls.shape[1]
    per_device = num_slots // num_devices
    source_ls = np.empty_like(new.expert_ls)
    for layer, expert_s in enumerate(new.expert_ls):
        for slot, expert in enumerate(expert_s):
            held = old.slots_lxc[layer, expert, : old.copies_lx[layer, expert]]
            farness = np.where(held == slot, 0, np.where(held // per_device == slot // per_device, 1, 2))
            source_ls[layer, slot] = held[np.argmin(farness)]
    return source_ls


def replicate(load_x: np.ndarray, num_slots: int) -> Int[np.ndarray, " x"]:
    """How many copies each expert gets: one, and of those left over each goes to the expert whose copies have most to do; of
    equals to the one with fewest, then to the first."""
    copies_x = np.ones(len(load_x), np.int64)
    for _ in range(num_slots - len(load_x)):
        each_x = load_x / copies_x
        heaviest_x = np.flatnonzero(each_x == each_x.max())
        copies_x[heaviest_x[np.argmin(copies_x[heaviest_x])]] += 1
    return copies_x


def pack(load_i: np.ndarray, num_bins: int) -> Int[np.ndarray, " i"]:
    """A bin for each item, equally many in each: the heaviest item first, into the lightest bin that has room."""
    bin_i, room = np.empty(len(load_i), np.int64), len(load_i) // num_bins
    weight_b, count_b = np.zeros(num_bins), np.zeros(num_bins, np.int64)
    for item in np.argsort(-load_i, kind="stable"):
        lightest = np.argmin(np.where(count_b < room, weight_b, np.inf))
        bin_i[item] = lightest
        weight_b[lightest] += load_i[item]
        count_b[lightest] += 1
    return bin_i


def _plan_layer(
    load_x: np.ndarray, num_slots: int, num_devices: int, num_nodes: int, num_groups: int
) -> Int[np.ndarray, " s"]:
    """The expert that each slot holds. Groups go to nodes; a node's experts are copied, and the copies go to its devices."""
    load_x = load_x.astype(np.float64)
    node_x = np.repeat(pack(load_x.reshape(num_groups, -1).sum(axis=1), num_nodes), len(load_x) // num_groups)
    slots = []
    for node in range(num_nodes):
        expert_i = np.flatnonzero(node_x == node)
        copies_i = replicate(load_x[expert_i], num_slots // num_nodes)
        copy_j = np.repeat(expert_i, copies_i)
        device_j = pack(np.repeat(load_x[expert_i] / copies_i, copies_i), num_devices // num_nodes)
        slots.append(copy_j[np.argsort(device_j, kind="stable")])
    return np.concatenate(slots)
