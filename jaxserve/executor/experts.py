"""Experts while an engine runs: how many tokens each was given, and which slots hold its weights. Host only, but for types.

Where experts are held is data to a step: when loads drift, weights move to other slots between two steps and nothing
compiles. Source: EPLB, https://github.com/deepseek-ai/EPLB.
"""

from typing import Any

import numpy as np

from jaxserve.models.config_experts import Experts
from jaxserve.models.moe import Placement
from jaxserve.sharding import balance

_KEPT = 0.99  # of the recent load, each step


class ExpertBook:
    """Loads and places of the experts of all layers.

    num_devices: that share the experts of a layer.
    rebalance_steps: after so many steps weights move to where recent loads want them; 0: they stay.
    """

    def __init__(self, experts: Experts, num_devices: int, rebalance_steps: int):
        self.plan = balance.in_turn(len(experts.layers), experts.count, experts.num_slots)
        self.num_moves = 0  # slots that were given other weights
        self.layers = [index for index, has_experts in enumerate(experts.layers) if has_experts]
        self._num_devices, self._rebalance_steps = num_devices, rebalance_steps
        self._total_lx = np.zeros((len(experts.layers), experts.count), np.int64)
        self._recent_lx = np.zeros(self._total_lx.shape)
        self._active = 0  # experts with a token, over all steps and layers
        self._steps = self._moved_at = 0
        self._is_fixed = experts.num_slots == experts.count and not rebalance_steps

    @property
    def placement(self) -> Placement[Any] | None:
        """For the next step; None if slot i holds expert i for ever."""
        return None if self._is_fixed else Placement(self.plan.slots_lxc, self.plan.copies_lx)

    def note(self, counts_rlx: np.ndarray) -> None:
        """Tokens that a step gave to each expert, for each replica of the weights."""
        counts_lx = counts_rlx.sum(axis=0)
        self._total_lx += counts_lx
        self._recent_lx = _KEPT * self._recent_lx + counts_lx
        self._active += int((counts_rlx > 0).sum())
        self._steps += len(counts_rlx)

    def next_sources(self, num_dispatched: int) -> np.ndarray | None:
        """If experts should move now: the slot whose weights each slot takes, i32[l s]. They count as moved afterwards."""
        due = self._rebalance_steps and num_dispatched - self._moved_at >= self._rebalance_steps
        if not due or not self._recent_lx.any():
            return None
        self._moved_at = num_dispatched
        new = balance.plan(self._recent_lx, self.plan.expert_ls.shape[1], self._num_devices)
        if self._slowest(new) >= self._slowest(self.plan):
            return None
        source_ls = balance.sources(self.plan, new, self._num_devices)[self.layers]
        self.num_moves += int((source_ls != np.arange(source_ls.shape[1])).sum())
        self.plan = new
        return source_ls

    def metrics(self) -> dict[str, Any]:
        """Totals, and how uneven the devices' recent loads are: the fullest over the mean, of the layers' average."""
        return {
            "expert_tokens": self._total_lx[self.layers].tolist(),
            "active_experts": self._active / max(self._steps * len(self.layers), 1),
            "expert_imbalance": self._slowest(self.plan),
            "expert_moves": self.num_moves,
        }

    def _slowest(self, plan: balance.Plan) -> float:
        share_ld = plan.shares(self._recent_lx, self._num_devices)[self.layers]
        mean_l = np.maximum(share_ld.mean(axis=1), 1e-9)
        return float((share_ld.max(axis=1) / mean_l).mean()) if self._recent_lx.any() else 1.0
