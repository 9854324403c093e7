"""The socket and the certificates, tried before a model is loaded, so that a mistake is told at once."""

import errno
import socket
import ssl
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import is_local

_BACKLOG = 2048


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens where the options say.

    Raises:
      ConfigError: the port is taken or forbidden, or there is no such address.
    """
    host, port = config.host, config.port
    try:
        family, kind, number, _, address = _resolved(host, port)
    except (socket.gaierror, UnicodeError):
        raise ConfigError(f"there is no host {host!r:.100}", remedy="Give --host an address of this machine") from None
    made = socket.socket(family, kind, number)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise _told(error, host, port) from None
    made.setblocking(False)
    return made


def _resolved(host: str, port: int) -> tuple[Any, ...]:
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]


def _told(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} of {host} is taken already", remedy="Give another --port, or 0 for any free one"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} is for administrators", remedy="Give a --port from 1024 on")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"{host} is not an address of this machine", remedy="Give --host one of its own, or 0.0.0.0")
    return ConfigError(f"{host}:{port} cannot be listened on: {(error.strerror or str(error)).lower()}")


def tls(config: ServerConfig) -> ssl.SSLContext | None:
    """What https needs; None without a certificate.

    Raises:
      ConfigError: a file is missing, is no certificate or key, or the two do not belong together.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return None
    for path in (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs):
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"there is no file {path}", remedy="Give --ssl-keyfile and --ssl-certfile in PEM format")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password: asked for one, OpenSSL would wait for the terminal.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
            context.verify_mode = ssl.CERT_REQUIRED
    except (ssl.SSLError, OSError) as error:
        reason = (getattr(error, "reason", None) or error.strerror or "").replace("_", " ").lower()
        files = " or ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)))
        raise ConfigError(f"{files} cannot be used: {reason}", remedy="Give PEM files without a password") from None
    return context


def url(config: ServerConfig, listening: socket.socket) -> str:
    """Where a client on this machine finds it."""
    port = listening.getsockname()[1]
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host  # noqa: S104  it is only compared
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if config.ssl_certfile else 'http'}://{host}:{port}{config.root_path}"


def is_private(listening: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return is_local(listening.getsockname()[0])
