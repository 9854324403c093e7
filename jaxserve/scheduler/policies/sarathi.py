"""Prompts get what time decodes leave: Sarathi-Serve (OSDI 2024, arXiv 2403.02310), its token budget chosen anew each step.

The paper profiles a model once, and fixes the largest budget whose steps stay under the wanted time between tokens (TBT).
Here the cost model is asked before every step, with the decodes of that step, and with the place in its prompt that the
longest prompt under way has got to: so the budget shrinks as contexts grow, and is whole while nobody decodes. Steps without
prompts are as long as their decodes make them; no budget can help that. Order and victims are those of `fcfs`.
"""

import dataclasses
from collections.abc import Sequence

from jaxserve.cost.model import CostModel
from jaxserve.cost.work import prompt_work
from jaxserve.errors import ConfigError
from jaxserve.scheduler.policy import Decodes, Policy, View

_LEAST_TOKENS = 16  # of a step, where no sizes are given


@dataclasses.dataclass(slots=True, kw_only=True)
class Sarathi(Policy):
    """Admit by arrival; size each step by its time."""

    cost: CostModel
    rungs: Sequence[int] = ()  # compiled step sizes, ascending; none: halves of the engine's budget
    tbt_s: float = 0.1  # the wanted time between two tokens of an answer, in seconds
    margin: float = 0.9  # how much of it a step may take by the model
    _fed: dict[str, int] = dataclasses.field(default_factory=dict, init=False)  # tokens of each prompt under way

    def __post_init__(self) -> None:
        for name in ("tbt_s", "margin"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"option {name}={getattr(self, name)!r:.40} of the policy 'sarathi' must be above 0")

    def token_budget(self, decodes: Decodes, most: int) -> int:
        """The largest step size that takes no longer than wanted; at least the smallest one with room for a token of a
        prompt, for prompts must come to an end."""
        num_decodes, num_context = decodes
        if not num_decodes:
            return most
        start, wanted_s, best = max(self._fed.values(), default=0), self.margin * self.tbt_s, 0
        for rung in self.rungs or halves(most):
            budget = min(rung, most)
            if budget <= max(num_decodes, best):
                continue
            count = budget - num_decodes
            work = prompt_work(count, start, decodes=num_decodes, decode_kv=num_context, rung=rung)
            if best and self.cost.step_s(work) > wanted_s:
                break
            best = budget
        return best or most

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """The last one admitted. Its prompt starts over."""
        view = Policy.victim(self, running, now_s)
        self._fed.pop(view.seq_id, None)
        return view

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """A prompt is under way."""
        del now_s
        self._fed[view.seq_id] = num_cached

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """How far it has got; who is not under way has got to the end."""
        if prefill_tokens:
            num_total = view.num_prompt + view.num_output
            fed = self._fed.get(view.seq_id, num_total) + prefill_tokens
            if fed < num_total:
                self._fed[view.seq_id] = fed
            else:
                self._fed.pop(view.seq_id, None)

    def on_finish(self, view: View, now_s: float) -> None:
        """Aborted, perhaps, before its prompt was fed."""
        self._fed.pop(view.seq_id, None)


def halves(most: int) -> list[int]:
    """Step sizes where none are known: `most` and its halves, ascending."""
    sizes = [most]
    while sizes[-1] >= 2 * _LEAST_TOKENS:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]
