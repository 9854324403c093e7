"""Log-probabilities in the two forms of OpenAI's API, and vLLM's one for prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.openai.fields import finite
from jaxserve.output import Logprob, RequestOutput
from jaxserve.tokenizer import Tokenizer

Table = Mapping[int, Logprob]


def completion_logprobs(
    token_ids: Sequence[int],
    tables: Sequence[Table | None],
    num_top: int,
    tokenizer: Tokenizer | None,
    offset: int = 0,
    *,
    as_ids: bool = False,
) -> tuple[dict[str, Any], int]:
    """Parallel lists, an entry for each token, and the characters up to the end of the last one. The very first token of a
    prompt has no log-probability.

    `offset`: characters before the first token. `as_ids`: tokens are named by their numbers, which no two share.
    """
    tokens, offsets = list[str](), list[int]()
    for token_id, table in zip(token_ids, tables, strict=True):
        if table is not None:
            text = token_text(token_id, table[token_id])
        elif tokenizer is not None:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
        else:
            text = _number(token_id)
        tokens.append(_number(token_id) if as_ids else text)
        offsets.append(offset)
        offset += len(text)
    rows = list(zip(token_ids, tables, strict=True))
    made = {
        "tokens": tokens,
        "token_logprobs": [None if table is None else finite(table[own].logprob) for own, table in rows],
        "top_logprobs": [None if table is None else _top(own, table, num_top, as_ids) for own, table in rows],
        "text_offset": offsets,
    }
    return made, offset


def _top(own: int, table: Table, num_top: int, as_ids: bool) -> dict[str, float]:
    """The likeliest tokens, and the one that was taken."""
    return {
        _number(t) if as_ids else token_text(t, entry): finite(entry.logprob)
        for t, entry in table.items()
        if entry.rank <= num_top or t == own
    }


def chat_logprobs(token_ids: Sequence[int], tables: Sequence[Table], num_top: int) -> dict[str, Any]:
    """One object for each token, the likeliest alternatives inside of it, best first."""
    content = []
    for token_id, table in zip(token_ids, tables, strict=True):
        top = [_chat_token(t, entry) for t, entry in table.items() if entry.rank <= num_top]
        top.sort(key=lambda entry: -entry["logprob"])
        content.append(_chat_token(token_id, table[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = token_text(token_id, entry)
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(text.encode())}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """vLLM's extra field, for requests that asked for it."""
    return [
        None
        if table is None
        else {
            str(t): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for t, entry in table.items()
        }
        for table in output.prompt_logprobs or ()
    ]


def token_text(token_id: int, entry: Logprob) -> str:
    """A token as text; of a model without a tokenizer its number."""
    return entry.decoded_token if entry.decoded_token is not None else _number(token_id)


def _number(token_id: int) -> str:
    return f"token_id:{token_id}"
