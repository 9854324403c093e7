"""Rows of training and test tokens: library text, and generated tasks whose answers are known exactly.

A row is three arrays of one length: `tokens`; `kind`, which says what predicting that token counts as (NONE for
what cannot be known, such as the random words of a definition; FORM for commas and the like); and `group`, the
number of the answer the token belongs to (0: none), so that an answer of several tokens is right only when all of
them are. All random choices come from a numpy Generator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from tiny import chat
from tiny.tokenizer import ASSISTANT, BOS, END, USER, task_words

KINDS = ("none", "text", "recall", "needle", "sort", "sum", "chat", "form")
NONE, TEXT, RECALL, NEEDLE, SORT, SUM, CHAT, FORM = range(len(KINDS))


class Lexicon(NamedTuple):
    """What the generators draw from. text: uint16 [n] tokens; lines: positions in it where a new line begins."""

    encode: object
    words: np.ndarray
    text: np.ndarray
    lines: np.ndarray
    canned: list


def make_lexicon(tok: Tokenizer, texts: list[str], canned: list[tuple[list[str], str]] = ()) -> Lexicon:
    """Encode the texts once; each begins on a new line. canned: (questions, answer) of the chat rows."""
    encoded = tok.encode_batch(["\n\n" + t.strip() for t in texts], add_special_tokens=False)
    text = np.concatenate([np.asarray(e.ids, np.uint16) for e in encoded])
    newline = np.zeros(tok.get_vocab_size(), bool)
    for piece, i in tok.get_vocab().items():
        newline[i] = piece.startswith("\u010a")  # how byte-level BPE writes a line feed
    words = np.array([tok.token_to_id("\u0120" + w) for w in task_words(tok)])
    encode = lru_cache(maxsize=None)(lambda s: tuple(tok.encode(s, add_special_tokens=False).ids))
    return Lexicon(encode, words, text, np.flatnonzero(newline[text]), list(canned))


class Row:
    """A row being written: `put` appends tokens, `cut` gives the three arrays."""

    def __init__(self, lex: Lexicon):
        self.lex, self.tokens, self.kind, self.group, self.answers = lex, [BOS], [NONE], [0], 0

    def put(self, what, kind: int = NONE) -> None:
        """Append a string or token ids."""
        ids = self.lex.encode(what) if isinstance(what, str) else what
        self.tokens.extend(int(i) for i in ids)
        self.kind.extend([kind] * len(ids))
        self.group.extend([0] * len(ids))

    def answer(self, what, kind: int) -> None:
        """Append a string or token ids that count as one answer."""
        start = len(self.tokens)
        self.put(what, kind)
        self.answers += 1
        self.group[start:] = [self.answers] * (len(self.tokens) - start)

    def filler(self, rng: np.random.Generator, n: int) -> None:
        """Append at most n tokens of library text: whole lines where some fit."""
        if n <= 0:
            return
        lines, text = self.lex.lines, self.lex.text
        a = int(rng.integers(len(lines)))
        b = int(np.searchsorted(lines, lines[a] + n, side="right")) - 1
        stop = lines[b] if b > a else min(lines[a] + n, len(text))
        self.put(text[lines[a] : stop], TEXT)

    def cut(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `length` tokens; padded with pad tokens when there are fewer."""
        out = []
        for part, dtype in ((self.tokens, np.int32), (self.kind, np.int8), (self.group, np.int16)):
            a = np.zeros(length, dtype)
            a[: min(length, len(part))] = part[:length]
            out.append(a)
        tokens, kind, group = out
        if len(self.group) > length and group[-1] and self.group[length] == group[-1]:
            kind[group == group[-1]], group[group == group[-1]] = NONE, 0  # an answer cut in two is no answer
        return tokens, kind, group

    def __len__(self) -> int:
        return len(self.tokens)


def text_row(lex: Lexicon, rng: np.random.Generator, length: int):
    """Library text from a random line on."""
    row = Row(lex)
    start = int(lex.lines[rng.integers(len(lex.lines))])
    start = max(0, min(start, len(lex.text) - length))
    row.put(lex.text[start : start + length - 1], TEXT)
    return row.cut(length)


def stream_row(lex: Lexicon, rng: np.random.Generator, length: int):
    """Pairs ' key value,' without end; a key that comes again must be followed by the value it had before."""
    row, words = Row(lex), rng.permutation(lex.words)
    n_keys = int(rng.integers(4, max(6, min(129, length // 5))))
    keys, values = words[:n_keys], rng.choice(words[n_keys:], n_keys)
    row.put("\nPairs:")
    seen = set()
    while len(row) < length:
        i = int(rng.integers(n_keys))
        row.put([keys[i]])
        row.answer([values[i]], RECALL) if i in seen else row.put([values[i]])
        row.put(",", FORM)
        seen.add(i)
    return row.cut(length)


def recall_row(lex: Lexicon, rng: np.random.Generator, length: int, fill: float | None = None):
    """Blocks of pairs between library text, then questions for every key until the row is full.

    fill: share of the row that is library text (default: drawn at random; short rows have none).
    """
    row, words = Row(lex), rng.permutation(lex.words)
    if fill is None:
        fill = float(rng.choice([0.0, rng.uniform(0.1, 0.9)]))
    if length < 128:
        fill = 0.0
    n = int(np.clip((length * (1 - fill) - 20) // 6, 2, len(words) // 2))
    keys, values = words[:n], rng.choice(words[n:], n)
    blocks = np.split(np.arange(n), np.sort(rng.integers(0, n + 1, size=int(rng.integers(0, 1 + min(8, n // 3))))))
    blocks = [b for b in blocks if len(b)]
    spare = length - 6 * n - 5 * len(blocks) - 8
    shares = rng.dirichlet(np.ones(len(blocks) + 1)) * max(0, spare)
    for block, share in zip(blocks, shares, strict=False):
        row.filler(rng, int(share))
        row.put("\nPairs:")
        for i in block:
            row.put([keys[i], values[i], *lex.encode(",")])
    row.filler(rng, int(shares[-1]))
    row.put("\nFind:")
    while len(row) < length:
        for i in rng.permutation(n):
            row.put([keys[i]])
            row.answer([values[i]], RECALL)
            row.put(",", FORM)
    return row.cut(length)


def needle_row(lex: Lexicon, rng: np.random.Generator, length: int, dense: bool | None = None):
    """Library text with lines '\\nNeedle key value,' hidden in it; at the end they are to be repeated.

    dense: hardly any text, as many needles as fit (default: two rows in five), for more answers per row.
    A needle ends with a comma as a pair does: the model gathers key and value at that comma, and formats without
    it (a full stop instead, say) were not looked up after hundreds of steps.
    """
    row, words = Row(lex), rng.permutation(lex.words)
    line = len(lex.encode("\nNeedle")) + 3
    n = int(rng.integers(1, max(2, min(25, length // 48))))
    if rng.random() < 0.4 if dense is None else dense:
        n = max(1, min(len(words) // 2, (length - 1) // (2 * line)))
    asked = rng.permutation(n)
    needles = words[: 2 * n].reshape(n, 2)
    spare = length - 1 - 2 * n * line
    for needle, share in zip(needles, rng.dirichlet(np.ones(n + 1)) * spare, strict=False):
        row.filler(rng, int(share))
        row.put("\nNeedle")
        row.put([*needle, *lex.encode(",")])
    row.filler(rng, length - len(row) - n * line)
    for i in asked:
        row.put("\nNeedle", FORM)
        row.put(needles[i, :1])
        row.answer(needles[i, 1:], NEEDLE)
        row.put(",", FORM)
    return row.cut(length)


def sort_problem(rng: np.random.Generator) -> tuple[str, str]:
    """('7,3,12', '3,7,12'): two to six numbers of one or two digits."""
    numbers = rng.integers(0, int(rng.choice([10, 100])), size=int(rng.integers(2, 7)))
    return ",".join(map(str, numbers)), ",".join(map(str, sorted(numbers.tolist())))


def sum_problem(rng: np.random.Generator) -> tuple[str, str]:
    """('12+34', '46'): two numbers of one or two digits."""
    a, b = (int(rng.integers(0, int(rng.choice([10, 100])))) for _ in range(2))
    return f"{a}+{b}", str(a + b)


def arithmetic_row(lex: Lexicon, rng: np.random.Generator, length: int, tasks: tuple[int, ...] = (SORT, SUM)):
    """Lines 'Sort 7,3,12=3,7,12.' and 'Sum 12+34=46.' until the row is full."""
    row = Row(lex)
    while len(row) < length:
        kind = int(rng.choice(tasks))
        question, answer = (sort_problem if kind == SORT else sum_problem)(rng)
        row.put(("\nSort " if kind == SORT else "\nSum ") + question + "=")
        row.answer(answer + ".", kind)
    return row.cut(length)


def turn(row: Row, question, parts: list[tuple[object, int]]) -> None:
    """One exchange; parts: the pieces of the assistant's answer, each with its kind, followed by the end token."""
    row.put([USER])
    for piece in question if isinstance(question, list) else [question]:
        row.put(piece)
    row.put([END, ASSISTANT])
    for piece, kind in parts:
        row.answer(piece, kind) if kind in (RECALL, NEEDLE, SORT, SUM) else row.put(piece, kind)
    row.put([END], CHAT)


def chat_row(lex: Lexicon, rng: np.random.Generator, length: int):
    """Conversations about all tasks, each begun by the bos token, until the row is full."""
    row = Row(lex)
    row.tokens.pop(), row.kind.pop(), row.group.pop()
    while len(row) < length:
        row.put([BOS])
        chat.conversation(lex, row, rng, min(length, 64 + int(rng.integers(0, max(1, length - 64)))))
    return row.cut(length)


MAKERS = {
    "text": text_row,
    "stream": stream_row,
    "recall": recall_row,
    "needle": needle_row,
    "arithmetic": arithmetic_row,
    "chat": chat_row,
}


def make_batch(lex: Lexicon, rng: np.random.Generator, rows: int, length: int, mix: dict[str, float]):
    """(tokens int32, kind int8, group int16), each [rows, length]; mix: maker name -> share."""
    names, shares = list(mix), np.array(list(mix.values()), float)
    picked = rng.choice(len(names), size=rows, p=shares / shares.sum())
    return tuple(np.stack(a) for a in zip(*(MAKERS[names[i]](lex, rng, length) for i in picked), strict=True))


def example(lex: Lexicon, tok: Tokenizer, task: str, length: int, seed: int) -> tuple[str, str]:
    """(prompt, expected continuation) of one row of a task, for whoever wants to ask a served model."""
    tokens, _, group = MAKERS[task](lex, np.random.default_rng(seed), length)
    where = np.flatnonzero(group == group.max())
    return tuple(tok.decode(list(a), skip_special_tokens=True) for a in (tokens[1 : where[0]], tokens[where]))
