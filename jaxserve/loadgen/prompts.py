"""Prompts of a wanted length: token ids, or words that are one token each."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.workload.call import Call, Said, Span

# One token each in most vocabularies, after a space.
_WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not what all
were we when your can said there use an each which she do how their if will up other about out many then them these so some
her would make like him into time has look two more write go see number no way could people my than first water been call
who oil its now find long down day did get come made may part
"""
_CHARACTERS_PER_TOKEN = 4  # where there is no tokenizer: of English text, roughly
_FEW = 16


class Vocabulary:
    """What random prompts are made of. Without a tokenizer: common words."""

    def __init__(self, tokenizer: Any = None):
        self._tokenizer = tokenizer

    @property
    def is_exact(self) -> bool:
        """Whether lengths are counted, or only reckoned."""
        return self._tokenizer is not None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        if self._tokenizer is None:
            return -(-len(text) // _CHARACTERS_PER_TOKEN)
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def ids(self, text: str) -> list[int]:
        """A text as token ids."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @cached_property
    def plain_ids(self) -> list[int]:
        """All but special tokens."""
        special = self._tokenizer.get_added_tokens_decoder()
        return [i for i in range(self._tokenizer.get_vocab_size()) if i not in special]

    @cached_property
    def words(self) -> list[str]:
        """Words that are one token each, with the space before them."""
        if self._tokenizer is None:
            return [f" {word}" for word in _WORDS.split()]
        spelled = {re.sub("^[Ġ▁]", " ", token) for token in self._tokenizer.get_vocab()}
        found = sorted(word for word in spelled if re.fullmatch(" [a-z]+", word) and self.count(f" a{word}{word}") == 3)
        return found if len(found) >= _FEW else [f" {word}" for word in _WORDS.split()]


def load_vocabulary(name: str | None) -> Vocabulary:
    """Of a folder with a `tokenizer.json`, such a file, or a hub id (only that file is fetched); None: common words.

    Raises:
      ConfigError: there is no such tokenizer.
    """
    if name is None:
        return Vocabulary()
    from tokenizers import Tokenizer  # not at the top: most runs need none

    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    try:
        return Vocabulary(Tokenizer.from_file(str(path)) if path.is_file() else Tokenizer.from_pretrained(name))
    except Exception as error:  # noqa: BLE001  the library raises bare Exceptions
        raise ConfigError(f"--tokenizer {name}: {' '.join(str(error).split())[:200]}") from None


class Prompts:
    """Prompts of calls. The same piece is the same text in every call and run of one seed.

    `texts`: of calls that have one of their own. `as_ids`: token ids instead of text, which needs a tokenizer.
    """

    def __init__(
        self, vocabulary: Vocabulary, seed: int | str, *, as_ids: bool, texts: Mapping[str, str] | None = None
    ):
        self._vocabulary, self._seed, self._as_ids, self._texts = vocabulary, seed, as_ids, texts or {}

    def reseeded(self, seed: str) -> "Prompts":
        """Others of the same lengths."""
        return Prompts(self._vocabulary, f"{self._seed} {seed}", as_ids=self._as_ids)

    def of(self, call: Call, calls: Mapping[str, Call], answers: Mapping[str, str]) -> str | list[int]:
        """What a call sends. `answers`: texts of the calls that it waits for."""
        text = self._texts.get(call.call_id)
        pieces = self._pieces(call, calls, answers) if text is None else [text]
        if self._as_ids:
            return [i for piece in pieces for i in (self._vocabulary.ids(piece) if isinstance(piece, str) else piece)]
        return "".join(piece if isinstance(piece, str) else "".join(piece) for piece in pieces)

    def _pieces(self, call: Call, calls: Mapping[str, Call], answers: Mapping[str, str]) -> list[Any]:
        found = list[Any]()
        for piece in call.prompt:
            if isinstance(piece, Span):
                among = self._vocabulary.plain_ids if self._as_ids else self._vocabulary.words
                found.append(Random(f"{self._seed} {piece.token}").choices(among, k=piece.length))
            else:
                found += [] if isinstance(piece, Said) else self._pieces(calls[piece.call_id], calls, answers)
                found.append(answers[piece.call_id])
        return found
