"""Long calls of a program stay where its context is, short ones go where there is room: the load balancer of Autellix
(Luo et al., 2025, arXiv 2502.13965; algorithm 2)."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

from jaxserve.cluster.rule import Rule, least_used
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import ConfigError
from jaxserve.request import Request


@dataclasses.dataclass(slots=True)
class Autellix(Rule):
    """Prompts of more than `long_tokens` go to the replica of their program's first such call, all others to the least
    used one. A pin lasts until the program ends, its replica takes no more requests, or `ttl_s` seconds without use.

    2,048 tokens are the paper's, as re-implementations cite it; 600 s are theirs.
    """

    long_tokens: int = 2048
    ttl_s: float = 600.0
    _pins: OrderedDict[str, tuple[int, float]] = dataclasses.field(default_factory=OrderedDict, init=False)

    def __post_init__(self) -> None:
        if self.long_tokens < 0 or not self.ttl_s > 0:
            raise ConfigError(
                f"router 'autellix': long_tokens={self.long_tokens} must be 0 or more, ttl_s={self.ttl_s:g} above 0"
            )

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """The pinned replica, or the least used one."""
        pins, program = self._pins, request.program
        while pins and now_s - next(iter(pins.values()))[1] > self.ttl_s:  # the one used longest ago
            pins.popitem(last=False)
        choice = least_used(snapshots)
        if not program or len(request.prompt_token_ids) <= self.long_tokens:
            return choice
        pinned = pins.get(program, (-1, 0.0))[0]
        choice = next((snapshot for snapshot in snapshots if snapshot.replica == pinned), choice)
        pins[program] = choice.replica, now_s
        pins.move_to_end(program)
        return choice

    def on_program_end(self, program: str) -> None:
        """Its context is of no more use."""
        self._pins.pop(program, None)
