"""Traces: a span for each request, over OpenTelemetry's protocol, with the names of vLLM's spans.

The libraries are an extra (`pip install 'jaxserve[otel]'`), imported when traces are asked for.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.stream import Stream

_HEADERS = ("traceparent", "tracestate")
_NAME = "llm_request"


class Traces:
    """Sends spans in the background; `close` sends the last ones."""

    def __init__(self, endpoint: str, model_name: str):
        """`endpoint`: where a collector takes OTLP over HTTP, as http://127.0.0.1:4318/v1/traces.

        Raises:
          ConfigError: the libraries are not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # pyright: ignore[reportMissingImports]
            from opentelemetry.sdk.resources import Resource  # pyright: ignore[reportMissingImports]
            from opentelemetry.sdk.trace import TracerProvider  # pyright: ignore[reportMissingImports]
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # pyright: ignore[reportMissingImports]
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"traces need a package that is not installed ({error.name})",
                remedy="Install it with: pip install 'jaxserve[otel]'",
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxserve"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("jaxserve")
        self._context_of = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER
        self._model_name = model_name

    def record(self, streams: Sequence[Stream], headers: Sequence[tuple[bytes, bytes]], status: int) -> None:
        """Tell of requests that a caller with these headers has made. Their times are of `time.perf_counter`."""
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        parent = self._context_of({name: carrier[name] for name in _HEADERS if name in carrier})
        epoch_s, now_s = time.time() - time.perf_counter(), time.perf_counter()
        for stream in streams:
            metrics = None if stream.output is None else stream.output.metrics
            begin_s = stream.request.arrival_s
            end_s = now_s if metrics is None or metrics.finished_s is None else metrics.finished_s
            span = self._tracer.start_span(
                _NAME,
                context=parent,
                kind=self._kind,
                start_time=int((epoch_s + begin_s) * 1e9),
                attributes=dict(_attributes(stream, end_s)) | self._common(status),
            )
            span.end(int((epoch_s + end_s) * 1e9))

    def close(self) -> None:
        """Send what is left, and stop."""
        self._provider.shutdown()

    def _common(self, status: int) -> dict[str, Any]:
        return {"gen_ai.response.model": self._model_name, "http.response.status_code": status}


def _attributes(stream: Stream, end_s: float) -> Iterator[tuple[str, Any]]:
    request, output = stream.request, stream.output
    params = request.params
    yield "gen_ai.request.id", request.request_id
    yield "gen_ai.request.n", params.n
    yield "gen_ai.request.temperature", params.temperature
    yield "gen_ai.request.top_p", params.top_p
    if params.max_tokens is not None:
        yield "gen_ai.request.max_tokens", params.max_tokens
    yield "gen_ai.usage.prompt_tokens", len(request.prompt_token_ids)
    yield "gen_ai.latency.e2e", end_s - request.arrival_s
    if output is None:
        return
    yield "gen_ai.usage.completion_tokens", sum(len(answer.token_ids) for answer in output.outputs)
    yield "gen_ai.usage.cached_tokens", output.metrics.num_cached_tokens
    yield "gen_ai.response.finish_reasons", [answer.finish_reason or "abort" for answer in output.outputs]
    arrival_s, started_s, first_s = request.arrival_s, output.metrics.started_s, output.metrics.first_token_s
    if started_s is not None:
        yield "gen_ai.latency.time_in_queue", started_s - arrival_s
        yield "gen_ai.latency.time_in_model_inference", end_s - started_s
    if started_s is not None and first_s is not None:
        yield "gen_ai.latency.time_to_first_token", first_s - arrival_s
        yield "gen_ai.latency.time_in_model_prefill", first_s - started_s
        yield "gen_ai.latency.time_in_model_decode", end_s - first_s
