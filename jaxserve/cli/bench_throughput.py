"""Measure an engine on many random prompts that are handed over at once, as a batch job.

examples:
  jaxserve bench throughput --model tiny --num-prompts 64 --input-len 128 --output-len 64
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxserve.cli.bench_offline import (
    add_shared_arguments,
    answer,
    percentiles,
    random_prompts,
    run_offline,
    tpot_s,
    ttft_s,
)

if TYPE_CHECKING:
    from jaxserve.llm import LLM

USAGE = "jaxserve bench throughput --model MODEL [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, default=32, metavar="N", help="how many (default: 32)")
    add_shared_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return run_offline(args, "throughput", throughput, ["num_prompts"])


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
