"""Flags are generated from dataclass fields."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from jaxserve.cli.flags import add_dataclass_flags, given, parse
from jaxserve.config import nearest
from jaxserve.server.config import GROUPS, ServerConfig


@dataclasses.dataclass(frozen=True)
class Options:
    model: str = ""
    max_num_seqs: int = dataclasses.field(default=32, metadata={"help": "sequences per step, 100% of them"})
    temperature: float = 1.0
    seed: int | None = None
    enable_prefix_caching: bool = True
    load_format: str = dataclasses.field(default="auto", metadata={"choices": ("auto", "dummy")})
    stop: str | Sequence[str] | None = None
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = None


def read(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(prog="jaxserve test", allow_abbrev=False)
    parser.add_argument("prompts", nargs="*")
    add_dataclass_flags(parser, Options, "options", skip=["model"])
    return given(parse(parser, list(arguments)), Options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--max-num-seqs", "4"], {"max_num_seqs": 4}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--seed", "7", "a prompt"], {"seed": 7}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--load-format", "dummy"], {"load_format": "dummy"}),
        (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
        (["--stop-token-ids", "3"], {"stop_token_ids": [3]}),
        (["--logit-bias", '{"50": -2.5}'], {"logit_bias": {50: -2.5}}),
    ],
)
def test_only_given_flags_arrive_with_their_types(arguments, expected):
    assert read(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-num-seq", "4"], "did you mean --max-num-seqs?"),
        (["--max_num_seqs=4"], "did you mean --max-num-seqs?"),
        (["--zzz"], "unknown option --zzz"),
        (["--max-num-seqs", "many"], "invalid int value"),
        (["--load-format", "pickle"], "invalid choice"),
        (["--logit-bias", "{"], "is not JSON"),
        (["--logit-bias", "[1]"], "is not a JSON object"),
        (["--logit-bias", '{"a": 1}'], "must be of type int"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        read(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_nearest_keeps_silent_when_nothing_is_near():
    assert nearest("genrate", ["generate", "chat"]) == "generate"
    assert nearest("xylophone", ["generate", "chat"]) is None


def test_flags_are_shown_in_groups(capsys):
    parser = argparse.ArgumentParser()
    add_dataclass_flags(parser, Options, "options", groups={"model": "what", "seed": "how"})
    parser.print_help()
    shown = capsys.readouterr().out
    order = [shown.index(text) for text in ("options, what:", "  --temperature", "options, how:", "  --seed")]
    assert order == sorted(order)


def test_groups_of_the_server_name_its_options():
    names = [field.name for field in dataclasses.fields(ServerConfig)]
    assert [name for name in names if name in GROUPS] == list(GROUPS)
    assert names[0] == next(iter(GROUPS))
