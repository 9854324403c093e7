"""The groups of flags that commands share: engine options, sampling options, and those of several processes."""

import argparse
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jaxserve.cli.flags import add_dataclass_flags, given
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.request import SamplingParams

SAMPLING_HELP = {
    "n": "answers per prompt",
    "temperature": "randomness: 0 takes the likeliest token, 1 samples the model's own distribution",
    "top_p": "sample only among the likeliest tokens that hold this share of the probability",
    "top_k": "sample only among this many likeliest tokens; 0: all",
    "min_p": "sample only among tokens at least this fraction as likely as the likeliest",
    "stop": "end the answer before this text",
    "stop_token_ids": "end the answer at this token",
    "ignore_eos": "go on after the model's own end token",
    "max_tokens": "longest answer in tokens",
    "min_tokens": "no end before this many tokens",
    "presence_penalty": "taken from the score of tokens that the answer holds already, once",
    "frequency_penalty": "taken from the score of tokens that the answer holds already, for each time",
    "repetition_penalty": "divides the score of tokens that prompt or answer hold already; 1: off",
    "logprobs": "log-probabilities of each token and of this many alternatives",
    "prompt_logprobs": "the same for the prompt",
    "logit_bias": 'added to the scores of tokens, as {"token id": amount}',
    "allowed_token_ids": "choose only this token",
    "bad_words": "never produce this text",
    "skip_special_tokens": "leave special tokens out of the text",
    "include_stop_str_in_output": "keep the stop text at the end of the answer",
    "structured_outputs": 'what the answer must look like: {"json": schema}, {"regex": text}, {"choice": texts}, ...',
}
# Engine options that say how much room an engine has: those of commands that load no model, beside their own.
ROOM_OPTIONS = (
    "dtype",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_kv_blocks",
    "memory_utilization",
    "enable_chunked_prefill",
)
NOT_FLAGS = ("seed",)  # `--seed` is an engine option and seeds sampling too


def add_engine_flags(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
    """`defaults`: where a command differs from `EngineConfig`; hand the same to `engine_options`."""
    add_dataclass_flags(parser, EngineConfig, "engine options", defaults=defaults)
    add_process_flags(parser)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "The same command in each; process 0 does what it says, the others help and end when it does.",
    )
    auto = (
        "join the processes that Cloud TPU, Slurm, Open MPI or Kubernetes started; without them, give all three below"
    )
    group.add_argument("--distributed", action="store_true", help=auto)
    group.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0; any free port")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="N", help="which one this is, from 0")


def join_processes(args: argparse.Namespace) -> None:
    """Where the flags ask for it, join the other processes; returns in process 0 only. Comes before files are touched."""
    wanted = (args.coordinator_address, args.num_processes, args.process_id)
    if args.distributed or any(value is not None for value in wanted):
        from jaxserve import distributed

        distributed.initialize(*wanted)


def add_sampling_flags(parser: argparse.ArgumentParser, defaults: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
    """`defaults`: where a command differs from `SamplingParams`; hand the same to `sampling_params`."""
    add_dataclass_flags(
        parser,
        SamplingParams,
        "sampling options",
        skip=(*NOT_FLAGS, *skip),
        texts=SAMPLING_HELP,
        defaults=defaults,
    )


def add_meta_flags(parser: argparse.ArgumentParser) -> None:
    """What a request says to the scheduler, where one process has one caller."""
    group = parser.add_argument_group(
        "for the scheduler", "Policies and quotas that know nothing of a field ignore it."
    )
    group.add_argument("--client", metavar="NAME", help="who asks: for fairness, quotas and accounts")
    group.add_argument("--program", metavar="NAME", help="what the prompts are a part of")
    group.add_argument("--stage", metavar="NAME", help="which step of the program they are")
    group.add_argument("--priority", type=float, metavar="X", help="smaller goes first (default: 0)")
    group.add_argument("--deadline-ms", type=float, metavar="X", help="until when the program's answer is wanted")


def meta_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Request` that were given.

    Raises:
      ConfigError: a number that cannot be meant.
    """
    meta = {name: getattr(args, name) for name in ("client", "program", "stage", "priority")}
    if meta["priority"] is not None and not math.isfinite(meta["priority"]):
        raise ConfigError("--priority must be a finite number")
    if args.deadline_ms is not None:
        if not 0 < args.deadline_ms < math.inf:
            raise ConfigError("--deadline-ms must be above 0")
        meta["deadline_s"] = args.deadline_ms / 1000
    return {name: value for name, value in meta.items() if value is not None}


def engine_options(args: argparse.Namespace, defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Keyword arguments for `LLM`, checked here, so that a mistake is told before jax is loaded."""
    options = dict(defaults) | given(args, EngineConfig)
    EngineConfig(**options)
    return options


def sampling_params(args: argparse.Namespace, defaults: dict[str, Any]) -> SamplingParams:
    """The sampling options that were given, over a command's own defaults."""
    return SamplingParams(**(defaults | given(args, SamplingParams)))
