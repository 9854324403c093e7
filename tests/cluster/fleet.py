"""Snapshots and requests for tests of routers, and replicas that only count."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.cluster.router import Router
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.request import Request


def snapshot(replica: int = 0, *, cached: int = 0, service_s: float = 1.0, **values: Any) -> Snapshot:
    """An idle replica of 100 blocks of 16 tokens, where not said otherwise."""
    idle: dict[str, Any] = {
        "time_s": 0.0,
        "num_accepted": 0,
        "engine_type": "",
        "num_slots": 8,
        "num_blocks": 100,
        "block_size": 16,
        "num_free": 100,
        "num_running": 0,
        "num_waiting": 0,
        "num_urgent": 0,
        "waiting_blocks": 0,
        "first_waiting_blocks": 0,
        "queued_tokens": 0,
        "work_s": 0.0,
        "cached": lambda tokens, namespace: min(cached, len(tokens)),
        "service_s": lambda request: service_s,
    }
    return Snapshot(replica=replica, **(idle | values))


def request(name: str, prompt: int | Sequence[int] = 16, **values: Any) -> Request:
    """A prompt of that length, of tokens of its own, or of those given."""
    tokens = (hash(name) % 1000 + 1,) * prompt if isinstance(prompt, int) else tuple(prompt)
    return Request(request_id=name, prompt_token_ids=tokens, **values)


class Fleet:
    """Replicas that take in what they are sent at once, and keep it until it is ended. `service` is seconds by replica."""

    def __init__(self, router: Router, service: Sequence[float] = (1.0, 1.0), **values: Any):
        self.router = router
        self.service = service
        self.draining = set[int]()
        self.charged: list[dict[str, float]] = [{} for _ in service]
        self._values = values
        self._live: dict[str, tuple[Request, int]] = {}
        self._num_accepted = [0] * len(service)

    def snapshots(self) -> list[Snapshot]:
        return [self._snapshot(replica) for replica in range(len(self.service))]

    def send(self, each: Request, now_s: float = 0.0, snapshots: Sequence[Snapshot] | None = None) -> int:
        replica = self.router.route(each, self.snapshots() if snapshots is None else snapshots, now_s)
        self._live[each.request_id] = each, replica
        self._num_accepted[replica] += 1
        return replica

    def end(self, name: str, num_output: int = 0) -> None:
        del self._live[name]
        self.router.finish(name, num_output)

    def _snapshot(self, replica: int) -> Snapshot:
        here = [each for each, where in self._live.values() if where == replica]
        values: Mapping[str, Any] = {
            "num_accepted": self._num_accepted[replica],
            "num_waiting": len(here),
            "waiting_blocks": sum(-(-(len(each.prompt_token_ids) + 1) // 16) for each in here),
            "num_urgent": sum(each.priority < 0 for each in here),
            "queued_tokens": sum(len(each.prompt_token_ids) for each in here),
            "work_s": len(here) * self.service[replica],
            "is_draining": replica in self.draining,
        }
        return snapshot(replica, service_s=self.service[replica], **{**values, **self._values})
