"""Numbers of an exported `tiny`: bits per byte, exact accuracy per task and length, ablation of layers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from tiny import tasks
from tiny.model import Config, forward

LENGTHS = (64, 256, 1024, 2048)
ABLATED_SHARE = 0.1


@partial(jax.jit, static_argnames="cfg")
def _predict(params, tokens, cfg: Config, keep):
    """(argmax of the next token, its cross entropy in nats), both [batch, length - 1]."""
    logits = forward(params, tokens, cfg, keep)[:, :-1]
    true = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1) - true


def bits_per_byte(params, cfg: Config, tok: Tokenizer, texts: list[str], length: int = 512, limit: int = 400) -> float:
    """Held-out text cut in rows of `length` tokens (bos first), at most `limit` rows spread over all of it."""
    ids = np.concatenate([np.asarray(e.ids) for e in tok.encode_batch(texts, add_special_tokens=False)])
    rows = ids[: len(ids) // (length - 1) * (length - 1)].reshape(-1, length - 1)
    rows = rows[:: max(1, -(-len(rows) // limit))]
    n_bytes = sum(len(tok.decode(r.tolist(), skip_special_tokens=False).encode()) for r in rows)
    rows = np.concatenate([np.ones((len(rows), 1), rows.dtype), rows], axis=1)
    nats = sum(float(_predict(params, jnp.asarray(b, jnp.int32), cfg, {})[1].sum()) for b in batches(rows, 8))
    return nats / np.log(2) / n_bytes


def batches(rows: np.ndarray, size: int):
    """Pieces of `size` rows; what does not fill a piece is dropped, so that one shape is compiled."""
    size = min(size, len(rows))
    return (rows[i : i + size] for i in range(0, len(rows) - size + 1, size))


def task_rows(lex: tasks.Lexicon, task: str, length: int, rows: int, seed: int = 1234):
    """Test rows of a task: arrays [rows, length]. In 'recall' only the first question of each key counts."""
    rng = np.random.default_rng([seed, length, sum(task.encode())])
    if task in ("sort", "sum"):
        kinds = (tasks.KINDS.index(task),)
        made = [tasks.arithmetic_row(lex, rng, length, kinds) for _ in range(rows)]
    else:
        options = {"dense": False} if task == "needle" else {}
        made = [tasks.MAKERS[task](lex, rng, length, **options) for _ in range(rows)]
    tokens, kind, group = (np.stack(a) for a in zip(*made, strict=True))
    if task == "recall":
        for t, g in zip(tokens, group, strict=True):
            asked = set()
            for p in np.flatnonzero(g):
                if t[p - 1] in asked:
                    g[p] = 0
                asked.add(t[p - 1])
    return tokens, kind, group


def accuracy(params, cfg: Config, rows, keep=None, size: int = 2) -> tuple[float, int]:
    """(share of answers all of whose tokens are the most likely ones, number of answers)."""
    tokens, _, group = rows
    right = total = 0
    for t, g in zip(batches(tokens, size), batches(group, size), strict=True):
        best = np.asarray(_predict(params, jnp.asarray(t), cfg, keep or {})[0])
        hit, g = best == t[:, 1:], g[:, 1:]
        for r in range(len(t)):
            n = int(g[r].max()) + 1
            wrong = np.bincount(g[r], weights=~hit[r], minlength=n)
            there = np.bincount(g[r], minlength=n) > 0
            right += int((there & (wrong == 0))[1:].sum())
            total += int(there[1:].sum())
    return right / max(1, total), total


def random_keep(length: int, share: float, seed: int = 0) -> np.ndarray:
    """Bool [length, length]: a random share of all pairs, and every position itself."""
    keep = np.random.default_rng(seed).random((length, length)) < share
    return keep | np.eye(length, dtype=bool)


def probe(params, cfg: Config, lex: tasks.Lexicon, lengths=LENGTHS) -> dict[str, float]:
    """A quick look during training: recall and needle accuracy on few rows."""
    out = {}
    for length in lengths:
        for task in ("recall", "needle"):
            rows = task_rows(lex, task, length, max(2, min(16, 4096 // length)))
            out[f"{task}_{length}"] = round(accuracy(params, cfg, rows)[0], 4)
    return out


def evaluate(params, cfg: Config, tok: Tokenizer, lex: tasks.Lexicon, held_out: list[str], scale: int = 1) -> dict:
    """All numbers; `scale` multiplies the rows per cell. lex must be made of held-out text."""
    out = {"bits_per_byte": round(bits_per_byte(params, cfg, tok, held_out), 4), "accuracy": {}, "ablation": {}}
    for task in ("recall", "needle", "chat", "sort", "sum"):
        out["accuracy"][task] = {}
        for length in LENGTHS if task in ("recall", "needle", "chat") else (256,):
            count = scale * max(16, min(128, 16384 // length))
            rows = task_rows(lex, task, length, count)
            share, answers = accuracy(params, cfg, rows)
            out["accuracy"][task][str(length)] = {"exact": round(share, 4), "answers": answers}
    for length in (256, 1024):
        for task in ("recall", "needle"):
            rows = task_rows(lex, task, length, scale * 8, seed=77)
            keep = jnp.asarray(random_keep(length, ABLATED_SHARE))
            table = {"none": round(accuracy(params, cfg, rows)[0], 4)}
            for i in range(cfg.layers):
                table[f"layer {i}"] = round(accuracy(params, cfg, rows, {i: keep})[0], 4)
            out["ablation"][f"{task}_{length}"] = table
    return out
