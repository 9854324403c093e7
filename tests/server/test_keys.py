"""Keys: whose they are, and that they never come out again."""

import json

import pytest

from jaxserve.cli.main import main
from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig
from jaxserve.server.keys import Keys, fingerprint, keys_of

PAIRS = [("ada", "sk-ada"), ("ada", "sk-ada-new"), ("bob", "sk-bob")]


@pytest.mark.parametrize(("client", "key"), PAIRS)
def test_a_key_stands_for_its_client(client, key):
    keys = Keys(PAIRS)
    assert keys.client_of(f"Bearer {key}".encode()) == client
    assert keys.client_of(f"bearer  {key} ".encode()) == client


@pytest.mark.parametrize(
    "given",
    [b"", b"Bearer", b"Bearer ", b"Bearer sk-ad", b"Bearer sk-ada2", b"sk-ada", b"Basic sk-ada", b"Bearer \xff"],
)
def test_anything_else_stands_for_nobody(given):
    assert Keys(PAIRS).client_of(given) is None


def test_all_keys_are_compared_in_constant_time_wherever_the_right_one_stands(monkeypatch):
    seen = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: seen.append((len(a), len(b))) or a == b)
    keys = Keys(PAIRS)
    for key in ("sk-ada", "sk-bob", "wrong", "w" * 1000):
        seen.clear()
        keys.client_of(b"Bearer " + key.encode())
        assert seen == [(32, 32)] * 3, "not every hash was compared"


def test_a_key_that_is_no_text_is_refused_as_others_are():
    with pytest.raises(ConfigError, match="no plain ASCII"):  # what a shell makes of --api-key $'\\xff'
        keys_of(ServerConfig(api_key=["\udcff"]))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"ada": ["sk-ada", "sk-ada-new"], "bob": "sk-bob"}),
        "# who may come in\nada: sk-ada\nada:sk-ada-new\n\n  bob : sk-bob  \n",
    ],
    ids=["json", "lines"],
)
def test_a_file_says_whose_keys_are(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    keys = keys_of(ServerConfig(api_key_file=str(tmp_path / "keys"), api_key=["sk-plain"]))
    assert len(keys) == 4
    assert keys.client_of(b"Bearer sk-ada-new") == "ada"
    assert keys.client_of(b"Bearer sk-bob") == "bob"
    assert keys.client_of(b"Bearer sk-plain") == fingerprint("sk-plain") != fingerprint("sk-other")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no key"),
        ("sk-secret", "line 1"),
        ("ada/x: sk-secret", "cannot be the name of a client"),
        ("ada: ", "empty"),
        ("ada: sk secret", "without spaces"),
        ("ada: sk-secret\nbob: sk-secret", "have the same key"),
        ('{"ada": "sk-secret"', "is not JSON"),
        ('{"ada": {"sk-secret": 1}}', "a key or a list of keys"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_its_keys(tmp_path, text, sentence):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        keys_of(ServerConfig(api_key_file=str(tmp_path / "keys")))
    assert "secret" not in str(caught.value)


def test_a_missing_file_is_told_by_name(tmp_path):
    with pytest.raises(ConfigError, match="absent cannot be read: No such file"):
        keys_of(ServerConfig(api_key_file=str(tmp_path / "absent")))


def test_no_print_of_the_options_shows_a_key():
    assert "sk-plain" not in repr(ServerConfig(api_key=["sk-plain"]))


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, ()),
        ([], {"VLLM_API_KEY": "sk-v"}, ("sk-v",)),
        ([], {"JAXSERVE_API_KEY": "sk-j", "VLLM_API_KEY": "sk-v"}, ("sk-j",)),
        ([], {"JAXSERVE_API_KEY": ""}, ()),
        (["--api-key", "sk-a", "--api-key", "sk-b"], {"JAXSERVE_API_KEY": "sk-j"}, ("sk-a", "sk-b")),
        (["--api-key-file", "keys"], {"JAXSERVE_API_KEY": "sk-j"}, ()),
    ],
)
def test_the_environment_has_a_key_for_those_who_give_none(monkeypatch, arguments, environment, expected):
    for name in ("JAXSERVE_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr("jaxserve.server.run.run_server", lambda config, names, load: started.append(config))
    assert main(["serve", "tiny", *arguments]) == 0
    assert tuple(started[0].api_key) == expected
