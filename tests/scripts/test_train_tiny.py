"""The script that trains the bundled model: its tasks, tokenizer, resuming and export."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tiny import chat, evaluate, export, model, plot, tasks, tokenizer, train

SMALL = model.Config(vocab=480, dim=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48)
STAGES = (train.Stage(10**9, 128, {32: 0.5, 64: 0.5}, {"recall": 0.5, "arithmetic": 0.3, "chat": 0.2}),)
TEXT = "def add(a, b):\n    return a + b\n\n\nclass Thing:\n    '''A thing.'''\n    size = 3\n" * 40


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train_tokenizer([TEXT], vocab=480, n_words=160)


@pytest.fixture(scope="module")
def lex(tok):
    return tasks.make_lexicon(tok, [TEXT], [*chat.CANNED, (["What is add?"], "A function.")])


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax relies on the implicit promotion that the test settings forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def text_of(tok, ids):
    return tok.decode([int(i) for i in ids], skip_special_tokens=False)


def answers(tok, row):
    """(text before, text) of every answer of a row."""
    tokens, kind, group = row
    for n in range(1, int(group.max()) + 1):
        where = np.flatnonzero(group == n)
        if len(where):
            assert (kind[where] != tasks.NONE).all()
            assert (np.diff(where) == 1).all()
            yield text_of(tok, tokens[: where[0]]), text_of(tok, tokens[where])


@pytest.mark.parametrize(
    "text", ["", " lemon river", "héllo\n\t 世界 🎉 \x00\r\n", "a1b22  333\n\n    return", "ÿ\u2028\ufeff𝔘"]
)
def test_tokenizer_round_trip(tok, text):
    assert text_of(tok, tok.encode(text).ids) == text


def test_tokenizer_round_trip_random(tok):
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(chr(c) for c in rng.integers(1, 0x11000, size=30) if not 0xD800 <= c < 0xE000)
        assert text_of(tok, tok.encode(text).ids) == text


def test_tokenizer_words_and_digits(tok):
    assert tok.get_vocab_size() == 480
    words = tokenizer.task_words(tok)
    assert len(words) >= 160
    assert len(tok.encode(f" {words[0]} {words[1]},").ids) == 3
    assert len(tok.encode("1234").ids) == 4
    assert tok.encode("<|end|>").ids == [tokenizer.END]


@pytest.mark.parametrize("name", list(tasks.MAKERS))
@pytest.mark.parametrize("length", [64, 300])
def test_rows_have_the_length_and_are_repeatable(lex, name, length):
    one, two = (tasks.MAKERS[name](lex, np.random.default_rng(5), length) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert a.shape == (length,)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["stream", "recall"])
@pytest.mark.parametrize("seed", range(5))
def test_recall_answers(tok, lex, name, seed):
    row = tasks.MAKERS[name](lex, np.random.default_rng(seed), 256)
    found = list(answers(tok, row))
    assert len(found) > 5
    for before, answer in found:
        key = re.search(r" \w+$", before).group()
        assert set(re.findall(key + r"( \w+),", before)) == {answer}


@pytest.mark.parametrize("seed", range(5))
def test_needle_answers(tok, lex, seed):
    row = tasks.needle_row(lex, np.random.default_rng(seed), 512)
    found = list(answers(tok, row))
    assert found
    for before, answer in found:
        key = re.search(r"\nNeedle( \w+)$", before).group(1)
        assert before.count(f"\nNeedle{key}{answer},") == 1
        assert re.fullmatch(r" \w+", answer)


@pytest.mark.parametrize("seed", range(5))
def test_sort_and_sum_answers(tok, lex, seed):
    row = tasks.arithmetic_row(lex, np.random.default_rng(seed), 300)
    for before, answer in answers(tok, row):
        name, question = before.splitlines()[-1].removesuffix("=").split(" ")
        if name == "Sort":
            assert answer == ",".join(sorted(question.split(","), key=int)) + "."
        else:
            assert answer == f"{sum(map(int, question.split('+')))}."


@pytest.mark.parametrize("seed", range(8))
def test_chat_rows(tok, lex, seed):
    row = tasks.chat_row(lex, np.random.default_rng(seed), 400)
    text = text_of(tok, row[0])
    for question, answer in re.findall(r"<\|user\|>([^<]*)<\|end\|><\|assistant\|>([^<]*)<\|end\|>", text):
        if sums := re.fullmatch(r"(\d+)\+(\d+)=(\d+)\.", answer):
            assert int(sums[1]) + int(sums[2]) == int(sums[3])
            assert f"{sums[1]}+{sums[2]}" in question
    for before, answer in answers(tok, row):
        if re.search(r"Found: \w+$", before):
            key = before.rsplit(" ", 1)[1]
            talk = before.rsplit("<|bos|>", 1)[1]
            assert f" {key}{answer}," in talk


def test_rows_are_what_the_tokenizer_makes_of_their_text(tok, lex):
    for name in ("stream", "recall", "needle"):
        tokens = tasks.MAKERS[name](lex, np.random.default_rng(3), 256)[0]
        assert tok.encode(text_of(tok, tokens)).ids == tokens.tolist()


def test_example(tok, lex):
    prompt, answer = tasks.example(lex, tok, "needle", 256, seed=1)
    assert "\nNeedle" in prompt
    assert answer in prompt


def test_held_out_files_are_kept_apart():
    files = {f"m{i}.py": str(i) for i in range(200)}
    train_texts, held = tokenizer.split_text(files)
    assert len(train_texts) + len(held) == 200
    assert 0 < len(held) < 40
    assert not set(train_texts) & set(held)


def test_forward_is_causal_and_chunks_agree():
    params = model.init(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 300), 0, SMALL.vocab)
    whole = model.forward(params, tokens, SMALL)  # two chunks of queries
    part = model.forward(params, tokens[:, :200], SMALL)  # one
    np.testing.assert_allclose(whole[:, :200], part, rtol=1e-4, atol=1e-4)


def test_ablation_changes_one_layer_only():
    params = model.init(SMALL, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 32), 0, SMALL.vocab)
    plain = model.forward(params, tokens, SMALL)
    everything = {0: jnp.ones((32, 32), bool)}
    some = {0: jnp.asarray(evaluate.random_keep(32, 0.1))}
    np.testing.assert_array_equal(plain, model.forward(params, tokens, SMALL, everything))
    assert np.abs(plain - model.forward(params, tokens, SMALL, some)).max() > 1e-4


@pytest.mark.parametrize("optimizer", ["muon", "adam"])
def test_resume_equals_uninterrupted(tmp_path, lex, optimizer):
    settings = train.Settings(steps=4, optimizer=optimizer, warmup=1, decay=1)
    go = {"curriculum": STAGES, "log_every": 1}
    whole = train.train(SMALL, settings, lex, tmp_path / "a", **go)
    train.train(SMALL, settings, lex, tmp_path / "b", stop_at=2, **go)
    halves = train.train(SMALL, settings, lex, tmp_path / "b", **go)
    fresh = train.start(SMALL, settings)[0]
    for name in whole:
        np.testing.assert_array_equal(whole[name], halves[name], err_msg=name)
    assert any((np.asarray(fresh[n]) != np.asarray(whole[n])).any() for n in whole)
    step, loaded = train.load_params(tmp_path / "b", SMALL, settings)
    assert step == 4
    np.testing.assert_array_equal(loaded["model.norm.weight"], whole["model.norm.weight"])
    logs = [plot.read_log(tmp_path / d / "log.jsonl") for d in "ab"]
    assert [v["tokens"] for v in logs[0]] == [v["tokens"] for v in logs[1]]


def test_export_loads_back(tmp_path, tok):
    params = model.init(SMALL, jax.random.key(3))
    export.export(params, SMALL, tok, tmp_path)
    back, cfg, tok2 = export.load(tmp_path)
    assert cfg == SMALL
    tokens = jax.random.randint(jax.random.key(1), (2, 40), 0, SMALL.vocab)
    np.testing.assert_array_equal(model.forward(params, tokens, SMALL), model.forward(back, tokens, cfg))
    assert tok2.encode("def add lemon 12").ids == [tokenizer.BOS, *tok.encode("def add lemon 12").ids]


def test_chat_template(tmp_path, tok):
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = jinja2.Template(tokenizer.CHAT_TEMPLATE).render(
        messages=messages, bos_token="<|bos|>", add_generation_prompt=True
    )
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|assistant|>"


def test_accuracy_counts_whole_answers():
    """A model that always says token 7 gets answers of 7 right, and a mixed answer wrong."""
    params = model.init(SMALL, jax.random.key(0))
    params = {k: jnp.zeros_like(v) if "proj" in k else v for k, v in params.items()}
    embed = jnp.ones((SMALL.vocab, SMALL.dim)) * 0.1
    params["model.embed_tokens.weight"] = embed.at[7].set(1.0)
    tokens = np.full((2, 8), 7, np.int32)
    tokens[1, 4] = 9
    group = np.array([[0, 0, 1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 1, 2, 2, 0]], np.int16)
    share, total = evaluate.accuracy(params, SMALL, (tokens, None, group))
    assert (share, total) == (0.75, 4)


def test_learns_a_little(lex):
    """Some steps on one batch bring its loss down: gradient and optimiser point the right way."""
    settings = train.Settings(steps=12, warmup=2, decay=2, lr=1e-2)
    params, state = train.start(SMALL, settings)
    step = train.make_step(SMALL, train.optimizer_of(settings))
    tokens, kind, _ = tasks.make_batch(lex, np.random.default_rng(0), 4, 64, {"arithmetic": 1.0})
    losses = []
    for _ in range(12):
        params, state, loss, _ = step(params, state, tokens, kind)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
