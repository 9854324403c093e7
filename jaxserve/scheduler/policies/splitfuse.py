"""Every step as large as every other: Dynamic SplitFuse of DeepSpeed-FastGen (2024, arXiv 2401.08671).

Long prompts are split over steps, short ones are put together, so that each step has the same number of tokens: the one from
which on larger steps are hardly more efficient. The target is throughput, where `sarathi` looks at the time between tokens.
FastGen throws out a sequence only when nothing at all can run; here it happens, as with every policy, when a decode finds no
block. Order and victims are those of `fcfs`.
"""

import dataclasses
from collections.abc import Sequence

from jaxserve.cost.model import CostModel
from jaxserve.cost.work import prompt_work
from jaxserve.errors import ConfigError
from jaxserve.scheduler.policies.sarathi import halves
from jaxserve.scheduler.policy import Decodes, Policy

_NEAR_BEST = 0.9  # share of the best throughput that the knee of the curve has
_LEAST_LEFT = 16  # tokens for prompts beside more decodes than the size has room for


@dataclasses.dataclass(slots=True, kw_only=True)
class Splitfuse(Policy):
    """Admit by arrival; all steps of one size."""

    cost: CostModel
    rungs: Sequence[int] = ()  # compiled step sizes, ascending; none: halves of the engine's budget
    tokens: int | None = None  # of each step; None: where the cost model's throughput has its knee
    _knees: dict[int, int] = dataclasses.field(default_factory=dict, init=False)  # by the engine's budget

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"option tokens={self.tokens} of the policy 'splitfuse' must be at least 1")

    def token_budget(self, decodes: Decodes, most: int) -> int:
        """The size; more only for decodes, which are never left out, and then for a few tokens of prompts beside them."""
        size = self.tokens or self._knee(most)
        return min(max(size, decodes.num_rows + _LEAST_LEFT if decodes.num_rows >= size else 0), most)

    def _knee(self, most: int) -> int:
        """The smallest size with nearly the best throughput of prompts."""
        if most not in self._knees:
            sizes = [size for size in self.rungs or halves(most) if size <= most] or [most]
            rates = [size / self.cost.step_s(prompt_work(size)) for size in sizes]
            self._knees[most] = next(s for s, rate in zip(sizes, rates, strict=True) if rate >= _NEAR_BEST * max(rates))
        return self._knees[most]
