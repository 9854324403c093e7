"""What was done for each client."""

import dataclasses
from collections import OrderedDict

_MOST_CLIENTS = 10_000  # names come from outside


@dataclasses.dataclass(slots=True)
class Account:
    """Totals of one client."""

    sequences: int = 0
    finished: int = 0
    aborted: int = 0
    prompt_tokens: int = 0  # computed, those computed again included
    cached_tokens: int = 0  # prompt tokens that did not have to be
    output_tokens: int = 0
    preemptions: int = 0
    num_running: int = 0


class Accounts:
    """By client's name. Of very many clients, those that have not asked for longest are forgotten."""

    def __init__(self) -> None:
        self._accounts: OrderedDict[str, Account] = OrderedDict()

    def of(self, client: str) -> Account:
        """A client's account, opened if need be."""
        account = self._accounts.setdefault(client, Account())
        self._accounts.move_to_end(client)
        for _ in range(min(2, len(self._accounts) - _MOST_CLIENTS)):  # two, to make up for those that are busy
            oldest, idle = next(iter(self._accounts.items()))
            if idle.sequences == idle.finished + idle.aborted:
                del self._accounts[oldest]
            else:
                self._accounts.move_to_end(oldest)
        return account

    def running(self, client: str) -> int:
        """Sequences of a client that run. Any thread may ask."""
        account = self._accounts.get(client)
        return 0 if account is None else account.num_running

    def as_dict(self) -> dict[str, dict[str, int]]:
        """For metrics."""
        return {client: dataclasses.asdict(account) for client, account in self._accounts.items()}
