"""How much each client may ask for: token buckets over an injected clock, and streams whose tokens are counted."""

import dataclasses
import math

from jaxserve.stream import Stream

OF_BATCHES = "/batches"  # ends the name of a client's second account: names of clients have no slash


@dataclasses.dataclass(slots=True)
class Bucket:
    """Holds `size` at most and fills evenly within a minute. It may go below zero: what was used is owed."""

    size: float
    level: float
    filled_s: float  # until when it was filled

    def fill(self, now_s: float) -> float:
        """Let time pass; returns the level."""
        self.level = min(self.size, self.level + (now_s - self.filled_s) * self.size / 60)
        self.filled_s = now_s
        return self.level

    def wait_s(self, amount: float) -> float:
        """Seconds until it holds so much, as of the last `fill`."""
        return max(0.0, (min(amount, self.size) - self.level) * 60 / self.size)


@dataclasses.dataclass(slots=True)
class Account:
    """What one client has under way and may still ask for."""

    requests: Bucket | None
    tokens: Bucket | None
    num_open: int = 0  # requests under way
    streams: dict[Stream, int] = dataclasses.field(default_factory=dict)  # not ended -> tokens that are paid for

    def settle(self) -> None:
        """Pay for the tokens that have come since the last time. Streams need not say when they end."""
        assert self.tokens is not None
        for stream, paid in list(self.streams.items()):
            answers = () if stream.output is None else stream.output.outputs
            used = len(stream.request.prompt_token_ids) + sum(len(answer.token_ids) for answer in answers)
            self.tokens.level -= used - paid
            self.streams[stream] = used
            if stream.is_ended:
                del self.streams[stream]

    @property
    def is_fresh(self) -> bool:
        """Whether it is as if it had never asked."""
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        return not self.num_open and not self.streams and all(bucket.level >= bucket.size for bucket in buckets)


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken, and after how many seconds it may be."""

    code: str
    message: str
    wait_s: float


class Quotas:
    """The accounts of all clients. For the thread of the event loop; times are of any clock that does not go back."""

    def __init__(
        self,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        max_concurrency: int | None = None,
    ):
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self.max_concurrency = max_concurrency
        self.num_refused = dict[str, int]()  # by code, for metrics
        self._accounts = dict[str, Account]()

    def enter(self, client: str, now_s: float) -> Refusal | None:
        """A request comes. Without a refusal it is under way from now on, until `leave`."""
        account = self._account(client, now_s)
        refusal = self._refusal(account)
        if refusal is not None:
            self.num_refused[refusal.code] = self.num_refused.get(refusal.code, 0) + 1
            return refusal
        account.num_open += 1
        if account.requests is not None:
            account.requests.level -= 1
        return None

    def leave(self, client: str, now_s: float) -> None:
        """A request has ended. Accounts that say nothing are forgotten."""
        self._accounts[client].num_open -= 1
        if self._account(client, now_s).is_fresh:
            del self._accounts[client]

    def follow(self, client: str, stream: Stream) -> None:
        """Let a client pay for the tokens of a stream as they come."""
        if self.tokens_per_minute is not None:
            self._account(client, None).streams[stream] = 0

    def wait_s(self, client: str, now_s: float) -> float:
        """Seconds until a client may use tokens; 0: at once. What it has used is paid for first."""
        if self.tokens_per_minute is None:
            return 0.0
        tokens = self._account(client, now_s).tokens
        assert tokens is not None
        return tokens.wait_s(1) if tokens.level <= 0 else 0.0

    def num_open(self, client: str) -> int:
        """Requests of a client under way."""
        account = self._accounts.get(client)
        return 0 if account is None else account.num_open

    def headers(self, client: str, now_s: float) -> list[tuple[bytes, bytes]]:
        """How much is left, under OpenAI's names. Empty without limits per minute."""
        account = self._account(client, now_s)
        found = []
        for name, bucket in ((b"requests", account.requests), (b"tokens", account.tokens)):
            if bucket is not None:
                found += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.size),
                    (b"x-ratelimit-remaining-" + name, b"%d" % max(0, math.floor(bucket.level))),
                    (b"x-ratelimit-reset-" + name, b"%.3fs" % bucket.wait_s(bucket.size)),
                ]
        return found

    def _account(self, client: str, now_s: float | None) -> Account:
        """Up to date, where a time is given."""
        account = self._accounts.get(client)
        if account is None:
            account = Account(_full(self.requests_per_minute, now_s), _full(self.tokens_per_minute, now_s))
            self._accounts[client] = account
        if now_s is not None:
            if account.requests is not None:
                account.requests.fill(now_s)
            if account.tokens is not None:
                account.tokens.fill(now_s)
                account.settle()
        return account

    def _refusal(self, account: Account) -> Refusal | None:
        if self.max_concurrency is not None and account.num_open >= self.max_concurrency:
            message = f"{account.num_open} requests of this client are under way already, the most it may have"
            return Refusal("concurrency_limit_exceeded", f"{message}; wait for one of them", 1.0)
        if account.requests is not None and account.requests.level < 1:
            wait_s = account.requests.wait_s(1)
            message = f"this client may send {self.requests_per_minute} requests a minute; try again in {wait_s:.1f} s"
            return Refusal("rate_limit_exceeded", message, wait_s)
        if account.tokens is not None and account.tokens.level <= 0:
            wait_s = account.tokens.wait_s(1)
            message = f"this client may use {self.tokens_per_minute} tokens a minute; try again in {wait_s:.1f} s"
            return Refusal("rate_limit_exceeded", message, wait_s)
        return None


def _full(size: int | None, now_s: float | None) -> Bucket | None:
    return None if size is None else Bucket(size, size, now_s or 0.0)
