"""Measure how long an engine takes for a batch of random prompts, one batch after the other.

examples:
  jaxserve bench latency --model ./Qwen2.5-0.5B --batch-size 1 --input-len 512 --output-len 64 --json latency.json
"""

import argparse
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

USAGE = "jaxserve bench latency --model MODEL [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at once (default: 1)")
    parser.add_argument("--num-iters", type=int, default=10, metavar="N", help="measured rounds (default: 10)")
    add_shared_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return run_offline(args, "latency", latency, ["batch_size", "num_iters"])


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
