"""Which replica is computing which prompt: an index over requests that have been sent and have not ended.

A replica's own cache knows a prompt only when it is computed. Of requests that come together and begin alike, all but the
first would find it nowhere.
"""

from collections.abc import Iterator

from jaxserve.request import Request

_CHUNK = 32  # tokens; prompts are compared in such parts

Key = tuple[str, int]  # namespace, and a hash of all tokens up to the end of a chunk


class Prefixes:
    """By the hash of a prompt's beginning: how many live requests begin so, on each replica."""

    def __init__(self) -> None:
        self._counts: dict[Key, dict[int, int]] = {}
        self._live: dict[str, tuple[list[Key], int]] = {}  # by request id: its chunks, and its replica

    def add(self, request: Request, replica: int) -> None:
        """A request is on its way."""
        keys = list(_keys(request))
        self._live[request.request_id] = keys, replica
        for key in keys:
            counts = self._counts.setdefault(key, {})
            counts[replica] = counts.get(replica, 0) + 1

    def remove(self, request_id: str) -> None:
        """A request has ended; from now on the replica's own cache says what is left of it."""
        keys, replica = self._live.pop(request_id)
        for key in keys:
            counts = self._counts[key]
            counts[replica] -= 1
            if not counts[replica]:
                del counts[replica]
            if not counts:
                del self._counts[key]

    def matches(self, request: Request) -> dict[int, int]:
        """Tokens that the prompt has in common with live requests of each replica, but for its last one: that is fed."""
        depths, most = dict[int, int](), len(request.prompt_token_ids) - 1
        for index, key in enumerate(_keys(request)):
            counts = self._counts.get(key)
            if counts is None:
                break
            for replica in counts:  # who has this chunk has all before it
                depths[replica] = index + 1
        return {replica: min(depth * _CHUNK, most) for replica, depth in depths.items()}


def _keys(request: Request) -> Iterator[Key]:
    tokens, name = request.prompt_token_ids, 0
    for end in range(_CHUNK, len(tokens) + 1, _CHUNK):
        name = hash((name, tokens[end - _CHUNK : end]))
        yield request.namespace, name
