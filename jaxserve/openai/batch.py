"""/v1/batches: the body that makes a batch."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jaxserve.openai.fields import Body

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_LONGEST_S = 30 * 86400

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ExpiresAfter(Body):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class BatchBody(Body):
    """The body of a request. `completion_window`: OpenAI's "24h", or another number of s, m, h or d."""

    input_file_id: Annotated[str, Field(max_length=100)]
    endpoint: Annotated[str, Field(max_length=100)]
    completion_window: str
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _is_window(cls, text: Any) -> Any:
        found = _WINDOW.fullmatch(text)
        if found is None or seconds_of(text) > _LONGEST_S:
            raise ValueError("it must be a time of at most 30 days, as 24h, 30m or 7d")
        return text

    @property
    def window_s(self) -> int:
        """Seconds until an unfinished batch expires."""
        return seconds_of(self.completion_window)


def seconds_of(window: str) -> int:
    """`24h` -> 86400."""
    return int(window[:-1]) * _UNITS[window[-1]]
