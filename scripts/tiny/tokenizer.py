"""Byte-level BPE tokenizer of `tiny`, trained on the standard library, and the text it is trained on."""

from __future__ import annotations

import json
import sysconfig
import zlib
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny.words import WORDS

SPECIALS = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
PAD, BOS, END, USER, ASSISTANT, SYSTEM = range(6)
BOS_TEXT = SPECIALS[BOS]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "lib2to3"}


def stdlib_files(max_bytes: int = 200_000) -> dict[str, str]:
    """Relative path -> text of the running interpreter's library sources that are plain ASCII, sorted by path.

    Line ends are stripped of blanks. The language reference kept in pydoc_data is longer than max_bytes and is
    taken all the same, since it is most of the prose there is.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if SKIPPED & set(rel.parts) or rel.name.startswith("_sysconfigdata"):
            continue
        if path.stat().st_size > max_bytes and rel.parts[0] != "pydoc_data":
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        if text.isascii() and len(text) > 400:
            if rel.name == "topics.py":  # a dict of escaped string pieces: keep what the strings say
                text = "\n\n".join(topics(text))
            files[rel.as_posix()] = "\n".join(line.rstrip() for line in text.splitlines())
    return files


def topics(source: str) -> list[str]:
    """The string values of the `topics` dict of pydoc_data/topics.py."""
    import ast

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            return [ast.literal_eval(v) for v in node.values if isinstance(v, ast.Constant)]
    return []


def is_held_out(rel_path: str) -> bool:
    """One file in twenty, chosen by its name alone, is kept for validation."""
    return zlib.crc32(rel_path.encode()) % 20 == 0


def split_text(files: dict[str, str]) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)."""
    train = [t for p, t in files.items() if not is_held_out(p)]
    held = [t for p, t in files.items() if is_held_out(p)]
    return train, held


def _blank(vocab: dict[str, int] | None = None, merges: list[tuple[str, str]] | None = None) -> Tokenizer:
    """A tokenizer whose text steps are set: single digits, then words as GPT-2 splits them, then bytes.

    ignore_merges: a piece that is in the vocabulary as a whole needs no chain of merges to be found.
    """
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True) if vocab else models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(SPECIALS)
    return tok


def train_tokenizer(texts: list[str], vocab: int = 1024, n_words: int = 256) -> Tokenizer:
    """Train a BPE of `vocab` tokens of which the last n_words are whole task words.

    The merges learned from the text come first. Then n_words nouns (with a leading space) are added as whole
    tokens, so that looking a word up is matching a single token.
    """
    tok = _blank()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - n_words,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    spec = json.loads(tok.to_str())["model"]
    ids, merges = dict(spec["vocab"]), [tuple(m) for m in spec["merges"]]
    # a fixed mixed order, so that taking the first n_words is no alphabetical cut
    spare = [w for w in sorted(WORDS, key=lambda w: zlib.crc32(w.encode())) if "\u0120" + w not in ids]
    for word in spare[: vocab - len(ids)]:
        ids["\u0120" + word] = len(ids)
    return _blank(ids, merges)


def task_words(tok: Tokenizer) -> list[str]:
    """The nouns that are one token with a leading space, in the order of the list."""
    return [w for w in WORDS if len(tok.encode(" " + w, add_special_tokens=False).ids) == 1]


def save_tokenizer(tok: Tokenizer, folder: Path, max_len: int) -> None:
    """Write tokenizer.json, which puts bos before plain prompts, and tokenizer_config.json for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.from_str(tok.to_str())
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS_TEXT} $A", special_tokens=[(BOS_TEXT, BOS)])
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TEXT,
        "eos_token": SPECIALS[END],
        "pad_token": SPECIALS[PAD],
        "unk_token": None,
        "additional_special_tokens": SPECIALS[USER:],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
