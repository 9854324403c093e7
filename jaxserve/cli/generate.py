"""Complete prompts. One prompt streams as it is written; several are answered as one batch.

The last line, on stderr, says how fast it was and where the time went.

examples:
  jaxserve generate tiny "def add(a, b):"
  jaxserve generate ./Qwen2.5-0.5B --file question.txt --chat --max-tokens 200
  cat prompt.txt | jaxserve generate tiny --temperature 0.8 --seed 1
  jaxserve generate tiny "import os" "import sys" --json > answers.jsonl
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.options import (
    add_engine_flags,
    add_meta_flags,
    add_sampling_flags,
    engine_options,
    join_processes,
    meta_of,
    sampling_params,
)
from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError
from jaxserve.model_source import find_folder
from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.output import RequestOutput

USAGE = "jaxserve generate MODEL [PROMPT ...] [options]"
DEFAULTS = {"max_tokens": 128, "temperature": 0.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="bundled name, folder, or hub id")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to go on from; none: read from stdin")
    parser.add_argument("--file", type=Path, action="append", default=[], metavar="FILE", help="a prompt from a file")
    parser.add_argument("--chat", action="store_true", help="send each prompt as a message of a chat")
    parser.add_argument("--token-ids", action="store_true", help="prompts and answers are token ids: '1 2 3'")
    parser.add_argument("--echo", action="store_true", help="print the prompt before the answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt instead of text")
    parser.add_argument("--stats", action=argparse.BooleanOptionalAction, default=True, help="the line on stderr")
    add_sampling_flags(parser, DEFAULTS)
    add_meta_flags(parser)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    params, meta = sampling_params(args, DEFAULTS), meta_of(args)
    given_options = engine_options(args)
    join_processes(args)
    find_folder(
        args.model, given_options.get("load_format", "auto")
    )  # a mistake in the name is told before jax is loaded
    texts = read_prompts(args)
    options = just_large_enough(texts, params.n, args) | given_options
    start = time.perf_counter()
    from jaxserve.llm import LLM

    import_s = time.perf_counter() - start
    llm = LLM(args.model, **options)
    prompts = [as_prompt(llm, text, args) for text in texts]
    answer_one = len(prompts) == 1 and params.n == 1 and not args.json
    outputs = [stream_one(llm, prompts[0], texts[0], params, meta, args)] if answer_one else []
    if not answer_one:
        outputs = llm.generate(prompts, params, progress=len(prompts) > 1 and sys.stderr.isatty(), meta=meta)
        for number, (text, output) in enumerate(zip(texts, outputs, strict=True), start=1):
            print(as_json(text, output) if args.json else as_text(text, output, f"{number} of {len(texts)}", args))
    if args.stats:
        sys.stdout.flush()
        print(stats_line(outputs, import_s, llm.metrics()), file=sys.stderr)
    return 0


def just_large_enough(texts: Sequence[str], n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Engine options that suffice for these prompts: every step size less is a compilation less before the first word.

    A token holds at least one byte, so short prompts bound the tokens of a step; a chat template adds its own.
    """
    fitted: dict[str, Any] = {"max_num_seqs": min(len(texts) * n, EngineConfig().max_num_seqs)}
    num_bytes = sum(len(text.encode()) + 8 for text in texts)
    if num_bytes <= 256 and not args.chat and getattr(args, "enable_chunked_prefill", True):
        fitted["max_num_batched_tokens"] = 64 if num_bytes <= 64 else 256
    return fitted


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then of files; of standard input if there are neither."""
    texts = [*args.prompts, *(path.read_text(encoding="utf-8") for path in args.file)]
    if not texts:
        if sys.stdin.isatty():
            print("Type the prompt, then Ctrl-D:", file=sys.stderr)
        texts = [sys.stdin.read()]
    return texts


def as_prompt(llm: "LLM", text: str, args: argparse.Namespace) -> Any:
    """What `LLM.generate` takes: text, token ids, or a chat with one message."""
    if args.token_ids:
        try:
            return [int(word) for word in text.replace(",", " ").split()]
        except ValueError:
            raise RequestError(f"{text!r:.60} is not a list of token ids", remedy="Write them as '1 2 3'") from None
    return llm.chat_prompt([{"role": "user", "content": text}]) if args.chat else text


def stream_one(
    llm: "LLM", prompt: Any, text: str, params: SamplingParams, meta: Mapping[str, Any], args: argparse.Namespace
) -> "RequestOutput | None":
    """Print an answer while it is made."""
    if not args.token_ids:
        _ = llm.tokenizer  # a model without one is told now, and not after the answer
    if args.echo:
        print(text, end="", flush=True)
    output = None
    for event in llm.stream_events(prompt, params, meta=meta):
        output = event.output
        print(spaced(event.token_ids) if args.token_ids else event.text, end="", flush=True)
    print()
    return output


def spaced(token_ids: Sequence[int]) -> str:
    return "".join(f"{token} " for token in token_ids)


def as_text(text: str, output: "RequestOutput", place: str, args: argparse.Namespace) -> str:
    """One prompt of a batch with its answers, each under a heading."""
    blocks = []
    for answer in output.outputs:
        which = f", answer {answer.index + 1} of {len(output.outputs)}" if len(output.outputs) > 1 else ""
        body = spaced(answer.token_ids) if args.token_ids else answer.text
        blocks.append(f"--- prompt {place}{which}\n{text if args.echo else ''}{body}")
    return "\n".join(blocks)


def as_json(text: str, output: "RequestOutput") -> str:
    """One line: the prompt, and its answers with everything that was asked for."""
    answers = [dataclasses.asdict(answer) for answer in output.outputs]
    return json.dumps({"prompt": text, "outputs": answers, "prompt_logprobs": plain(output.prompt_logprobs)})


def plain(tables: Any) -> Any:
    """Tables of Logprob as JSON takes them."""
    return tables and [table and {t: dataclasses.asdict(entry) for t, entry in table.items()} for table in tables]


def stats_line(outputs: Sequence["RequestOutput | None"], import_s: float, facts: Mapping[str, Any]) -> str:
    """Tokens per second, time to the first token, and where the time went."""
    done = [output for output in outputs if output is not None and output.metrics.finished_s is not None]
    num_tokens = sum(len(answer.token_ids) for output in done for answer in output.outputs)
    if not num_tokens:
        return "[no tokens]"
    arrival_s = min(output.metrics.arrival_s for output in done)
    first_s = min(output.metrics.first_token_s or arrival_s for output in done)
    finished_s = max(output.metrics.finished_s or first_s for output in done)
    prefill_s, decode_s = first_s - arrival_s, finished_s - first_s
    parts = {"import": import_s, "load": facts["load_s"], "warm-up": facts["warm_up_s"]}
    parts |= {"prefill": prefill_s, "decode": decode_s}
    # The first token belongs to the prefill, so the rate counts the tokens after it over the time after it.
    rate = (num_tokens - 1) / decode_s if num_tokens > 1 and decode_s > 0 else num_tokens / (finished_s - arrival_s)
    where = ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items())
    return f"[{num_tokens} tokens, {rate:.1f} tok/s, first after {prefill_s:.2f} s; seconds: {where}]"
