"""What all routes share: the engine, once it is loaded, and under which names its model is known."""

import dataclasses
import time

from starlette.requests import HTTPConnection

from jaxserve.async_engine import AsyncEngine
from jaxserve.openai.errors import ApiError
from jaxserve.openai.names import served_name
from jaxserve.openai.turn import Dialect
from jaxserve.server.config import ServerConfig
from jaxserve.server.stats import Stats
from jaxserve.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class ServerState:
    """Lives in `app.state.server`."""

    config: ServerConfig
    model_names: tuple[str, ...]
    engine: AsyncEngine | None = None  # until it is loaded
    started: int = dataclasses.field(default_factory=lambda: int(time.time()))
    _dialect: Dialect | None = None
    stats: Stats = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.stats = Stats(self.model_names[0])
        if self.engine is not None:
            self.serve(self.engine)

    def serve(self, engine: AsyncEngine) -> None:
        """From now on it answers."""
        engine.listeners.append(self.stats.recent.add)
        self.engine = engine

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
