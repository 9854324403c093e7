"""The order of a batch: jobs are read ahead, and prompts that begin alike are answered together."""

import array
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.batch.flight import Engine, tokenizer_of
from jaxserve.batch.job import Item, Job, Pin
from jaxserve.intake import Prompt
from jaxserve.request import Task
from jaxserve.scheduler.prefix_groups import Group, plan_groups
from jaxserve.tokenizer import Tokenizer

MOST_TOKENS = 1 << 25  # read ahead; a larger batch is planned part by part. They take some 0.45 GB
_JOB_TOKENS = 1024  # what a job takes in memory beside its tokens, in tokens
_UNKNOWN_ANSWER = 256  # tokens, where a request sets no limit


def planned(
    engine: Engine, items: Iterator[Item], say: Callable[[str], None], *, most_tokens: int = MOST_TOKENS, name: str = ""
) -> Iterator[Item]:
    """The same jobs in the order in which to start them; their prompts are token ids, with the pins of their groups.

    What cannot be answered comes at once. `say` is told what the plan of each part saves. `name` sets the pins apart from
    those of other batches in the same engine.
    """
    part, num_tokens, num_parts = list[Item](), 0, 0
    tokenizer, block_size = tokenizer_of(engine), engine.config.block_size
    for item in items:
        number, custom_id, job = item
        if not isinstance(job, Job):
            yield item
            continue
        job = _encoded(tokenizer, job)
        part.append((number, custom_id, job))
        num_tokens += _JOB_TOKENS + sum(map(len, map(_token_ids, job.prompts)))
        if num_tokens >= most_tokens:
            num_parts += 1
            yield from _ordered(part, block_size, f"{name}{num_parts}.", say)
            part, num_tokens = [], 0
    yield from _ordered(part, block_size, f"{name}{num_parts + 1}.", say)


def _encoded(tokenizer: Tokenizer | None, job: Job) -> Job:
    """A job with its prompts as token ids; as it is, if that fails: it fails again, and says why, when it is started."""
    try:
        prompts = job.work.prompts()
        compact = tuple(_compact(tokenizer, prompt, job.work.keeps_text) for prompt in prompts)
    except Exception:  # noqa: BLE001
        return job
    return dataclasses.replace(job, prompts=compact, work=dataclasses.replace(job.work, prompts=lambda: compact))


def _compact(tokenizer: Tokenizer | None, prompt: Prompt, keeps_text: bool) -> dict[str, Any]:
    """Four bytes per token, and the text if it is wanted back."""
    text, ids = None, prompt
    if isinstance(prompt, str):
        assert tokenizer is not None
        text, ids = prompt, tokenizer.encode(prompt)
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
    if not job.prompts or job.work.params.prompt_logprobs is not None:
        return np.zeros(0, np.int32)
    return np.array(_token_ids(job.prompts[prompt]), np.int32)


def _answer_tokens(job: Job) -> int:
    params = job.work.params
    return params.n * (params.max_tokens or _UNKNOWN_ANSWER) if job.work.task is Task.GENERATE else 0


def _savings(groups: Sequence[Group], num_tokens: int) -> str:
    shared = [group for group in groups if group.num_shared]
    num_spared = sum(group.num_shared * (len(group.members) - 1) for group in shared)
    num_prompts = sum(len(group.members) for group in groups)
    return (
        f"{num_prompts} prompts, groups that begin alike: {len(shared)}; "
        f"{num_spared:,} of {num_tokens:,} prompt tokens are shared"
    )
