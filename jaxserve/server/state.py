"""What all routes share: the engine, once it is loaded, and under which names its model is known."""

import dataclasses
import time
from collections.abc import Callable

from starlette.requests import HTTPConnection

from jaxserve.async_engine import AsyncEngine
from jaxserve.openai.errors import ApiError
from jaxserve.openai.names import served_name
from jaxserve.openai.turn import Dialect
from jaxserve.request import Request
from jaxserve.server import limits
from jaxserve.server.buckets import OF_BATCHES, Quotas
from jaxserve.server.config import ServerConfig
from jaxserve.server.lane import REQUEST_PREFIX
from jaxserve.server.metrics import Metrics
from jaxserve.server.response_store import ResponseStore
from jaxserve.server.stats import Stats
from jaxserve.server.traffic import Traffic
from jaxserve.server.visit import note
from jaxserve.stream import Pace, Stream
from jaxserve.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class ServerState:
    """Lives in `app.state.server`."""

    config: ServerConfig
    model_names: tuple[str, ...]
    engine: AsyncEngine | None = None  # until it is loaded
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    is_closing: bool = False  # no more requests are taken
    stats: Stats = dataclasses.field(init=False)
    traffic: Traffic = dataclasses.field(default_factory=Traffic)
    metrics: Metrics = dataclasses.field(init=False)
    quotas: Quotas = dataclasses.field(init=False)
    pace: Pace = dataclasses.field(init=False)  # of streamed answers
    responses: ResponseStore = dataclasses.field(init=False)
    _review: Callable[[Request], Request] = dataclasses.field(init=False)
    _dialect: Dialect | None = None

    def __post_init__(self) -> None:
        self.stats = Stats(self.model_names[0])
        self.responses = ResponseStore(self.config.response_store_bytes)
        self.metrics = Metrics(self.model_names[0], self.traffic)
        self.quotas = Quotas(
            requests_per_minute=self.config.requests_per_minute,
            tokens_per_minute=self.config.tokens_per_minute,
            max_concurrency=self.config.max_concurrency_per_client,
        )
        self.pace = Pace(self.config.stream_interval, self.config.stream_delay)
        if self.engine is not None:
            self.serve(self.engine)

    def serve(self, engine: AsyncEngine) -> None:
        """From now on it answers."""
        self._review = limits.review(self.config)
        engine.listeners.extend([self._charge, self.stats.recent.add, note])
        self.metrics.engine = engine
        engine.intake.reviews.append(self._review)
        self.engine = engine

    def release(self) -> None:
        """The engine may serve others now."""
        if self.engine is not None:
            self.engine.listeners.remove(self._charge)
            self.engine.listeners.remove(self.stats.recent.add)
            self.engine.listeners.remove(note)  # one of them, if another app has this engine too
            self.engine.intake.reviews.remove(self._review)
            self.engine = self.metrics.engine = None

    def _charge(self, stream: Stream) -> None:
        client = stream.request.client
        is_of_batch = stream.request_id.startswith(REQUEST_PREFIX)
        self.quotas.follow(self.account_of_batches(client) if is_of_batch else self.account_of(client), stream)

    def account_of(self, client: str) -> str:
        """Who pays. Without keys a client is whoever it says, so all share one account."""
        return client if self.config.has_keys else ""

    def account_of_batches(self, client: str) -> str:
        """Who pays for batches: what they use is not taken from requests that somebody waits for."""
        return self.account_of(client) + OF_BATCHES

    @property
    def ready_engine(self) -> AsyncEngine:
        """The engine.

        Raises:
          ApiError: 503, while it is being loaded.
        """
        if self.engine is None:
            raise ApiError("the model is still being loaded; try again in a moment", status=503, code="loading")
        return self.engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        intake = self.ready_engine.intake
        return intake.tokenizer if intake.has_tokenizer else None

    @property
    def dialect(self) -> Dialect:
        """How the model writes calls and thoughts."""
        if self._dialect is None:
            options = self.config
            self._dialect = Dialect.of(
                self.tokenizer,
                tool_parser=options.tool_call_parser if options.enable_auto_tool_choice else "none",
                reasoning_parser=options.reasoning_parser,
            )
        return self._dialect

    def model(self, name: str | None) -> str:
        """The name that the answer carries.

        Raises:
          ApiError: 404, for a model that is not served.
        """
        return served_name(name, self.model_names)


def state_of(connection: HTTPConnection) -> ServerState:
    """The state of the app that a request has come to."""
    return connection.app.state.server
