"""What a server has done, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUESTS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counts of one server; `jaxprm_tokens_total` has the kinds of Engine.usage."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        known = {"registry": self._registry}
        self._answers = Counter("jaxprm_requests", "Requests by status", ["endpoint", "status"], **known)
        self._seconds = Histogram(
            "jaxprm_request_seconds", "From the end of a request's headers to its answer, of those with status 200",
            ["endpoint"], buckets=_SECONDS, **known,
        )  # fmt: skip
        self._batches = Histogram(
            "jaxprm_batch_requests", "Requests computed together", buckets=_REQUESTS, **known
        )  # fmt: skip
        self._busy = Counter("jaxprm_model_seconds", "Time spent encoding and computing", **known)
        self._unanswered = Gauge("jaxprm_unanswered_requests", "Requests accepted and not answered yet", **known)
        self._ready = Gauge("jaxprm_ready", "1 when the model is warmed up and takes requests", **known)
        self._usage: dict[str, int] = {}
        self._registry.register(self)

    def watch(self, *, unanswered: Callable[[], int], ready: Callable[[], bool]) -> None:
        """Where the numbers come from that are looked up when they are asked for."""
        self._unanswered.set_function(unanswered)
        self._ready.set_function(ready)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        self._answers.labels(endpoint, str(status)).inc()
        if status == 200:
            self._seconds.labels(endpoint).observe(seconds)

    def computed(self, requests: int, seconds: float, usage: dict[str, int]) -> None:
        """A batch; usage: tokens so far. Called by the thread that computes."""
        self._batches.observe(requests)
        self._busy.inc(seconds)
        self._usage = usage

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Tokens, which the engine counts."""
        family = CounterMetricFamily("jaxprm_tokens", "Tokens of the model so far", labels=["kind"])
        for kind, count in self._usage.items():
            family.add_metric([kind], count)
        yield family

    def text(self) -> bytes:
        return generate_latest(self._registry)
