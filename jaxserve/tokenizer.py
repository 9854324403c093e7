"""Text to token ids and back: a thin layer over the `tokenizers` library and the model's own chat template."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxserve.chat_template import render
from jaxserve.errors import CheckpointError, RequestError


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
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel."""
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts))]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token given as text, such as `</s>`."""
        return self._backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """The end token that `tokenizer_config.json` names."""
        name = self._special_tokens.get("eos_token")
        return None if name is None else self._backend.token_to_id(name)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works with this model."""
        return self._chat_template is not None

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder. The prompt's end tells it whether the answer begins with a space."""
        return _Incremental(self._backend, prompt_token_ids[-8:], skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
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
        known = self._special_tokens | {
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        return render(self._chat_template, messages, known | variables)


class _Incremental:
    """`tokenizers.decoders.DecodeStream`, plus the flush it lacks."""

    def __init__(self, backend: Any, context: Sequence[int], skip_special_tokens: bool):
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        text = self._stream.step(self._backend, token_id)
        if text is None:
            self._held.append(token_id)
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """See Detokenizer."""
        held, self._held = self._held, []
        return self._backend.decode(held, skip_special_tokens=self._skip) if held else ""


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
        return own.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
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
