"""Text to token ids and back: a thin layer over the `tokenizers` library and the model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxserve.chat_template import render
from jaxserve.errors import CheckpointError, RequestError

_NOT_TEXT = "a text cannot be encoded: it is no string, or holds a lone surrogate"
# Characters or tokens, some milliseconds. What works on several texts lets go of Python's lock meanwhile, what works on one
# does not: a prompt of 3.5 MB stopped all threads of a server for 12 s.
_LONG = 1 << 12
_MOST_HELD = 8  # tokens that wait for the rest of a character; more can only be broken


class Detokenizer(Protocol):
    """Turns a growing answer into text, piece by piece."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty inside a character."""
        ...

    def flush(self) -> str:
        """What is left at the end, with broken characters replaced."""
        ...


class Tokenizer:
    """A `tokenizer.json` with what `tokenizer_config.json` says about chats and special tokens."""

    def __init__(self, backend: Any, *, chat_template: str | None, special_tokens: Mapping[str, str]):
        self._backend = backend
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        try:
            if len(text) < _LONG:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError:
            raise RequestError(_NOT_TEXT) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel."""
        try:
            return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        except TypeError:
            raise RequestError(_NOT_TEXT) from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        if len(token_ids) >= _LONG:
            return self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)[0]
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text, such as `</s>`."""
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None, if it has none of this number."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def as_json(self) -> str:
        """The `tokenizer.json`, as it is used: nothing is padded or cut."""
        backend = type(self._backend).from_str(self._backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str()

    @property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and so on, as far as `tokenizer_config.json` names them."""
        return dict(self._special_tokens)

    @property
    def eos_token_id(self) -> int | None:
        """The end token that `tokenizer_config.json` names."""
        name = self._special_tokens.get("eos_token")
        return None if name is None else self._backend.token_to_id(name)

    @property
    def chat_template(self) -> str | None:
        """The template as it is written: it tells which roles it knows, and in which form it wants calls."""
        return self._chat_template

    def is_special(self, token: str) -> bool:
        """Whether `decode` leaves this token out unless it is asked not to."""
        token_id = self.token_id(token)
        return token_id is not None and not self.decode([token_id])

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works with this model."""
        return self._chat_template is not None

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder. The prompt's end tells it whether the answer begins with a space."""
        return _Incremental(self._backend, prompt_token_ids[-8:], skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation.

        Raises:
          CheckpointError: the model has no chat template, or it is broken or hostile.
          RequestError: the messages are not a list of {"role": ..., "content": ...}, or the template refuses them.
        """
        if self._chat_template is None:
            raise CheckpointError("this model has no chat template", remedy="Use generate with a plain prompt")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError(f"a chat message must be an object with role and content, not {message!r:.80}")
        if "messages" in variables:
            raise RequestError("a chat template's variables cannot replace its messages")
        known = self._special_tokens | {
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return render(self._chat_template, messages, known | variables)


class _Incremental:
    """Decodes a short window before and after each token: what the later text has more is news.

    `tokenizers.decoders.DecodeStream` would do, but it fails for good where broken bytes change the text before them.
    """

    def __init__(self, backend: Any, context: Sequence[int], skip_special_tokens: bool):
        self._backend = backend
        self._skip = skip_special_tokens
        self._known = list(context)  # tokens whose text has been handed out; enough of them to decode in context
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        self._held.append(token_id)
        text = self._news()
        if not text or (text.endswith("\ufffd") and len(self._held) < _MOST_HELD):
            return ""
        self._known, self._held = self._held, []
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        text = self._news() if self._held else ""
        self._known, self._held = self._known + self._held, []
        return text

    def _news(self) -> str:
        before = self._backend.decode(self._known, skip_special_tokens=self._skip)
        return self._backend.decode(self._known + self._held, skip_special_tokens=self._skip)[len(before) :]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None if it has no `tokenizer.json`: then only token ids go in and out.

    Raises:
      CheckpointError: a tokenizer file is there but cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises bare Exception
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    config = _read_config(folder / "tokenizer_config.json")
    return Tokenizer(backend, chat_template=_template_of(folder, config), special_tokens=_special_tokens(config))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return config


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own, or a key of the config: a string, or a list of named ones of which `default` is taken."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{own.name} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [t.get("template") for t in template if isinstance(t, Mapping) and t.get("name") == "default"]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ...: plain strings, or objects with a `content`."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[name] = value
    return found
