"""Answers of the engine -> bodies of OpenAI responses."""

import base64
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxserve.cli.batch_body import Job

if TYPE_CHECKING:
    import numpy as np

    from jaxserve.output import CompletionOutput, Logprob, RequestOutput
    from jaxserve.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity

Table = Mapping[int, "Logprob"]


def body_of(job: Job, outputs: Sequence["RequestOutput"], tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """The response body of a job whose prompts gave `outputs`."""
    if job.url == "/v1/embeddings":
        return embedding_body(job, outputs)
    return chat_body(job, outputs[0]) if job.messages else completion_body(job, outputs, tokenizer)


def completion_body(job: Job, outputs: Sequence["RequestOutput"], tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """`text_completion`; with several prompts the choices of each follow one another."""
    choices = []
    for output in outputs:
        for answer in output.outputs:
            choices.append({"index": len(choices)} | completion_choice(job, output, answer, tokenizer))
    return envelope(job, "cmpl", "text_completion") | {"choices": choices, "usage": usage(job, outputs)}


def completion_choice(
    job: Job, output: "RequestOutput", answer: "CompletionOutput", tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    text = "" if job.prompt_only else answer.text
    if job.echo and tokenizer is not None:
        text = (output.prompt if output.prompt is not None else tokenizer.decode(output.prompt_token_ids)) + text
    logprobs = None
    if answer.logprobs is not None:
        tables: list[Table | None] = [] if job.prompt_only else list(answer.logprobs)
        ids = [] if job.prompt_only else answer.token_ids
        if job.echo:
            tables, ids = [*(output.prompt_logprobs or ()), *tables], [*output.prompt_token_ids, *ids]
        logprobs = completion_logprobs(ids, tables, job.params.logprobs or 0, tokenizer)
    choice: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}
    choice["stop_reason"] = answer.stop_reason
    if tokenizer is None:
        choice["token_ids"] = answer.token_ids
    return choice | prompt_logprobs(job, output)


def completion_logprobs(
    token_ids: Sequence[int], tables: Sequence[Table | None], num_top: int, tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    """Parallel lists, one entry per token. The very first token of a prompt has no log-probability."""
    tokens, offsets, position = [], [], 0
    for token_id, table in zip(token_ids, tables, strict=True):
        text = tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer is not None else None
        text = text if table is None else token_text(token_id, table[token_id])
        tokens.append(text if text is not None else f"token_id:{token_id}")
        offsets.append(position)
        position += len(tokens[-1])
    rows = list(zip(token_ids, tables, strict=True))
    return {
        "tokens": tokens,
        "token_logprobs": [None if table is None else finite(table[token_id]) for token_id, table in rows],
        "top_logprobs": [None if table is None else top_table(own, table, num_top) for own, table in rows],
        "text_offset": offsets,
    }


def top_table(own: int, table: Table, num_top: int) -> dict[str, float]:
    """The likeliest tokens, and the one that was taken."""
    return {token_text(t, entry): finite(entry) for t, entry in table.items() if is_top(entry, num_top) or t == own}


def chat_body(job: Job, output: "RequestOutput") -> dict[str, Any]:
    """`chat.completion`."""
    choices = [
        {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": chat_logprobs(answer, job.params.logprobs or 0),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        | prompt_logprobs(job, output)
        for answer in output.outputs
    ]
    return envelope(job, "chatcmpl", "chat.completion") | {"choices": choices, "usage": usage(job, [output])}


def chat_logprobs(answer: "CompletionOutput", num_top: int) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    content = []
    for token_id, table in zip(answer.token_ids, answer.logprobs, strict=True):
        top = [chat_token(t, entry) for t, entry in table.items() if is_top(entry, num_top)]
        top.sort(key=lambda entry: -entry["logprob"])
        content.append(chat_token(token_id, table[token_id]) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def chat_token(token_id: int, entry: "Logprob") -> dict[str, Any]:
    text = token_text(token_id, entry)
    return {"token": text, "logprob": finite(entry), "bytes": list(text.encode())}


def prompt_logprobs(job: Job, output: "RequestOutput") -> dict[str, Any]:
    """vLLM's extra field, for requests that asked for it."""
    if job.params.prompt_logprobs is None or output.prompt_logprobs is None:
        return {}
    tables = [
        None
        if table is None
        else {
            str(t): {"logprob": finite(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for t, entry in table.items()
        }
        for table in output.prompt_logprobs
    ]
    return {"prompt_logprobs": tables}


def embedding_body(job: Job, outputs: Sequence["RequestOutput"]) -> dict[str, Any]:
    """`list` of `embedding`, each of length 1."""
    rows = [
        {"object": "embedding", "index": index, "embedding": vector_of(job, output.hidden)}
        for index, output in enumerate(outputs)
    ]
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "object": "list",
        "data": rows,
        "model": job.model,
        "usage": {"prompt_tokens": num_prompt, "total_tokens": num_prompt},
    }


def vector_of(job: Job, hidden: "np.ndarray | None") -> list[float] | str:
    assert hidden is not None
    unit = hidden / max(float((hidden**2).sum()) ** 0.5, 1e-12)
    return base64.b64encode(unit.astype("<f4").tobytes()).decode() if job.base64 else [float(value) for value in unit]


def envelope(job: Job, prefix: str, kind: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": job.model}


def usage(job: Job, outputs: Sequence["RequestOutput"]) -> dict[str, Any]:
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answers = [] if job.prompt_only else [answer for output in outputs for answer in output.outputs]
    num_answer = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)},
    }


def token_text(token_id: int, entry: "Logprob") -> str:
    return entry.decoded_token if entry.decoded_token is not None else f"token_id:{token_id}"


def is_top(entry: "Logprob", num_top: int) -> bool:
    return entry.rank <= num_top


def finite(entry: "Logprob") -> float:
    return max(entry.logprob, LOWEST_LOGPROB)
