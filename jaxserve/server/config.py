"""Server options: one dataclass, from which the flags of `jaxserve serve` are made."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxserve.config import names_unknown_options, option
from jaxserve.errors import ConfigError
from jaxserve.openai.reasoning import PARSERS as REASONING_PARSERS
from jaxserve.openai.reasoning import ReasoningParser
from jaxserve.openai.tools.choose import CHOICES as TOOL_PARSERS
from jaxserve.openai.tools.choose import parser_name

FORM_BYTES = 64 << 10  # of an upload, beside the file
# What belongs together, here and in --help: the first option of each group, and what the group is called.
GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "host": "where it listens",
        "served_model_name": "how it answers",
        "log_format": "what is seen of it",
        "api_key": "who may come in",
        "max_requests": "how much of it",
        "request_timeout": "how long",
        "response_store_bytes": "responses, files and batches that are kept",
    }
)


@names_unknown_options
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Every option of the server, under vLLM's names where it has one."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all, and then think of --api-key")
    port: int = option(8000, "port to listen on; 0: any free one")
    root_path: str = option("", "path before all of ours that a proxy takes away, as /llm")

    served_model_name: Sequence[str] = option((), "name of the model in requests; default: as it was given")
    enable_auto_tool_choice: bool = option(True, "let models decide to call tools where requests leave it to them")
    tool_call_parser: str = option(
        "auto", "how the model writes tool calls; auto: as its chat template says", choices=TOOL_PARSERS
    )
    reasoning_parser: str | None = option(
        None, "take the model's thoughts out of its answers", choices=tuple(REASONING_PARSERS)
    )
    stream_interval: int = option(
        1, "tokens of a stream that go into one chunk; more cost the server less (the first is sent at once)"
    )
    stream_delay: float = option(
        0.05,
        "most seconds that a token waits for others to share its chunk, and at most a millisecond for each stream that"
        " is open; 0: never",
    )

    log_format: str = option("text", "lines for people, or JSON objects for machines", ("text", "json"))
    log_level: str = option(
        "info", "how much is logged; prompts may be quoted at debug only", ("debug", "info", "warning", "error")
    )
    log_requests: bool = option(True, "log a line for each request that has ended")
    otlp_traces_endpoint: str | None = option(
        None, "collector of OpenTelemetry traces (OTLP over HTTP), as http://127.0.0.1:4318/v1/traces"
    )

    api_key: Sequence[str] = dataclasses.field(
        default=(),
        repr=False,
        metadata={
            "help": "key that callers must bring (Authorization: Bearer KEY), each a client of its own, named by its hash. "
            "Others on this machine can read it in the list of processes: $JAXSERVE_API_KEY or --api-key-file cannot be"
        },
    )
    api_key_file: str | None = option(
        None, 'file of keys and whose they are: lines "client: key", or JSON {"client": "key" or ["key", ...]}'
    )
    isolate_clients: bool = option(
        False,
        "no client finds prompts of another in the prefix cache: how fast one answers tells nothing of the others",
    )
    cors_allow_origin: Sequence[str] = option(
        (), "web site whose pages may call the server from a browser, as https://chat.example.org; * for all"
    )
    allowed_host: Sequence[str] = option(
        (), "more names that the server goes by, when it listens on this machine only and has no key"
    )
    ssl_keyfile: str | None = option(None, "private key, for https")
    ssl_certfile: str | None = option(None, "certificate, for https")
    ssl_ca_certs: str | None = option(None, "certificates of authorities: callers must bring a certificate of theirs")

    max_requests: int = option(1024, "most unfinished requests; more are refused with status 503")
    max_body_bytes: int = option(4 << 20, "longest body of a request, in bytes (files: see max_file_bytes)")
    max_prompt_tokens: int | None = option(None, "longest prompt; default: what the model can hold")
    max_tokens_per_request: int | None = option(
        None, "longest answer; who asks for more is refused, who does not say gets this many"
    )
    max_answers_per_request: int = option(128, "most answers to one prompt (n)")
    max_concurrency_per_client: int | None = option(None, "most requests of one key under way; more get status 429")
    requests_per_minute: int | None = option(None, "for each key; more get status 429")
    tokens_per_minute: int | None = option(
        None,
        "of prompts and answers, for each key; then status 429 until paid off. Its batches have as many of their own, and "
        "wait; the two limits above are not theirs",
    )
    max_connections: int = option(4096, "most open connections; more are closed at once")
    max_header_bytes: int = option(32 << 10, "longest head of a request, in bytes; more gets status 431")

    request_timeout: float = option(0.0, "seconds from a request to the end of its answer, then 504; 0: no limit")
    enforce_deadlines: bool = option(False, "end a request when its own deadline_ms are over, instead of late")
    header_timeout: float = option(10.0, "seconds in which the head of a request must have come")
    stall_timeout: float = option(
        60.0, "seconds after which who sends none of its body, or takes none of its answer, is dropped"
    )
    keep_alive_timeout: float = option(75.0, "seconds that a connection without a request stays open")
    drain_timeout: float = option(
        30.0, "seconds that requests under way get to end after SIGTERM or Ctrl-C; then they are cut short"
    )

    response_store_bytes: int = option(
        64 << 20, "most memory for responses that can be asked for again (/v1/responses), in bytes; 0: none are kept"
    )
    files_dir: str | None = option(None, "folder of uploaded files and batches; default: files in the cache folder")
    max_file_bytes: int = option(512 << 20, "longest file that may be uploaded")
    max_client_file_bytes: int = option(8 << 30, "most bytes that the files of a client may have together")
    file_ttl: float = option(30 * 86400.0, "seconds that files, and what is known of batches, are kept at most")
    batch_share: float = option(
        0.5,
        "share of max_num_seqs that batches may take, as long as nobody else wants it",
    )
    max_batch_lines: int = option(50_000, "most requests of a batch")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port={self.port} must be from 0 to 65535")
        parser_name(self.tool_call_parser, None)
        if self.reasoning_parser is not None:
            ReasoningParser(self.reasoning_parser, None)
        if self.response_store_bytes < 0:
            raise ConfigError(f"response_store_bytes={self.response_store_bytes} must be 0 or more")
        if not 0 < self.batch_share <= 1:
            raise ConfigError(f"batch_share={self.batch_share} must be above 0 and at most 1")
        if not 0 < self.file_ttl < math.inf:
            raise ConfigError(f"file_ttl={self.file_ttl} must be a number of seconds above 0")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be above 0")
        for name in ("header_timeout", "stall_timeout", "keep_alive_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number of seconds above 0")
        for name in ("request_timeout", "drain_timeout", "stream_delay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number of seconds, 0 or more")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path={self.root_path!r:.80} must begin with a slash and not end with one")
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ConfigError("https needs both ssl_keyfile and ssl_certfile")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise ConfigError("ssl_ca_certs is for https", remedy="Give ssl_keyfile and ssl_certfile too")

    @property
    def has_keys(self) -> bool:
        """Whether callers must bring a key."""
        return bool(self.api_key or self.api_key_file)


_COUNTS = (
    "stream_interval",
    "max_requests",
    "max_body_bytes",
    "max_prompt_tokens",
    "max_tokens_per_request",
    "max_answers_per_request",
    "max_concurrency_per_client",
    "requests_per_minute",
    "tokens_per_minute",
    "max_connections",
    "max_header_bytes",
    "max_file_bytes",
    "max_client_file_bytes",
    "max_batch_lines",
)
