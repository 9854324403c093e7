"""Where the server listens, and the sentences for where it cannot."""

import socket

import pytest

from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.listen import is_private, listen, tls, url


def test_any_free_port_is_found_and_told():
    config = ServerConfig(port=0, root_path="/llm")
    with listen(config) as made:
        assert is_private(made)
        assert url(config, made) == f"http://127.0.0.1:{made.getsockname()[1]}/llm"
    with listen(ServerConfig(host="0.0.0.0", port=0)) as made:
        assert not is_private(made)
        assert url(ServerConfig(host="0.0.0.0"), made).startswith("http://127.0.0.1:")


def test_a_taken_port_is_told_by_number():
    with listen(ServerConfig(port=0)) as made:
        port = made.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is taken already. Give another --port"):
            listen(ServerConfig(port=port))


@pytest.mark.parametrize(
    ("host", "sentence"),
    [("no-such-host.invalid", "there is no host"), ("203.0.113.7", "is not an address of this machine")],
)
def test_a_wrong_address_is_told(host, sentence):
    with pytest.raises(ConfigError, match=sentence):
        listen(ServerConfig(host=host, port=0))


def test_a_forbidden_port_is_told(monkeypatch):
    def forbid(self, address):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"bind": forbid}))
    with pytest.raises(ConfigError, match=r"port 80 is for administrators\. Give a --port from 1024 on"):
        listen(ServerConfig(port=80))


def test_a_certificate_and_its_key_make_https(certificate):
    config = ServerConfig(ssl_certfile=f"{certificate}/one.crt", ssl_keyfile=f"{certificate}/one.key")
    assert tls(config) is not None
    assert tls(ServerConfig()) is None


@pytest.mark.parametrize(
    ("crt", "key", "sentence"),
    [
        ("absent.crt", "one.key", "there is no file"),
        ("one.crt", "two.key", "mismatch"),
        ("text", "one.key", "cannot be used"),
        ("one.crt", "text", "cannot be used"),
    ],
)
def test_what_is_no_certificate_is_told(certificate, crt, key, sentence):
    config = ServerConfig(ssl_certfile=f"{certificate}/{crt}", ssl_keyfile=f"{certificate}/{key}")
    with pytest.raises(ConfigError, match=sentence):
        tls(config)


@pytest.mark.parametrize(
    "options",
    [
        {"ssl_keyfile": "x"},
        {"ssl_ca_certs": "x"},
        {"root_path": "llm"},
        {"stall_timeout": 0},
        {"requests_per_minute": 0},
    ],
)
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(ConfigError):
        ServerConfig(**options)
