"""/tokenize and /detokenize, in vLLM's form."""

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import Body
from jaxserve.tokenizer import Tokenizer


class TokenizeBody(Body):
    """A `prompt`, or the `messages` of a conversation. Special tokens are added to a prompt, not to a conversation: its
    template has written them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise ValueError("tools and chat_template_kwargs are for messages")
        return self

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The ids.

        Raises:
          JaxserveError: the chat template refuses the messages, or there is none.
        """
        if self.prompt is not None:
            return tokenizer.encode(self.prompt, add_special_tokens=self.add_special_tokens is not False)
        variables = {"add_generation_prompt": self.add_generation_prompt, "tools": self.tools}
        text = tokenizer.apply_chat_template(self.messages or [], **(variables | (self.chat_template_kwargs or {})))
        return tokenizer.encode(text, add_special_tokens=bool(self.add_special_tokens))


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]

    def text(self, tokenizer: Tokenizer) -> str:
        """Special tokens are kept: the text has the same tokens again.

        Raises:
          ApiError: one is in no vocabulary.
        """
        wrong = next((token for token in self.tokens if tokenizer.token(token) is None), None)
        if wrong is not None:
            raise ApiError(f"there is no token {wrong} in the vocabulary", param="tokens")
        return tokenizer.decode(self.tokens, skip_special_tokens=False)


def tokenize_answer(body: TokenizeBody, ids: Sequence[int], tokenizer: Tokenizer, max_model_len: int) -> dict[str, Any]:
    """`token_strs` are the vocabulary's own spellings, if wanted."""
    strings = [tokenizer.token(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": list(ids), "token_strs": strings}
