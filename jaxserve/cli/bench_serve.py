"""Put load on a server that speaks OpenAI's protocol (jaxserve, vLLM, SGLang, llama.cpp, ...) and say how it did.

Datasets (--dataset-name):
  random     prompts and answers of a given length (--random-...)
  sharegpt   lengths spread as in conversations that people share; with --dataset-path the prompts of ShareGPT's file
  trace      --dataset-path: Azure's CSV, Mooncake's JSON lines, or JSON lines of ours, with the times in it
  chains, agents, chat, map-reduce, ...   the generated workloads of `jaxserve simulate`

With --tokenizer prompts have exactly the wanted length, and /v1/completions gets token ids. Without it they are common
words, which are about one token each; the report counts what the server says. Flags are those of `vllm bench serve`.

examples:
  jaxserve bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --max-concurrency 16
  jaxserve bench serve --dataset-name sharegpt --request-rate 4 --num-prompts 500 --goodput ttft:500 tpot:50 \\
      --endpoint /v1/chat/completions --save-result result.json
  jaxserve bench serve --dataset-name trace --dataset-path azure_conv.csv --ignore-eos
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxserve.cli.flags import json_object
from jaxserve.config import reject_unknown
from jaxserve.errors import ConfigError
from jaxserve.loadgen import dataset
from jaxserve.loadgen.arrivals import checked_rate, random_times, replayed
from jaxserve.loadgen.client import CHAT, COMPLETIONS, Answer, Client
from jaxserve.loadgen.http import Host
from jaxserve.loadgen.prompts import Prompts, Vocabulary, load_vocabulary
from jaxserve.loadgen.report import METRICS, details, read_goodput, report, table
from jaxserve.loadgen.run import Load, Result, check, run_load
from jaxserve.open_files import raise_limit
from jaxserve.workload.call import Workload
from jaxserve.workload.generate import WORKLOADS, generate
from jaxserve.workload.trace import read_trace

USAGE = "jaxserve bench serve [--base-url URL] [--model NAME] [--dataset-name NAME] [options]"
DATASETS = ("random", "sharegpt", "trace", *(name for name in WORKLOADS if name != "sharegpt"))
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
EXIT_INTERRUPTED = 130
_MOST = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    url = "of the server (default: http://127.0.0.1:8000)"
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help=url)
    group.add_argument("--endpoint", default=COMPLETIONS, metavar="PATH", help=f"{COMPLETIONS} (default) or {CHAT}")
    group.add_argument("--model", metavar="NAME", help="as the server calls it (default: the first one that it lists)")
    key = "default: $OPENAI_API_KEY, which other users of the machine cannot see"
    group.add_argument("--api-key", metavar="TEXT", help=key)
    group.add_argument(
        "--header", action="append", default=[], metavar="NAME=VALUE", help="sent with every request; may be repeated"
    )
    group.add_argument("--ssl-ca-certs", type=Path, metavar="FILE", help="certificates to trust, beside the system's")
    group.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    group.add_argument("--request-timeout", type=float, default=3600, metavar="S", help="for an answer (default: 3600)")
    _add_dataset(parser)
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="requests per second (default: inf, all at once, or the trace's)",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="shape of the gamma distribution of times between requests: 1 (default) Poisson, below 1 bursts",
    )
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="requests under way at once (default: no limit)"
    )
    group.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before it counts (default: 0)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and times (default: 0)")
    group = parser.add_argument_group("body of the requests", "What is not given is not sent.")
    for name in SAMPLING:
        kind: Any = int if name == "top_k" else float
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X")
    group.add_argument(
        "--ignore-eos", action="store_true", help="answers of exactly the wanted length, where it is known"
    )
    group.add_argument("--extra-body", type=json_object((str, Any)), default={}, metavar="JSON", help="further fields")
    group.add_argument("--send-meta", action="store_true", help="a trace's clients, programs, priorities, deadlines")
    _add_output(parser)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset-name", default="random", metavar="NAME", help=", ".join(DATASETS))
    group.add_argument("--dataset-path", type=Path, metavar="FILE", help="of trace or sharegpt")
    group.add_argument(
        "--num-prompts", type=int, metavar="N", help="requests, or programs (default: 1000; a whole trace)"
    )
    group.add_argument("--tokenizer", metavar="NAME", help="folder, tokenizer.json, or hub id, for exact lengths")
    group.add_argument("--random-input-len", type=int, default=1024, metavar="N", help="tokens (default: 1024)")
    group.add_argument("--random-output-len", type=int, default=128, metavar="N", help="tokens (default: 128)")
    group.add_argument(
        "--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all share (default: 0)"
    )
    ratio = "lengths differ by up to this share (default: 0)"
    group.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X", help=ratio)
    group.add_argument("--sharegpt-output-len", type=int, metavar="N", help="instead of the lengths in the file")
    options = 'of a generated workload, such as {"cv": 2}'
    group.add_argument("--workload-options", type=json_object((str, Any)), default={}, metavar="JSON", help=options)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("report")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count answers within limits: ttft:500 tpot:50 e2el:9000",
    )
    names = ",".join(METRICS)
    group.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES", help=f"among {names}")
    group.add_argument("--metric-percentiles", default="90,99", metavar="P,P", help="(default: 90,99)")
    group.add_argument("--save-result", type=Path, metavar="FILE", help="write the figures as JSON, by vLLM's names")
    group.add_argument("--save-detailed", action="store_true", help="each request's too")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    _check(args)
    metrics, percentiles = _names(args.percentile_metrics), _percentiles(args.metric_percentiles)
    goodput = read_goodput(args.goodput)
    vocabulary = load_vocabulary(args.tokenizer)
    workload, texts = _workload(args, vocabulary)
    headers = dict(_header(text) for text in args.header)
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    base_url = args.base_url.rstrip("/").removesuffix("/v1") if args.endpoint.startswith("/v1") else args.base_url
    host = Host(base_url, _tls(args))
    client = Client(
        host,
        headers=headers,
        timeout_s=args.request_timeout,
        count=vocabulary.count if vocabulary.is_exact else None,
    )
    is_chat = args.endpoint.endswith("/chat/completions")
    load = Load(
        workload=workload,
        prompts=Prompts(vocabulary, args.seed, as_ids=vocabulary.is_exact and not is_chat, texts=texts),
        endpoint=args.endpoint,
        shared=_shared(args),
        with_meta=args.send_meta,
        max_concurrency=args.max_concurrency,
    )
    raise_limit()
    result, model = _loop()(_session(args, client, load))
    facts = {"date": time.strftime("%Y%m%d-%H%M%S"), "model": model, "base_url": base_url} | _asked(args)
    facts |= report(result, metrics=metrics, percentiles=percentiles, goodput=goodput)
    if args.save_result:
        args.save_result.write_text(json.dumps(facts | (details(result) if args.save_detailed else {})) + "\n", "utf-8")
    print(table(facts, metrics))
    if result.is_partial:
        print("jaxserve: interrupted; this is what there was so far", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 1 if facts["failed"] or facts["unsent"] else 0


async def _session(args: argparse.Namespace, client: Client, load: Load) -> tuple[Result, str]:
    try:
        return await _measure(args, client, load)
    finally:
        await client.close()


async def _measure(args: argparse.Namespace, client: Client, load: Load) -> tuple[Result, str]:
    """Look whether the server takes such requests, warm up, measure."""
    model = args.model or (await client.models() or [""])[0]
    load = dataclasses.replace(load, shared={"model": model, **load.shared})
    await check(client, load)
    if args.num_warmups:
        first = dataclasses.replace(load, workload=Workload("warm-up", load.workload.calls[: args.num_warmups]))
        prompts = load.prompts.reseeded("warm-up")  # nothing that a prefix cache could keep for the measurement
        await run_load(client, dataclasses.replace(first, prompts=prompts))
    is_hidden = args.disable_tqdm or not sys.stderr.isatty()
    with contextlib.closing(tqdm(total=len(load.workload.calls), unit="req", disable=is_hidden, leave=False)) as bar:

        def watch(answer: Answer) -> None:
            bar.update()
            if answer.error:
                bar.set_postfix_str(f"last error: {answer.error}", refresh=False)

        return await run_load(client, load, watch), model


def _loop() -> Any:
    """asyncio.run, or uvloop's where it is installed: it takes less of the processor."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _check(args: argparse.Namespace) -> None:
    """Mistakes that can be told before anything is read."""
    reject_unknown([args.dataset_name], DATASETS, what="dataset")
    if args.endpoint.rpartition("/")[2] != "completions":
        raise ConfigError(f"--endpoint {args.endpoint} must be {COMPLETIONS} or {CHAT}, or end like one of them")
    for name in ("num_prompts", "max_concurrency", "sharegpt_output_len"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= _MOST:
            raise ConfigError(f"--{name.replace('_', '-')} must lie between 1 and {_MOST:,}, not {value}")
    if not 0 <= args.num_warmups <= _MOST:
        raise ConfigError(f"--num-warmups must be 0 or more, not {args.num_warmups}")
    if not 0 < args.request_timeout < 1e9:
        raise ConfigError(f"--request-timeout {args.request_timeout:g} must be above 0")
    if args.dataset_name == "trace" and args.dataset_path is None:
        raise ConfigError("a trace needs --dataset-path FILE")
    if args.dataset_path is not None and args.dataset_name not in ("trace", "sharegpt"):
        raise ConfigError(f"--dataset-path is no option of the dataset {args.dataset_name}")
    if args.workload_options and (args.dataset_name in ("random", "trace") or args.dataset_path):
        raise ConfigError("--workload-options are those of a generated workload")


def _workload(args: argparse.Namespace, vocabulary: Vocabulary) -> tuple[Workload, dict[str, str]]:
    """What is sent when; and texts of calls that have some of their own."""
    rate = None if args.request_rate is None else checked_rate(args.request_rate)
    if args.dataset_name == "trace":
        workload = read_trace(args.dataset_path)
        return replayed(workload.first(args.num_prompts) if args.num_prompts else workload, rate), {}
    count = args.num_prompts or 1000
    times = random_times(count, float("inf") if rate is None else rate, args.burstiness, args.seed)
    if args.dataset_name == "random":
        lengths = dataset.Lengths(
            args.random_input_len, args.random_output_len, args.random_prefix_len, args.random_range_ratio
        )
        return dataset.random_calls(count, lengths, times, args.seed), {}
    if args.dataset_path is not None:
        rows = dataset.read_sharegpt(args.dataset_path, count, vocabulary, args.seed, args.sharegpt_output_len)
        return dataset.text_calls(rows, times)
    options = {"cv": args.burstiness**-0.5} | args.workload_options
    rate = float("inf") if rate is None else rate
    return generate(args.dataset_name, count=count, rate=rate, seed=args.seed, options=options), {}


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    eos = {"ignore_eos": True} if args.ignore_eos else {}
    return {"stream": True, "stream_options": {"include_usage": True}} | sampling | eos | args.extra_body


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    names = ("endpoint", "dataset_name", "request_rate", "burstiness", "max_concurrency", "seed")
    return {name: getattr(args, name) for name in names}


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.base_url.startswith("https:"):
        return None
    try:
        context = ssl.create_default_context()
        if args.ssl_ca_certs:
            context.load_verify_locations(args.ssl_ca_certs)
    except ssl.SSLError:
        raise ConfigError(f"--ssl-ca-certs {args.ssl_ca_certs} holds no certificates") from None
    if args.insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _header(text: str) -> tuple[str, str]:
    name, is_one, value = text.partition("=")
    if not is_one or not name.strip() or any(mark in text for mark in "\r\n:"):
        raise ConfigError(f"--header {text!r:.100} must be like x-name=value")
    return name.strip(), value.strip()


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    reject_unknown(names, METRICS, what="percentile-metrics")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= each <= 100 for each in found):
        raise ConfigError(f"--metric-percentiles {text} must be numbers from 0 to 100, like 50,99")
    return found
