"""What `bench throughput` and `bench latency` share: an engine in this process, and prompts of random token ids (so nothing
is cached or ends early)."""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.options import add_engine_flags, engine_options, join_processes
from jaxserve.errors import ConfigError
from jaxserve.model_source import config_of, find_folder
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

Measure = Callable[["LLM", argparse.Namespace, int], dict[str, Any]]


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens per prompt (default: 128)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens per answer (default: 64)")
    parser.add_argument("--prefix-len", type=int, default=0, metavar="N", help="of these, shared by all (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    add_engine_flags(parser)


def run_offline(args: argparse.Namespace, what: str, measure: Measure, counts: Sequence[str]) -> int:
    """Check, load, measure, print. `counts`: arguments that must be at least 1."""
    for name in (*counts, "input_len", "output_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.prefix_len <= args.input_len:
        raise ConfigError(f"--prefix-len must lie between 0 and --input-len ({args.input_len}), not {args.prefix_len}")
    options = engine_options(args)
    join_processes(args)
    find_folder(args.model, options.get("load_format", "auto"))  # a mistake in the name is told before jax is loaded
    vocab_size = config_of(args.model).vocab_size
    from jaxserve.llm import LLM

    llm = LLM(args.model, **options)
    result = {"what": what, "model": args.model} | measure(llm, args, vocab_size)
    facts = llm.metrics()
    told = ("backend", "attention_backend", "dtype", "load_s", "warm_up_s", "compiles_after_ready")
    result |= {name: facts[name] for name in told}
    for name, value in result.items():
        print(f"{name:<22}{value:>14,.2f}" if isinstance(value, float) else f"{name:<22}{value!s:>14}")
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


def answer(output_len: int) -> SamplingParams:
    """Exactly `output_len` tokens: the end-of-text token does not end it."""
    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)


def random_prompts(number: int, length: int, prefix_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary; the first `prefix_len` are the same in all prompts and rounds."""
    shared = random.Random("prefix")
    own = random.Random(seed)
    prefix = [shared.randrange(vocab_size) for _ in range(prefix_len)]
    return [prefix + [own.randrange(vocab_size) for _ in range(length - prefix_len)] for _ in range(number)]


def ttft_s(output: Any) -> float:
    """Seconds from arrival to the first token, waiting in the queue included."""
    return output.metrics.first_token_s - output.metrics.arrival_s


def tpot_s(output: Any) -> float:
    """Seconds per token after the first."""
    num_later = max(len(output.outputs[0].token_ids) - 1, 1)
    return (output.metrics.finished_s - output.metrics.first_token_s) / num_later


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, p50, p90 and p99 under `name_...`."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {
        f"{name}_mean": statistics.fmean(ordered),
        f"{name}_p50": at(0.5),
        f"{name}_p90": at(0.9),
        f"{name}_p99": at(0.99),
    }
