"""Every metric of the server: name, kind, labels, what it says, and where that is read.

vLLM's names where it has one (its `v1/metrics/loggers.py`), with its labels `model_name` and `engine`; what it counts and we
cannot know is not here. docs/metrics.md is made from this list (scripts/metrics_table.py).
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from jaxserve.async_engine import AsyncEngine
from jaxserve.server.traffic import Traffic
from jaxserve.tally import NOBODY, OTHERS, Tally

S = TypeVar("S")


class Kind(enum.StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What is read of an engine for one answer."""

    engine: AsyncEngine
    counts: Mapping[str, Any]
    tally: Tally


@dataclasses.dataclass(frozen=True, slots=True)
class Entry(Generic[S]):
    """One metric. `read` gives a number or Histogram; with `labels` one for each tuple of their values."""

    name: str
    kind: Kind
    text: str
    read: Callable[[S], Any]
    labels: tuple[str, ...] = ()


def _count(key: str) -> Callable[[Reading], Any]:
    return lambda reading: reading.counts[key]


def _tally(name: str) -> Callable[[Reading], Any]:
    return lambda reading: getattr(reading.tally, name)


def _clients(name: str) -> Callable[[Reading], Any]:
    return lambda reading: {(client,): getattr(done, name) for client, done in reading.tally.clients.items()}


def _running(reading: Reading) -> dict[tuple[str], int]:
    """Of clients by name; the rest is the others'."""
    named = {
        (client,): reading.engine.num_running_of("" if client == NOBODY else client)
        for client in reading.tally.clients
        if client != OTHERS
    }
    return named | {(OTHERS,): max(0, reading.counts["num_running"] - sum(named.values()))}


def _kv_usage(reading: Reading) -> float:
    num_blocks = reading.counts["num_kv_blocks"] * len(reading.counts["replica_tokens"])
    return reading.counts["kv_blocks_held"] / num_blocks if num_blocks else 0.0


def _cache_config(reading: Reading) -> dict[tuple[str, ...], int]:
    config, counts = reading.engine.config, reading.counts
    values = (
        counts["block_size"],
        counts["kv_cache_dtype"],
        config.enable_prefix_caching,
        config.memory_utilization,
        counts["num_kv_blocks"] * len(counts["replica_tokens"]),
        counts["num_host_blocks"],
    )
    return {tuple(map(str, values)): 1}


def _memory(reading: Reading) -> dict[tuple[str], int]:
    return {(part,): reading.counts[f"{part}_bytes"] for part in ("weight", "kv_pool", "activation", "sampler")}


def _engine(name: str, kind: Kind, text: str, read: Callable[[Reading], Any], *labels: str) -> Entry[Reading]:
    return Entry(name, kind, text, read, labels)


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

ENGINE: tuple[Entry[Reading], ...] = (
    # vLLM's: now.
    _engine("vllm:num_requests_running", _G, "Answers that are being computed", _count("num_running")),
    _engine("vllm:num_requests_waiting", _G, "Answers that wait for room", _count("num_waiting")),
    _engine("vllm:kv_cache_usage_perc", _G, "Share of the KV cache that is in use; 1 is all of it", _kv_usage),
    _engine("vllm:gpu_cache_usage_perc", _G, "The same under its old name, which older dashboards read", _kv_usage),
    # vLLM's: counters.
    _engine(
        "vllm:prefix_cache_queries_total",
        _C,
        "Tokens looked for in the prefix cache, at each admission",
        _count("sought_tokens"),
    ),
    _engine("vllm:prefix_cache_hits_total", _C, "Tokens found there", _count("cached_tokens")),
    _engine("vllm:num_preemptions_total", _C, "Answers put off to make room for others", _count("preemptions")),
    _engine(
        "vllm:prompt_tokens_total", _C, "Prompt tokens of requests, those from the cache too", _tally("prompt_tokens")
    ),
    _engine("vllm:generation_tokens_total", _C, "Answer tokens", _count("output_tokens")),
    _engine(
        "vllm:request_success_total",
        _C,
        "Answers that have ended: stop, length, abort, error",
        lambda reading: {(reason,): number for reason, number in reading.tally.finished.items()},
        "finished_reason",
    ),
    # vLLM's: seconds.
    _engine("vllm:time_to_first_token_seconds", _H, "From arrival to the first token", _tally("first_token")),
    _engine("vllm:inter_token_latency_seconds", _H, "From a token of an answer to the next one", _tally("gap")),
    _engine("vllm:time_per_output_token_seconds", _H, "The same under its old name", _tally("gap")),
    _engine(
        "vllm:request_time_per_output_token_seconds", _H, "Mean time between tokens of a request", _tally("per_token")
    ),
    _engine("vllm:e2e_request_latency_seconds", _H, "From arrival to the last token", _tally("latency")),
    _engine("vllm:request_queue_time_seconds", _H, "From arrival to the first admission", _tally("queued")),
    _engine("vllm:request_prefill_time_seconds", _H, "From admission to the first token", _tally("prefill")),
    _engine("vllm:request_decode_time_seconds", _H, "From the first to the last token", _tally("decode")),
    _engine("vllm:request_inference_time_seconds", _H, "From admission to the last token", _tally("inference")),
    # vLLM's: numbers.
    _engine("vllm:request_prompt_tokens", _H, "Tokens of a prompt", _tally("prompt_lengths")),
    _engine("vllm:request_generation_tokens", _H, "Tokens of a request's answers", _tally("output_lengths")),
    _engine(
        "vllm:request_max_num_generation_tokens",
        _H,
        "Tokens of the longest answer of a request",
        _tally("longest_outputs"),
    ),
    _engine("vllm:request_params_n", _H, "Answers asked for (n)", _tally("asked_n")),
    _engine(
        "vllm:request_params_max_tokens", _H, "Most answer tokens asked for (max_tokens)", _tally("asked_max_tokens")
    ),
    _engine("vllm:iteration_tokens_total", _H, "Tokens fed in a step, without padding", _tally("step_tokens")),
    _engine(
        "vllm:cache_config_info",
        _G,
        "Always 1; the labels say how the KV cache is made",
        _cache_config,
        "block_size",
        "cache_dtype",
        "enable_prefix_caching",
        "gpu_memory_utilization",
        "num_gpu_blocks",
        "num_cpu_blocks",
    ),
    # Ours.
    _engine("jaxserve:steps_total", _C, "Steps of the engine", _count("steps")),
    _engine("jaxserve:failed_steps_total", _C, "Steps that failed on the device", _count("failed_steps")),
    _engine(
        "jaxserve:step_seconds",
        _H,
        "Parts of a turn of the engine's loop: plan, dispatch, wait for the device, commit, events, deliver",
        lambda reading: {(part,): histogram for part, histogram in reading.tally.parts.items()},
        "part",
    ),
    _engine(
        "jaxserve:computed_tokens_total", _C, "Tokens fed to the model, without padding", _count("computed_tokens")
    ),
    _engine(
        "jaxserve:padded_tokens_total", _C, "Tokens computed for nothing, to fill a shape", _count("padded_tokens")
    ),
    _engine("jaxserve:prompt_tokens_computed_total", _C, "Prompt tokens fed, again too", _count("prompt_tokens")),
    _engine("jaxserve:wasted_rows_total", _C, "Rows computed for answers that had ended", _count("wasted_rows")),
    _engine("jaxserve:swapped_total", _C, "Preemptions whose blocks went to host memory", _count("swapped")),
    _engine(
        "jaxserve:compiles_total",
        _C,
        "Programs compiled, or loaded from the compilation cache; must not grow once the server is ready",
        _count("compiles"),
    ),
    _engine(
        "jaxserve:compiles_after_ready_total",
        _C,
        "Of those: after warm-up. More than 0 is a bug",
        _count("compiles_after_ready"),
    ),
    _engine("jaxserve:warm_up_seconds", _G, "How long compiling took at the start", _count("warm_up_s")),
    _engine("jaxserve:load_seconds", _G, "How long loading the weights took", _count("load_s")),
    _engine("jaxserve:memory_bytes", _G, "Planned memory of each device, by use", _memory, "part"),
    _engine(
        "jaxserve:unfinished_requests",
        _G,
        "Requests that were taken and have not ended",
        lambda reading: reading.engine.num_unfinished,
    ),
    _engine(
        "jaxserve:client_requests_total", _C, "Requests of a client that have ended", _clients("requests"), "client"
    ),
    _engine(
        "jaxserve:client_prompt_tokens_total",
        _C,
        "Prompt tokens of requests of a client that have ended",
        _clients("prompt_tokens"),
        "client",
    ),
    _engine("jaxserve:client_cached_tokens_total", _C, "Of those: from the cache", _clients("cached_tokens"), "client"),
    _engine(
        "jaxserve:client_output_tokens_total",
        _C,
        "Answer tokens of requests of a client that have ended",
        _clients("output_tokens"),
        "client",
    ),
    _engine("jaxserve:client_running", _G, "Answers of a client that are being computed", _running, "client"),
)

TRAFFIC: tuple[Entry[Traffic], ...] = (
    Entry(
        "jaxserve:http_requests_total",
        _C,
        "HTTP requests that have ended; 499: the caller went away before the end",
        lambda traffic: dict(traffic.answered),
        ("route", "method", "status"),
    ),
    Entry("jaxserve:http_requests_open", _G, "HTTP requests under way", lambda traffic: traffic.num_open),
    Entry("jaxserve:http_streams_open", _G, "Of those: streams that have begun", lambda traffic: traffic.num_streams),
    Entry(
        "jaxserve:event_loop_lateness_seconds",
        _H,
        "How much too late the event loop wakes; looked at ten times a second",
        lambda traffic: traffic.lateness,
    ),
)
