"""Text in pieces equals text as a whole; broken files are named; templates are found wherever they may lie."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxserve.errors import CheckpointError, RequestError
from jaxserve.model_source import find_model
from jaxserve.tokenizer import load_tokenizer
from tests.support.turns import turns_during

CORPUS = ["the cat sat on the mat", "größe, naïve, 東京, 😀 👩‍🚀 emoji", "a b  c   d", "привет мир"] * 4
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"


def byte_level() -> Tokenizer:
    """GPT-2's and Llama 3's kind: every byte is a token, so characters are split."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def metaspace() -> Tokenizer:
    """Llama 2's kind: spaces are part of words, unknown characters are spelt in byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ["▁", *"abcdehmnost", "th", "the", "▁the", "▁c", "▁cat", "at", "cat", "▁a"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "a")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


@pytest.fixture(scope="module", params=[byte_level, metaspace], ids=["byte_level", "metaspace"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def pieces(tokenizer, ids, prompt=(), **options) -> list[str]:
    stream = tokenizer.detokenizer(prompt, **options)
    return [*(stream.push(i) for i in ids), stream.flush()]


@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_pieces_of_any_text_join_to_the_whole(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=100)
@given(prompt=st.text(max_size=20), text=st.text(max_size=20))
def test_after_a_prompt_pieces_join_to_what_the_whole_has_more(tokenizer, prompt, text):
    """The answer's first space is kept, because the prompt's end is known."""
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    context = before[-8:]
    if "\ufffd" in tokenizer.decode(context):
        return  # the window begins inside a character
    whole, head = tokenizer.decode(context + ids), tokenizer.decode(context)
    assert head + "".join(pieces(tokenizer, ids, before)) == whole


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_never_fail(tokenizer, skip):
    """A random model says anything: broken characters, special tokens, ids without a token."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(340) for _ in range(rng.randint(1, 20))]
        prompt = [rng.randrange(300) for _ in range(rng.randint(0, 12))]
        assert isinstance("".join(pieces(tokenizer, ids, prompt, skip_special_tokens=skip)), str)


def test_broken_characters_take_no_good_text_along(tokenizer):
    rng = random.Random(2)
    word = tokenizer.encode("the cat", add_special_tokens=False)
    broken = tokenizer.encode("🦀", add_special_tokens=False)[-2]
    for _ in range(100):
        good = rng.randint(1, 4)
        ids = [i for _ in range(good) for i in [broken] * rng.randint(1, 30) + word]
        text = "".join(pieces(tokenizer, ids))
        assert text.count("the cat") == good
        assert text.count("\ufffd") == tokenizer.decode(ids).count("\ufffd")


@pytest.mark.parametrize("char", ["é", "東", "😀"])
def test_a_character_comes_whole_with_its_last_token(tokenizer, char):
    ids = tokenizer.encode(f"a {char}", add_special_tokens=False)
    assert all("\ufffd" not in piece for piece in pieces(tokenizer, ids))


def test_a_tail_that_never_becomes_a_character_is_flushed_as_broken(tokenizer):
    ids = tokenizer.encode("the 🦀", add_special_tokens=False)
    got = pieces(tokenizer, ids[:-1])
    assert "".join(got[:-1]).rstrip() == "the"
    assert set(got[-1].strip()) == {"\ufffd"}
    assert "".join(got) == tokenizer.decode(ids[:-1])


def test_special_tokens_are_skipped_unless_asked_for(tokenizer):
    end = tokenizer.token_id("</s>")
    ids = [*tokenizer.encode("the cat", add_special_tokens=False), end]
    assert "".join(pieces(tokenizer, ids)) == "the cat"
    assert "".join(pieces(tokenizer, ids, skip_special_tokens=False)) == "the cat</s>"
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.token_id("no such token") is None


def test_many_texts_are_encoded_like_each(tokenizer):
    assert tokenizer.encode_batch(CORPUS[:4]) == [tokenizer.encode(text) for text in CORPUS[:4]]


def write(folder, config=None, template=None):
    byte_level().save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "surrogateescape"))
    return folder


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"chat_template": TEMPLATE, "eos_token": "</s>"}, None),
        ({"chat_template": TEMPLATE, "eos_token": {"content": "</s>", "lstrip": False}}, None),
        ({"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]}, None),
        ({"chat_template": "ignored", "eos_token": "</s>"}, TEMPLATE),
        (None, TEMPLATE),
    ],
)
def test_a_chat_template_is_found_as_file_as_string_and_in_a_list(tmp_path, config, template):
    tokenizer = load_tokenizer(write(tmp_path, config, template))
    end = "</s>" if config and "eos_token" in config else ""
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES) == "<user>hi" + end
    assert tokenizer.eos_token_id == (1 if end else None)


def test_without_a_template_chat_says_what_to_do(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, {"chat_template": [{"name": ["odd"]}, 3, {"template": "x"}]}))
    assert not tokenizer.has_chat_template
    with pytest.raises(CheckpointError, match=r"no chat template\. Use generate"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("messages", [["hi"], [{"content": "hi"}], [{"role": 1, "content": "hi"}], [None]])
def test_messages_of_another_shape_are_refused(tmp_path, messages):
    tokenizer = load_tokenizer(write(tmp_path, None, TEMPLATE))
    with pytest.raises(RequestError, match="must be an object with role and content"):
        tokenizer.apply_chat_template(messages)


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', '{"version": "1.0"}', "\x00" * 100, "[" * 5000])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", ["", "{", "[1]", '"text"', "[" * 100_000])
def test_a_broken_tokenizer_config_is_named(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(write(tmp_path, config))


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        load_tokenizer(write(tmp_path, None, "\udcff\udcfe"))


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(RequestError, match="cannot be encoded"):
        tokenizer.encode("lone \ud800 surrogate")
    with pytest.raises(RequestError, match="cannot be encoded"):
        tokenizer.encode_batch(["good", "lone \ud800 surrogate"])


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_long_texts_hold_up_no_other_thread(name):
    tokenizer = load_tokenizer(find_model("tiny"))
    ids = random.Random(0).choices(range(300, 1000), k=200_000)
    text = tokenizer.decode(ids[:100_000])
    work, given = getattr(tokenizer, name), {"encode": text, "decode": ids}[name]
    assert turns_during(lambda: work(given)) >= 8


def test_long_texts_have_the_tokens_that_short_ones_have():
    tokenizer = load_tokenizer(find_model("tiny"))
    text = "def add(a, b):\n    return größe 😀\n" * 200
    assert len(text) > 4096
    for special in (True, False):
        whole = tokenizer.encode(text, add_special_tokens=special)
        assert whole == tokenizer._backend.encode(text, add_special_tokens=special).ids
    assert tokenizer.decode(whole) == tokenizer._backend.decode(whole) == text
    for wrong in (7, None, ["a"] * 5000, "a" * 5000 + "\ud800"):
        with pytest.raises(RequestError, match="no string"):
            tokenizer.encode(wrong)  # pyright: ignore[reportArgumentType]
