"""Server options: one dataclass, from which the flags of `jaxserve serve` are made."""

import dataclasses
import math
from collections.abc import Sequence

from jaxserve.config import names_unknown_options, option
from jaxserve.errors import ConfigError
from jaxserve.openai.reasoning import PARSERS as REASONING_PARSERS
from jaxserve.openai.reasoning import ReasoningParser
from jaxserve.openai.tools.choose import CHOICES as TOOL_PARSERS
from jaxserve.openai.tools.choose import parser_name


@names_unknown_options
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Every option of the server, under vLLM's names where it has one."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all, and then think of --api-key")
    port: int = option(8000, "port to listen on; 0: any free one")
    served_model_name: Sequence[str] = option((), "name of the model in requests; default: as it was given")
    enable_auto_tool_choice: bool = option(True, "let models decide to call tools where requests leave it to them")
    tool_call_parser: str = option(
        "auto", "how the model writes tool calls; auto: as its chat template says", choices=TOOL_PARSERS
    )
    reasoning_parser: str | None = option(
        None, "take the model's thoughts out of its answers", choices=tuple(REASONING_PARSERS)
    )
    max_requests: int = option(1024, "most unfinished requests; more are refused with status 503")
    max_body_bytes: int = option(4 << 20, "longest body of a request, in bytes (files: see max_file_bytes)")

    # Files and batches.
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
        if not 0 < self.batch_share <= 1:
            raise ConfigError(f"batch_share={self.batch_share} must be above 0 and at most 1")
        if not 0 < self.file_ttl < math.inf:
            raise ConfigError(f"file_ttl={self.file_ttl} must be a number of seconds above 0")
        for name in ("max_requests", "max_body_bytes", "max_file_bytes", "max_client_file_bytes", "max_batch_lines"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
