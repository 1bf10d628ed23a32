"""The log, a line for each event, and the metrics that Prometheus reads."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

LOGGER = logging.getLogger("bdh.serve")


def log_to_stderr(log_format: str) -> None:
    """Sends this package's and uvicorn's records to the standard error, as json or text."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for name in ("bdh", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # the middleware writes the line of a request


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    LOGGER.log(level, event, exc_info=error, extra={"facts": {k: v for k, v in facts.items() if v is not None}})


class JsonFormatter(logging.Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For people."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = " ".join(f"{name}={_one_line(value)}" for name, value in getattr(record, "facts", {}).items())
        line = f"{when} {record.levelname.lower():<8}{record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _one_line(value: Any) -> str:
    """What a client has sent may not look like a line of the log."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2)
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


class Metrics:
    """All of a server's metrics, under the names that dashboards of such servers know.

    Args:
        values: the present value of each gauge and total; asked at every scrape.
    """

    def __init__(self, model_name: str, values: Callable[[], dict[str, float]]):
        self.registry = CollectorRegistry()
        self._model, self._values = model_name, values

        def histogram(name: str, about: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            made = Histogram(f"bdh:{name}_seconds", about, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"bdh:{name}", about, ["model_name", *labels], registry=self.registry)

        self.time_to_first_token = histogram("time_to_first_token", "From a request's arrival to its first token.")
        self.inter_token_latency = histogram(
            "inter_token_latency", "Between two tokens of a text, as they are handed on.", _BETWEEN
        )
        self.e2e_request_latency = histogram("e2e_request_latency", "From a request's arrival to its last token.")
        self.request_queue_time = histogram(
            "request_queue_time", "From a request's arrival until its prompt has a state."
        )
        self._requests = counter("requests", "Answers, by route and status.", "route", "status")
        self._success = counter("request_success", "Texts that have ended, by the reason.", "finished_reason")
        self.registry.register(_Values(self))

    def answered(self, route: str, status: int) -> None:
        self._requests.labels(self._model, route, str(status)).inc()

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def families(self) -> Iterator[Metric]:
        """The gauges and totals now."""
        values = self._values()
        for names, family in ((_GAUGES, GaugeMetricFamily), (_TOTALS, CounterMetricFamily)):
            for name, about in names.items():
                metric = family(f"bdh:{name}", about, labels=["model_name"])
                metric.add_metric([self._model], values.get(name, 0.0))
                yield metric


class _Values(Collector):
    def __init__(self, metrics: Metrics):
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.families()
