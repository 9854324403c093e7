"""Answer a file of requests in the OpenAI batch format (completions, chat completions, embeddings, scores, rankings).

Each input line is {"custom_id", "method", "url", "body"}; each output line {"id", "custom_id", "response", "error"},
in the order in which answers are ready. A line that cannot be answered gets an output line with an error, and the
others go on. A run that was stopped or killed goes on where it was: give the same command again.

Prompts that begin alike are answered together, so that the beginning is computed once. For that the input is read ahead,
up to 33 million tokens at a time; answers come in another order than requests. With any other --scheduling-policy than
batchllm the requests are read as they are needed, and start in the order of the file.

For the scheduler, a body may also have client, program, stage, parents (custom_ids of lines that its prompt was made from),
priority (smaller goes first) and deadline_ms.

examples:
  jaxserve run-batch -i requests.jsonl -o answers.jsonl --model tiny
  jaxserve run-batch -i requests.jsonl -o answers.jsonl --model ./Qwen2.5-0.5B --served-model-name gpt-4o-mini
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tqdm import tqdm

from jaxserve.batch.endpoints import Model
from jaxserve.batch.flight import Flight, tokenizer_of
from jaxserve.batch.job import Reader, jobs
from jaxserve.batch.lines import Line, read_lines
from jaxserve.batch.plan import planned
from jaxserve.batch.results import append, open_results, result_line
from jaxserve.cli.options import add_engine_flags, engine_options, join_processes
from jaxserve.errors import ConfigError
from jaxserve.model_source import find_folder
from jaxserve.openai.errors import ApiError
from jaxserve.openai.turn import Dialect

if TYPE_CHECKING:
    from jaxserve.llm import LLM

USAGE = "jaxserve run-batch -i INPUT -o OUTPUT --model MODEL [options]"
DEFAULTS = {"scheduling_policy": "batchllm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", type=Path, required=True, metavar="FILE", help="requests, one per line")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="answers; appended to")
    parser.add_argument("--model", required=True, metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME", help="also answer for this model name"
    )
    add_engine_flags(parser, DEFAULTS)


def run(args: argparse.Namespace) -> int:
    options = engine_options(args, DEFAULTS)
    join_processes(args)
    folder = find_folder(args.model, options.get("load_format", "auto"))
    names = {folder.name, folder.resolve().name} if folder else ()
    served = [args.model, *args.served_model_name, *names]
    if args.output.exists() and args.input.samefile(args.output):
        raise ConfigError("-i and -o name the same file", remedy="Give another -o")
    with args.input.open("rb") as source:  # before the output is touched, and before jax is loaded
        keys = [key for _, key, _ in read_lines(source)]
    results, answered = open_results(args.output)
    with results:
        num_left = sum(key not in answered for key in keys)
        if num_left < len(keys):
            print(f"{len(keys) - num_left} of {len(keys)} lines are answered already", file=sys.stderr)
        if not num_left:
            return 0
        from jaxserve.llm import LLM

        llm = LLM(args.model, **options)
        with args.input.open("rb") as source:
            todo = (line for line in read_lines(source) if line[1] not in answered)
            try:
                said = answer_lines(llm, todo, served, results, num_left, options.get("progress", True))
            except KeyboardInterrupt:
                print("\nstopped; the same command goes on from here", file=sys.stderr)
                raise
        print(said, file=sys.stderr)
    return 0


def model_of(llm: "LLM", served: Sequence[str]) -> Model:
    """What request bodies are read for."""
    tokenizer = tokenizer_of(llm)
    return Model(
        names=served,
        tokenizer=tokenizer,
        dialect=Dialect.of(tokenizer),
        max_model_len=llm.max_model_len,
        embedding_size=llm.embedding_size,
    )


def answer_lines(
    llm: "LLM", todo: Iterator[Line], served: Sequence[str], results: BinaryIO, num_left: int, progress: bool
) -> str:
    """Answer every line; returns a sentence that sums it up."""
    start_s = time.perf_counter()
    num_errors = num_tokens = num_prompt = num_cached = 0
    items = jobs(todo, Reader(model=model_of(llm, served)))
    is_planned = llm.config.scheduling_policy == "batchllm" and llm.config.enable_prefix_caching
    if is_planned:
        items = planned(llm, items, lambda text: tqdm.write(text, file=sys.stderr))
    flight = Flight(llm, items, lambda: 2 * llm.config.max_running)  # so that the engine never waits for us
    bar = tqdm(total=num_left, unit="req", desc="run-batch", disable=None if progress else True)
    bar.set_postfix_str("reading ahead" if is_planned else "")
    with bar, contextlib.closing(flight.answers()) as answers:
        for number, custom_id, answer in answers:
            append(results, result_line(number, custom_id, answer))
            if isinstance(answer, ApiError):
                num_errors += 1
            else:
                num_tokens += answer["usage"]["total_tokens"]
                num_prompt += answer["usage"]["prompt_tokens"]
                num_cached += answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
            bar.update()
            bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start_s):.0f} tok/s", refresh=False)
    elapsed_s = time.perf_counter() - start_s
    return (
        f"{num_left - num_errors} answered, {num_errors} refused in {elapsed_s:.1f} s; "
        f"{num_tokens / elapsed_s:.0f} tokens per second, prompts included; "
        f"{num_cached:,} of {num_prompt:,} prompt tokens came from the cache"
    )
