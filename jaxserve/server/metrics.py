"""Metrics in Prometheus' text form. Each app has a registry of its own, so that several can live in one process.

Nothing is pushed: engine and server count in plain numbers, and these are read when somebody asks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from jaxserve.async_engine import AsyncEngine
from jaxserve.histogram import Histogram
from jaxserve.server.catalogue import ENGINE, TRAFFIC, Entry, Kind, Reading
from jaxserve.server.traffic import Traffic

# Whatever a caller prefers: as OpenMetrics the library would write vllm_... for vllm:..., and no dashboard would find it.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_ENGINE = "0"  # vLLM's label for the replica of its engine: here one engine drives all replicas


class Metrics(Collector):
    """What one app tells of itself and its engine."""

    def __init__(self, model_name: str, traffic: Traffic):
        self.engine: AsyncEngine | None = None  # until it is loaded
        self._model_name = model_name
        self._traffic = traffic
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)  # memory, CPU time, open files; on Linux

    def exposed(self) -> bytes:
        """All of them. Takes some milliseconds, and any thread may do it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        for entry in TRAFFIC:
            yield _family(entry, (), (), entry.read(self._traffic))
        if self.engine is not None:
            reading = Reading(self.engine, self.engine.counts(), self.engine.tally)
            for entry in ENGINE:
                yield _family(entry, ("model_name", "engine"), (self._model_name, _ENGINE), entry.read(reading))


def _family(entry: Entry[Any], names: Sequence[str], values: Sequence[str], read: Any) -> Metric:
    """An entry of the catalogue as the library knows it. `names` and `values` are labels that all of its kind have."""
    name, labels = entry.name, (*names, *entry.labels)
    samples = read if isinstance(read, Mapping) else {(): read}
    full: Iterable[tuple[list[str], Any]] = (([*values, *own], value) for own, value in samples.items())
    if entry.kind is Kind.HISTOGRAM:
        family = HistogramMetricFamily(name, entry.text, labels=labels)
        for label_values, histogram in full:
            family.add_metric(label_values, _buckets(histogram), histogram.total)
        return family
    if entry.kind is Kind.COUNTER:
        family = CounterMetricFamily(name.removesuffix("_total"), entry.text, labels=labels)
    else:
        family = GaugeMetricFamily(name, entry.text, labels=labels)
    for label_values, value in full:
        family.add_metric(label_values, value)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, accumulate(list(histogram.counts)), strict=True))
