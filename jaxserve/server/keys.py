"""API keys, and whose they are. Only their hashes are kept."""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")  # no slash: names stand before one in names of programs
_LONGEST = 4096  # characters of a key


class Keys:
    """Who a key belongs to. One client may have several, so that they can be changed."""

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        """`pairs`: (client, key).

        Raises:
          ConfigError: a name or key that cannot be one, or a key of two clients. It is not repeated.
        """
        self._clients = dict[bytes, str]()  # by hash
        for client, key in pairs:
            if not _NAME.fullmatch(client):
                raise ConfigError(
                    f"{client!r:.80} cannot be the name of a client: up to 64 letters, digits and any of . _ @ + -"
                )
            if not key.isascii() or not key.isprintable() or " " in key or not 1 <= len(key) <= _LONGEST:
                raise ConfigError(f"a key of client {client!r} is empty, too long, or no plain ASCII without spaces")
            if self._clients.setdefault(_hash(key.encode()), client) != client:
                raise ConfigError(f"clients {self._clients[_hash(key.encode())]!r} and {client!r} have the same key")

    def __len__(self) -> int:
        return len(self._clients)

    def client_of(self, authorization: bytes) -> str | None:
        """Whose key an `Authorization` header brings; None: nobody's.

        Takes the same time for all keys: hashes are compared, all of them, each to its end.
        """
        scheme, _, key = authorization.strip().partition(b" ")
        given, found = _hash(key.strip()), None
        for known, client in self._clients.items():
            if hmac.compare_digest(given, known):
                found = client
        return found if scheme.lower() == b"bearer" else None


def keys_of(config: ServerConfig) -> Keys:
    """All keys of the options and of the file that they name.

    Raises:
      ConfigError: there is no such file, or it is none of keys.
    """
    pairs = [(fingerprint(key), key) for key in config.api_key]
    if config.api_key_file is not None:
        pairs += _read(Path(config.api_key_file))
    return Keys(pairs)


def fingerprint(key: str) -> str:
    """The name of a client of whom nothing is known but the key: 32 bits of a hash of it, the same after a restart."""
    return "key-" + hashlib.sha256(b"jaxserve client " + key.encode(errors="replace")).hexdigest()[:8]


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"the keys in {path} cannot be read: {reason}") from None
    pairs = list(_of_json(path, text) if text.lstrip().startswith("{") else _of_lines(path, text))
    if not pairs:
        raise ConfigError(f"there is no key in {path}, so nobody could come in")
    return pairs


def _of_json(path: Path, text: str) -> Iterator[tuple[str, str]]:
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON (line {error.lineno}, column {error.colno})") from None
    assert isinstance(content, Mapping)  # it begins with a brace
    for client, keys in content.items():
        keys = [keys] if isinstance(keys, str) else keys
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ConfigError(f"{path}: client {client!r:.80} must have a key or a list of keys, each a text")
        for key in keys:
            yield client, key


def _of_lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            client, colon, key = line.partition(":")
            if not colon:
                raise ConfigError(f'{path}, line {number}: write "client: key"')
            yield client.strip(), key.strip()
