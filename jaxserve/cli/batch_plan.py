"""The order of a batch: jobs are read ahead, and prompts that begin alike are answered together."""

import array
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxserve.cli.batch_body import Item, Job, Pin, Prompt
from jaxserve.scheduler.prefix_groups import Group, plan_groups

if TYPE_CHECKING:
    from jaxserve.llm import LLM

MOST_TOKENS = 1 << 25  # read ahead; a larger batch is planned part by part. They take some 0.45 GB
_JOB_TOKENS = 256  # what a job takes in memory beside its tokens, in tokens
_UNKNOWN_ANSWER = 256  # tokens, where a request sets no limit


def planned(
    llm: "LLM", items: Iterator[Item], say: Callable[[str], None], most_tokens: int = MOST_TOKENS
) -> Iterator[Item]:
    """The same jobs in the order in which to start them; their prompts are token ids, with the pins of their groups.

    What cannot be answered comes at once. `say` is told what the plan of each part saves.
    """
    part, num_tokens, num_parts = list[Item](), 0, 0
    for item in items:
        number, custom_id, job = item
        if not isinstance(job, Job):
            yield item
            continue
        job = _encoded(llm, job)
        part.append((number, custom_id, job))
        num_tokens += _JOB_TOKENS + sum(map(len, map(_token_ids, job.prompts)))
        if num_tokens >= most_tokens:
            num_parts += 1
            yield from _ordered(part, llm.config.block_size, f"{num_parts}.", say)
            part, num_tokens = [], 0
    yield from _ordered(part, llm.config.block_size, f"{num_parts + 1}.", say)


def _encoded(llm: "LLM", job: Job) -> Job:
    """A job with its prompts as token ids; as it is, if that fails: it fails again, and says why, when it is started."""
    try:
        prompts = [llm.chat_prompt(job.messages, **job.template)] if job.messages else job.prompts
        return dataclasses.replace(job, prompts=tuple(_compact(llm, prompt, job.echo) for prompt in prompts))
    except Exception:  # noqa: BLE001
        return job


def _compact(llm: "LLM", prompt: Prompt, keeps_text: bool) -> dict[str, Any]:
    """Four bytes per token, and the text if it is wanted back."""
    text, ids = (None, prompt)
    if isinstance(prompt, str):
        text, ids = prompt, llm.tokenizer.encode(prompt)
    elif isinstance(prompt, Mapping):
        text, ids = prompt["prompt"], prompt["prompt_token_ids"]
    return {"prompt": text if keeps_text else None, "prompt_token_ids": array.array("i", ids)}


def _token_ids(prompt: Prompt) -> Sequence[int]:
    return prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else ()


def _ordered(part: Sequence[Item], block_size: int, name: str, say: Callable[[str], None]) -> list[Item]:
    """Jobs by the first of their prompts to go; groups are called `name` and a number."""
    jobs = [job for _, _, job in part if isinstance(job, Job)]
    places = [(which, prompt) for which, job in enumerate(jobs) for prompt in range(max(len(job.prompts), 1))]
    prompts = [_shareable(jobs[which], prompt) for which, prompt in places]
    groups = plan_groups(prompts, [_answer_tokens(jobs[which]) for which, _ in places], block_size)
    groups.sort(key=lambda group: min(jobs[places[member][0]].meta.get("priority", 0) for member in group.members))
    pins: list[list[Pin | None]] = [[None] * len(job.prompts) for job in jobs]
    order = dict[int, None]()
    for number, group in enumerate(groups):
        for member in group.members:
            which, prompt = places[member]
            order[which] = None
            if group.num_shared:
                pins[which][prompt] = Pin(f"{name}{number}", group.num_shared, len(group.members))
    if jobs:
        say(_savings(groups, sum(len(ids) for job in jobs for ids in map(_token_ids, job.prompts))))
    return [(*part[which][:2], dataclasses.replace(jobs[which], pins=tuple(pins[which]))) for which in order]


def _shareable(job: Job, prompt: int) -> np.ndarray:
    """The token ids of a prompt; none if it can take nothing from the cache, or has none."""
    if not job.prompts or job.params.prompt_logprobs is not None:
        return np.zeros(0, np.int32)
    return np.array(_token_ids(job.prompts[prompt]), np.int32)


def _answer_tokens(job: Job) -> int:
    if job.url == "/v1/embeddings":
        return 0
    return job.params.n * (job.params.max_tokens or _UNKNOWN_ANSWER)


def _savings(groups: Sequence[Group], num_tokens: int) -> str:
    shared = [group for group in groups if group.num_shared]
    num_spared = sum(group.num_shared * (len(group.members) - 1) for group in shared)
    num_prompts = sum(len(group.members) for group in groups)
    return (
        f"{num_prompts} prompts, groups that begin alike: {len(shared)}; "
        f"{num_spared:,} of {num_tokens:,} prompt tokens are shared"
    )
