"""Measure how fast a model is served here, on prompts of random token ids (so nothing is cached or ends early).

  throughput   all prompts at once, as a batch job: tokens per second, TTFT, TPOT
  latency      a batch again and again: how long one takes, with percentiles

examples:
  jaxserve bench throughput --model tiny --num-prompts 64 --input-len 128 --output-len 64
  jaxserve bench latency --model ./Qwen2.5-0.5B --batch-size 1 --input-len 512 --output-len 64 --json latency.json
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.options import add_engine_flags, engine_options, join_processes
from jaxserve.errors import ConfigError
from jaxserve.model_source import config_of, find_folder
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM

USAGE = "jaxserve bench {throughput,latency} --model MODEL [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("throughput", "latency"))
    parser.add_argument("--model", required=True, metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("--num-prompts", type=int, default=32, metavar="N", help="throughput: prompts (default: 32)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="latency: prompts at once (default: 1)")
    parser.add_argument("--num-iters", type=int, default=10, metavar="N", help="latency: measured rounds (default: 10)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens per prompt (default: 128)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens per answer (default: 64)")
    parser.add_argument("--prefix-len", type=int, default=0, metavar="N", help="of these, shared by all (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("num_prompts", "batch_size", "num_iters", "input_len", "output_len"):
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
    measure = throughput if args.what == "throughput" else latency
    result = {"what": args.what, "model": args.model} | measure(llm, args, vocab_size)
    facts = llm.metrics()
    told = ("backend", "attention_backend", "dtype", "load_s", "warm_up_s", "compiles_after_ready")
    result |= {name: facts[name] for name in told}
    for name, value in result.items():
        print(f"{name:<22}{value:>14,.2f}" if isinstance(value, float) else f"{name:<22}{value!s:>14}")
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


def throughput(llm: "LLM", args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """All prompts handed over at once."""
    prompts = random_prompts(args.num_prompts, args.input_len, args.prefix_len, vocab_size, seed=0)
    start = time.perf_counter()
    outputs = llm.generate(prompts, answer(args.output_len), progress=sys.stderr.isatty())
    elapsed_s = time.perf_counter() - start
    num_output = sum(len(out.outputs[0].token_ids) for out in outputs)
    num_total = num_output + args.num_prompts * args.input_len
    return {
        "prompts": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "elapsed_s": elapsed_s,
        "requests_per_s": args.num_prompts / elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "total_tokens_per_s": num_total / elapsed_s,
        **percentiles("ttft_ms", [1e3 * ttft_s(out) for out in outputs]),
        **percentiles("tpot_ms", [1e3 * tpot_s(out) for out in outputs]),
    }


def latency(llm: "LLM", args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """One batch after the other, each of new prompts; the first, unmeasured, takes what only a first round costs."""
    rounds = []
    for seed in range(args.num_iters + 1):
        prompts = random_prompts(args.batch_size, args.input_len, args.prefix_len, vocab_size, seed)
        start = time.perf_counter()
        outputs = llm.generate(prompts, answer(args.output_len))
        rounds.append((time.perf_counter() - start, outputs))
    measured = rounds[1:]
    outputs = [out for _, outs in measured for out in outs]
    return {
        "batch_size": args.batch_size,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rounds": args.num_iters,
        **percentiles("latency_ms", [1e3 * seconds for seconds, _ in measured]),
        **percentiles("ttft_ms", [1e3 * ttft_s(out) for out in outputs]),
        **percentiles("tpot_ms", [1e3 * tpot_s(out) for out in outputs]),
    }


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
