"""/tokenize and /detokenize, in vLLM's form."""

from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from jaxserve.openai.chat import ChatBody
from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import Body
from jaxserve.openai.messages import Message
from jaxserve.openai.tools.choice import Tool
from jaxserve.openai.turn import Dialect
from jaxserve.tokenizer import Tokenizer

_ENDS = ("add_generation_prompt", "continue_final_message")


class TokenizeBody(Body):
    """A `prompt`, or the `messages` of a conversation. Special tokens are added to a prompt, not to a conversation: its
    template has written them."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise ValueError("tools and chat_template_kwargs are for messages")
        if self.messages is None and self.continue_final_message:
            raise ValueError("continue_final_message is for messages")
        return self

    def tokens(self, tokenizer: Tokenizer, dialect: Dialect) -> list[int]:
        """The ids. Those of a conversation are what /v1/chat/completions would give to the model.

        Raises:
          ApiError, JaxserveError: the chat template refuses the messages, or there is none.
        """
        if self.prompt is not None:
            return tokenizer.encode(self.prompt, add_special_tokens=self.add_special_tokens is not False)
        names = self.model_fields_set & {"messages", "tools", "chat_template_kwargs", *_ENDS}
        chat = ChatBody(**{name: getattr(self, name) for name in names})
        made = chat.turn(dialect).prompt(tokenizer)
        if self.add_special_tokens:
            return tokenizer.encode(made["prompt"])
        return made["prompt_token_ids"]


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
