"""Thoughts and answers, however the text is cut and wherever the opening tag stands."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.openai.reasoning import ReasoningParser, Split


def split(name: str, prompt: str | None, texts: list[str]) -> Split:
    """All that is handed out."""
    parser = ReasoningParser(name, prompt)
    splits = [parser.push(text) for text in texts] + [parser.finish()]
    return Split("".join(s.thought for s in splits), "".join(s.answer for s in splits))


OPENED, CLOSED, PLAIN = (
    "<|assistant|>\n<think>\n",
    "<|assistant|>\n<think>\n\n</think>\n\n",
    "<think>a</think>b<|assistant|>",
)


@pytest.mark.parametrize(
    ("name", "prompt", "text", "thought", "answer"),
    [
        ("qwen3", PLAIN, "<think>\nHm.\n</think>\n\nYes.", "\nHm.\n", "\n\nYes."),
        ("qwen3", PLAIN, "\n<think>Hm.", "Hm.", ""),
        ("qwen3", PLAIN, "Yes <think>.", "", "Yes <think>."),
        ("qwen3", PLAIN, "<thi", "", "<thi"),
        ("qwen3", PLAIN, "", "", ""),
        ("qwen3", OPENED, "Hm.</think>Yes.", "Hm.", "Yes."),
        ("qwen3", OPENED, "Hm.</thi", "Hm.</thi", ""),
        ("qwen3", OPENED, "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("qwen3", CLOSED, "Yes.</think>", "", "Yes.</think>"),
        ("deepseek_r1", PLAIN, "Hm.</think>Yes.</think>", "Hm.", "Yes.</think>"),
        ("deepseek_r1", PLAIN, "<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", None, "Hm", "Hm", ""),
        ("deepseek_r1", CLOSED, "Yes", "", "Yes"),
    ],
)
def test_where_thoughts_begin_and_end(name: str, prompt: str | None, text: str, thought: str, answer: str) -> None:
    assert split(name, prompt, [text]) == Split(thought, answer)
    assert split(name, prompt, list(text)) == Split(thought, answer)


FRAGMENTS = ("<think>", "</think>", "<thi", "</th", "<", "/", " ", "\n", "text")


@given(
    st.sampled_from(["qwen3", "deepseek_r1"]),
    st.sampled_from([OPENED, CLOSED, PLAIN]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=9),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_the_cuts_do_not_matter(name: str, prompt: str, fragments: list[str], seed: int) -> None:
    text, rng = "".join(fragments), random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split(name, prompt, [text])
    assert split(name, prompt, texts) == split(name, prompt, list(text)) == whole
    if "<think>" not in text and "</think>" not in text:
        assert text in (whole.thought, whole.answer)


def test_thoughts_come_as_early_as_they_are_certain() -> None:
    parser = ReasoningParser("qwen3", PLAIN)
    assert parser.push("<think") == Split()
    assert parser.push(">Hm") == Split("Hm")
    assert parser.push(" <") == Split(" ")
    assert parser.is_thinking
    assert parser.push("/think>Y") == Split("", "Y")
    assert not parser.is_thinking
    assert parser.push("es") == Split("", "es")


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match="qwen3"):
        ReasoningParser("qwen4", None)
