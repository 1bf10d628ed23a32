"""What Prometheus is told, under the names that dashboards of such servers know."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2)

Gauges = Callable[[], dict[str, float]]


class Metrics:
    """All of a server's metrics, each with the label ``model_name``.

    Args:
        gauges: gives the present value of each of :data:`_GAUGES` and :data:`_TOTALS`; asked at every scrape.
    """

    def __init__(self, model_name: str, gauges: Gauges):
        self.registry = CollectorRegistry()
        self._model = model_name

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"bdh:{name}", about, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"bdh:{name}", about, ["model_name", *labels], registry=self.registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two tokens of a text, as they are handed on.", _BETWEEN
        )
        self.e2e_request_latency = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its last token.", _SECONDS
        )
        self.request_queue_time = histogram(
            "request_queue_time_seconds", "From a request's arrival until its prompt has a state.", _SECONDS
        )
        self._requests = counter("requests", "Answers, by route and status.", "route", "status")
        self._success = counter("request_success", "Texts that have ended, by the reason.", "finished_reason")
        self.registry.register(_Gauges(model_name, gauges))

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(self._model, route, str(status)).inc()

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


_GAUGES = {
    "num_requests_running": "Sequences that have a state.",
    "num_requests_waiting": "Prompts that wait for one.",
    "state_bytes_in_use": "Bytes of the states of running sequences.",
    "state_bytes_limit": "Bytes that they may take.",
    "prefix_cache_bytes": "Bytes of states kept for prompts that begin alike.",
    "saved_states": "States that clients have saved.",
    "saved_state_bytes": "Bytes of them in memory.",
}
_TOTALS = {
    "prompt_tokens": "Tokens of prompts that were read.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_hits": "Prompts of which a stored beginning was found.",
    "prefix_cache_tokens": "Tokens that need not be read for that.",
    "prefix_cache_failures": "Beginnings of prompts that could not be stored.",
}


class _Gauges(Collector):
    def __init__(self, model_name: str, gauges: Gauges):
        self._model, self._gauges = model_name, gauges

    def collect(self) -> Iterator[Metric]:
        values = self._gauges()
        for names, family in ((_GAUGES, GaugeMetricFamily), (_TOTALS, CounterMetricFamily)):
            for name, about in names.items():
                metric = family(f"bdh:{name}", about, labels=["model_name"])
                metric.add_metric([self._model], values.get(name, 0.0))
                yield metric
