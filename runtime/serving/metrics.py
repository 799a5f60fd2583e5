"""A service's numbers as Prometheus reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ditrim.runtime.service import EditService, ServiceMetrics
from ditrim.runtime.service.metrics import Histogram


class ServingMetrics:
    """The numbers of one server."""

    def __init__(self, service: EditService) -> None:
        """Take the service whose numbers they are."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "ditrim_http_requests",
            "Requests answered, by path and status.",
            ("path", "status"),
            registry=self._registry,
        )
        self._registry.register(_ServiceCollector(service))

    def text(self) -> bytes:
        """The whole page, in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    """Reads a service when it is asked, so that nothing is counted twice."""

    def __init__(self, service: EditService) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        now = self._service.metrics()
        yield from _gauges(now)
        yield from _counters(now)
        yield _histogram("queue_seconds", "Time that edits waited.", {"": now.queue_seconds})
        yield _histogram("edit_seconds", "Time that edits ran.", {"": now.edit_seconds})
        yield _histogram("kept_share", "Share of reference tokens kept.", {"": now.kept_share})
        stages = dict(now.stage_seconds)
        yield _histogram("stage_seconds", "Time of an edit by stage.", stages, "stage")

    def describe(self) -> list[Metric]:
        return []  # registering asks nothing of the service


def _gauges(now: ServiceMetrics) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"ditrim_{name}", text, value=value)

    yield gauge("ready", "1 where edits are taken and the warm-up is over.", now.state == "ready")
    yield gauge("queue_length", "Edits that wait.", now.queue_length)
    yield gauge("running", "Edits that run.", now.running)
    memory = GaugeMetricFamily("ditrim_memory_bytes", "Memory by kind.", labels=["kind"])
    for kind, size in now.memory_bytes.items():
        memory.add_metric([kind], size)
    yield memory
    warm = GaugeMetricFamily("ditrim_warmup_seconds", "Last warm-up.", labels=["model"])
    for model, seconds in now.warmup_seconds.items():
        warm.add_metric([model], seconds)
    yield warm
    loaded = GaugeMetricFamily("ditrim_model_loaded", "1 for models in memory.", labels=["model"])
    for model in now.loaded:
        loaded.add_metric([model], 1)
    yield loaded
    lora = GaugeMetricFamily(
        "ditrim_lora_active", "1 for LoRAs that act.", labels=["model", "lora"]
    )
    for model, names in now.loras.items():
        for name in names:
            lora.add_metric([model, name], 1)
    yield lora


def _counters(now: ServiceMetrics) -> Iterator[Metric]:
    def counter(name: str, text: str, label: str, values: dict[str, int]) -> CounterMetricFamily:
        family = CounterMetricFamily(f"ditrim_{name}", text, labels=[label])
        for key, value in values.items():
            family.add_metric([key], value)
        return family

    yield counter("edits", "Edits that ended, by outcome.", "outcome", dict(now.outcomes))
    yield counter("edits_refused", "Edits not accepted.", "reason", dict(now.refused))
    yield counter("calls", "Model calls by role.", "role", dict(now.calls_by_role))
    rungs = {str(rung): count for rung, count in now.calls_by_rung.items()}
    yield counter("calls_by_rung", "Model calls by rung of BACK.", "rung", rungs)
    yield CounterMetricFamily("ditrim_edits_accepted", "Edits accepted.", value=now.accepted)
    yield CounterMetricFamily("ditrim_model_loads", "Models loaded.", value=now.loads)
    yield CounterMetricFamily("ditrim_model_evictions", "Models let go of.", value=now.evictions)


def _histogram(
    name: str, text: str, values: dict[str, Histogram], label: str | None = None
) -> HistogramMetricFamily:
    labels = [] if label is None else [label]
    family = HistogramMetricFamily(f"ditrim_{name}", text, labels=labels)
    for key, histogram in values.items():
        sums = itertools.accumulate(histogram.counts)
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, map(float, sums), strict=True))
        family.add_metric([key] if labels else [], buckets, histogram.total)
    return family
