"""Server-sent events: bytes as they arrive, into the data of whole events.

https://html.spec.whatwg.org/multipage/server-sent-events.html, of which clients of OpenAI's protocol need `data`.
"""


class Events:
    """Splits a body. A line, or a character, may come in several parts."""

    def __init__(self) -> None:
        self._line = b""  # the beginning of one
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """The data of events that are whole now."""
        whole = list[bytes]()
        *lines, self._line = (self._line + part).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                whole.append(b"\n".join(self._data))
                self._data = []
        return whole

    def rest(self) -> list[bytes]:
        """What is left when the body has ended: an event that has no empty line behind it."""
        return self.feed(b"\n\n")
