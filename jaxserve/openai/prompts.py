"""Prompts of bodies that may hold one or several: text or token ids; and how they are turned into tokens."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from jaxserve.intake import Prompt
from jaxserve.openai.fields import Body
from jaxserve.tokenizer import Tokenizer

Prompts = str | list[str] | list[int] | list[list[int]]


class PromptFields(Body):
    """vLLM's fields. `truncate_prompt_tokens` keeps so many of the last tokens, -1: as many as the model can take."""

    add_special_tokens: bool = True
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _leaves_something(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("0 would leave nothing of the prompt")
        return value

    def ready(self, prompt: str | list[int], tokenizer: Tokenizer | None, room: int) -> Prompt:
        """A prompt for the engine. `room`: most tokens that the model can take."""
        most, ids = self.truncate_prompt_tokens, None
        if isinstance(prompt, str) and tokenizer is not None and (most is not None or not self.add_special_tokens):
            ids = tokenizer.encode(prompt, add_special_tokens=self.add_special_tokens)
        elif not isinstance(prompt, str):
            ids = prompt
        if ids is None:
            return prompt
        keep = len(ids) if most is None else room if most < 0 else most
        if len(ids) > keep:
            return {"prompt_token_ids": ids[len(ids) - keep :]}  # its text is no longer the one that was given
        return {"prompt": prompt, "prompt_token_ids": ids} if isinstance(prompt, str) else ids


def listed(prompts: Prompts) -> list[str | list[int]]:
    """One by one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportArgumentType, reportReturnType]


def check_count(prompts: Any, most: int) -> Any:
    """For a validator: neither none nor too many."""
    if isinstance(prompts, Sequence) and not isinstance(prompts, str) and not prompts:
        raise ValueError("the list is empty")
    if isinstance(prompts, list) and not isinstance(prompts[0], int) and len(prompts) > most:
        raise ValueError(f"{len(prompts)} are too many; send at most {most} at a time")
    return prompts
