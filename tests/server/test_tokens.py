"""/tokenize and /detokenize: the tokenizer's own ids, there and back."""

import httpx
import pytest

TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(base_url=server.url) as http:
        yield lambda path, **body: http.post(path, json=body)


def test_a_text_becomes_the_tokens_that_a_completion_counts(post, engine):
    text = "def add(a, b):\n    return a + b"
    for special in (True, False):
        found = post("/tokenize", model="tiny", prompt=text, add_special_tokens=special).json()
        ids = engine.tokenizer.encode(text, add_special_tokens=special)
        assert found == {"count": len(ids), "max_model_len": engine.max_model_len, "tokens": ids, "token_strs": None}
        answer = post("/v1/completions", prompt=text, max_tokens=1, add_special_tokens=special).json()
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert post("/detokenize", tokens=ids).json() == {
            "prompt": engine.tokenizer.decode(ids, skip_special_tokens=False)
        }


def test_tokens_are_spelt_as_in_the_vocabulary(post, engine):
    found = post("/tokenize", prompt="import os", return_token_strs=True).json()
    assert [engine.tokenizer.token_id(each) for each in found["token_strs"]] == found["tokens"]


def test_a_conversation_becomes_the_tokens_of_its_template(post, engine):
    for begun in (True, False):
        found = post("/tokenize", messages=TALK, add_generation_prompt=begun).json()
        expected = engine.intake.chat_prompt(TALK, add_generation_prompt=begun)
        assert found["tokens"] == expected["prompt_token_ids"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": TALK}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"messages": [{"content": "x"}]}),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": {"messages": []}}),
        ("/tokenize", {"prompt": "x", "add_special_token": True}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 70]}),
        ("/detokenize", {"tokens": ["x"]}),
    ],
)
def test_what_cannot_be_read_is_refused(post, path, body):
    answer = post(path, **body)
    assert answer.status_code == 400, answer.text


def test_an_empty_text_has_only_special_tokens(post, engine):
    assert post("/tokenize", prompt="", add_special_tokens=False).json()["tokens"] == []
    assert post("/tokenize", prompt="").json()["tokens"] == engine.tokenizer.encode("")
    assert post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_special_tokens_and_template_are_told(server, engine):
    found = httpx.get(f"{server.url}/tokenizer_info").json()
    assert engine.tokenizer.token_id(found["eos_token"]) == engine.tokenizer.eos_token_id
    assert found["chat_template"] == engine.tokenizer.chat_template
