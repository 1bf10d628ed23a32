"""Between the routes and the engine: the admission of requests, their time limits, the shutdown, and the metrics."""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request

from bdh.generate.async_engine import AsyncEngine, AsyncRequest, Item, Started
from bdh.generate.sequence import StepOutput, encode_prompt
from bdh.serve.config import ServeSettings
from bdh.serve.middleware import RETRY_SECONDS, ApiError, RateLimits, bad_request, unavailable
from bdh.serve.states import StateStore
from bdh.serve.text import ChatPrompts, TokenNames
from bdh.tokenizer.plain import PlainTokenizer
from bdh.words import counted

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2)
ENGINE_INFO = "Always 1; its labels are the formats of weights and states."
HISTOGRAMS = {
    "time_to_first_token": ("Time from the arrival of a request to its first token.", _SECONDS),
    "inter_token_latency": ("Time between two tokens of a text, as they are sent.", _BETWEEN),
    "e2e_request_latency": ("Time from the arrival of a request to its last token.", _SECONDS),
    "request_queue_time": ("Time from the arrival of a request until its prompt gets a state.", _SECONDS),
}
COUNTERS = {
    "requests": ("Responses, by route and status.", ("route", "status")),
    "request_success": ("Finished texts, by finish reason.", ("finished_reason",)),
}
GAUGES = {
    "num_requests_running": "Sequences that are running, each with a state.",
    "num_requests_waiting": "Prompts that are waiting for a state.",
    "state_bytes_in_use": "Bytes of the states of running sequences.",
    "state_bytes_limit": "Largest number of bytes for the states of running sequences.",
    "prefix_cache_bytes": "Bytes of the prefix cache: stored states of prompt beginnings.",
    "saved_states": "States that clients have saved.",
    "saved_state_bytes": "Bytes of memory for saved states.",
}
TOTALS = {
    "prompt_tokens": "Prompt tokens read.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_hits": "Prompts whose beginning was found in the prefix cache.",
    "prefix_cache_tokens": "Prompt tokens that did not have to be read, because the prefix cache had them.",
    "prefix_cache_failures": "Prompt beginnings that could not be stored in the prefix cache.",
}

Result = TypeVar("Result")


class Metrics(Collector):
    """All metrics of a server, under the names that common dashboards expect.

    Args:
        values: returns the current value of each gauge and total. It is called at every scrape.
        formats: the formats of weights and states by name, as labels of ``bdh:engine_info``, whose value is always 1.
    """

    def __init__(self, model_name: str, values: Callable[[], dict[str, float]], formats: dict[str, str]):
        self.registry = registry = CollectorRegistry()
        info = Gauge("bdh:engine_info", ENGINE_INFO, ("model_name", *formats), registry=registry)
        info.labels(model_name, *formats.values()).set(1)
        self._model, self._values = model_name, values
        # Created with their label, so that they are exported with zeros before anything is observed.
        self._histograms = {
            name: Histogram(f"bdh:{name}_seconds", about, ("model_name",), buckets=buckets, registry=registry).labels(
                model_name
            )
            for name, (about, buckets) in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"bdh:{name}", about, ["model_name", *labels], registry=registry)
            for name, (about, labels) in COUNTERS.items()
        }
        registry.register(self)

    def observe(self, name: str, seconds: float) -> None:
        self._histograms[name].observe(seconds)

    def count(self, name: str, *labels: str) -> None:
        self._counters[name].labels(self._model, *labels).inc()

    def collect(self) -> Iterator[Metric]:
        """Yields the current gauges and totals."""
        values = self._values()
        for names, family in ((GAUGES, GaugeMetricFamily), (TOTALS, CounterMetricFamily)):
            for name, about in names.items():
                metric = family(f"bdh:{name}", about, labels=["model_name"])
                metric.add_metric([self._model], values[name])
                yield metric


@dataclass
class Loaded:
    """What is available once the model is loaded."""

    model: Any
    tokenizer: PlainTokenizer
    engine: AsyncEngine
    chat: ChatPrompts
    names: TokenNames
    states: StateStore
    model_names: list[str]
    created: int = field(default_factory=lambda: int(time.time()))
    text_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "bdh-text"))
    """The thread that encodes and decodes the texts of requests, so that the event loop does not wait."""

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def max_sequences(self) -> int:
        return self.engine.engine.max_sequences

    async def in_text_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.text_thread, function, *arguments)

    async def prompt_tokens(self, prompt: str | Sequence[int], param: str, *, continues: bool = False) -> list[int]:
        """Returns the tokens of a text, or the given token ids after a check.

        Args:
            param: the name of the prompt in the request.
            continues: whether it continues a state. It may then be empty, and no start token is added.

        Raises:
            ApiError: 400 if there is no token to start from, or an id is outside the vocabulary.
        """
        try:
            if not isinstance(prompt, str):
                tokens = list(prompt)
            elif continues:
                tokens = await self.in_text_thread(self.tokenizer.encode, prompt)
            else:
                tokens = await self.in_text_thread(encode_prompt, self.tokenizer, prompt)
        except ValueError as error:
            raise bad_request(str(error), param) from error
        if not tokens and not continues:
            raise bad_request("the prompt has no tokens: give at least one to start from", param)
        last = self.vocab_size - 1
        if wrong := [token for token in tokens if token > last][:3]:
            raise bad_request(f"the prompt has the token ids {wrong}: must be within 0 and {last}", param)
        return tokens


class Service:
    """The status of the server, and the admission of requests.

    Args:
        silence_seconds: the time without output after which a stream sends a comment.

    Attributes:
        status: loading, ready, draining or failed.
    """

    def __init__(self, settings: ServeSettings, *, silence_seconds: float = 10.0):
        self.settings, self.silence_seconds = settings, silence_seconds
        self.rates = RateLimits(settings.auth)
        self.status: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.failure: BaseException | None = None
        self.loaded: Loaded | None = None
        self.metrics: Metrics | None = None
        self.running: set[Generation] = set()

    def open(self, loaded: Loaded) -> None:
        """Starts to accept requests."""
        advancer = loaded.engine.engine.advancer
        formats = {"weights": advancer.weight_format, "state": advancer.state_format}
        self.metrics = Metrics(loaded.model_names[0], self._values, formats)
        self.loaded = loaded
        if self.status == "loading":
            self.status = "ready"

    def ready(self) -> Loaded:
        """Returns what requests need.

        Raises:
            ApiError: 503 if the model is loading, the server is shutting down, or its engine has failed.
        """
        self.check_engine()
        if self.status == "ready" and self.loaded is not None:
            return self.loaded
        if self.status == "failed":
            raise unavailable("the engine has failed", "engine_failed")
        reason = "the server is shutting down" if self.status == "draining" else "the model is being loaded"
        raise unavailable(reason, self.status)

    def check_engine(self) -> None:
        """Sets the status to failed if the engine's thread has ended or hangs."""
        if self.loaded is None or self.status == "failed":
            return
        failure = self.loaded.engine.failure
        most, seconds = self.settings.limits.stall_timeout, self.loaded.engine.seconds_without_progress
        if failure is None and most is not None and seconds > most:
            failure = RuntimeError(f"the engine has made no progress for {seconds:.0f} seconds")
        if failure is not None and self.status == "ready":
            self.status, self.failure = "failed", failure

    def check_model(self, name: str | None) -> str:
        """Returns the model name for the answer.

        Raises:
            ApiError: 404 if there is no such model; 503 as :meth:`ready`.
        """
        names = self.ready().model_names
        if name and name not in names:
            message = f"there is no model {name!r} here: must be one of {', '.join(names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or names[0]

    def begin(self, body: Any, request: Request) -> str:
        """Counts a request for text or embeddings, and returns the name of its model.

        Raises:
            ApiError: 404 if there is no such model; 429 if the caller has reached a rate limit; 503 as :meth:`ready`.
        """
        model = self.check_model(body.model)
        self.rates.begin(request.state.caller)
        request.state.facts["user"] = body.user
        if hasattr(body, "stream"):
            request.state.facts["stream"] = bool(body.stream)
        return model

    def check_texts(self, count: int, param: str) -> None:
        """Raises an ``ApiError`` 400 if a prompt asks for more texts than this server generates."""
        most = min(self.settings.limits.texts, self.ready().max_sequences)
        if count > most:
            raise bad_request(f"{param} is {count}: must be at most {most}", param)

    def max_tokens(self, given: int | None, default: int, param: str = "max_tokens") -> int:
        """Returns the token limit of a request. Raises an ``ApiError`` 400 if it asks for more than the server allows."""
        most = self.settings.limits.max_tokens
        if given is not None and given > most:
            raise bad_request(f"{param} is {given:,}: must be at most {most:,}", param)
        return min(default, most) if given is None else given

    def check_lengths(self, prompts: "Sequence[PromptRequest]") -> None:
        """Raises an ``ApiError`` 400 if a prompt has more tokens than this server reads."""
        most = self.settings.limits.prompt_tokens
        for prompt in prompts:
            if (size := len(prompt.prompt)) > most:
                message = f"the prompt has {counted(size, 'token')}: must be at most {most:,}"
                raise bad_request(message, prompt.param, "context_length_exceeded")

    @property
    def waiting(self) -> "list[PromptRequest]":
        """The prompts that do not have a state yet."""
        return [prompt for generation in self.running for prompt in generation.waiting]

    def admit(self, prompts: "Sequence[PromptRequest]") -> None:
        """Checks whether prompts may join the queue.

        Raises:
            ApiError: 400 if the request is larger than this server allows; 429 if the queue is full; 503 as
                :meth:`ready`.
        """
        loaded, limits = self.ready(), self.settings.limits
        if len(prompts) > limits.prompts:
            raise bad_request(
                f"the request has {counted(len(prompts), 'prompt')}: must be at most {limits.prompts}", "prompt"
            )
        self.check_lengths(prompts)
        # Prompts that can start with the next step do not wait.
        most = min(loaded.max_sequences, loaded.engine.engine.config.max_running)
        num_free = max(0, most - sum(generation.num_states for generation in self.running))
        num_waiting = len(self.waiting)
        num_tokens = sum(len(prompt.prompt) for prompt in self.waiting)
        if num_waiting + len(prompts) > limits.queue_requests + num_free:
            reason = (
                f"{counted(num_waiting, 'prompt is', 'prompts are')} waiting, and at most {limits.queue_requests} may"
            )
        elif num_waiting and num_tokens + sum(len(prompt.prompt) for prompt in prompts) > limits.queue_tokens:
            reason = (
                f"the waiting prompts have {counted(num_tokens, 'token')}, and at most {limits.queue_tokens:,} may wait"
            )
        else:
            return
        raise ApiError(429, f"the queue is full: {reason}", code="queue_full", retry_after=RETRY_SECONDS)

    def answered(self, route: str, status: int) -> None:
        """Counts an answer in the metrics."""
        if self.metrics is not None:
            self.metrics.count("requests", route, str(status))

    def refuse(self) -> None:
        """Stops accepting requests."""
        if self.status in ("ready", "loading"):
            self.status = "draining"

    async def drain(self, seconds: float) -> int:
        """Stops accepting requests, and waits for the running ones. Those that run longer are cut off.

        Returns:
            The number of requests that were cut off.
        """
        self.refuse()
        await self._wait_until_idle(seconds)
        cut = list(self.running)
        for generation in cut:
            generation.cut_off(keep=self.settings.resume_on_restart)
        await self._wait_until_idle(5)
        return len(cut)

    async def _wait_until_idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _values(self) -> dict[str, float]:
        """Returns the metrics: the engine's statistics, and those with another name or from elsewhere."""
        assert self.loaded is not None
        stats, states = self.loaded.engine.stats, self.loaded.states
        return {
            **vars(stats),
            "num_requests_running": stats.running,
            "num_requests_waiting": len(self.waiting),
            "state_bytes_in_use": stats.state_bytes,
            "state_bytes_limit": self.loaded.engine.engine.max_state_bytes,
            "saved_states": states.num_states,
            "saved_state_bytes": states.bytes_in_memory,
            "generation_tokens": stats.generated_tokens,
        }


class CutOff(Exception):
    """The server shuts down before the request is finished."""


@dataclass(eq=False)
class PromptRequest(AsyncRequest):
    """One prompt of an HTTP request, as tokens."""

    prompt: list[int]
    """The tokens; with a snapshot, those that follow its tokens."""
    param: str = "prompt"
    """The name of the prompt in the HTTP request."""
    notes: dict[str, Any] = field(default_factory=dict)
    """The notes for the snapshots of its texts."""


class Generation:
    """The texts of one HTTP request while the engine generates them."""

    def __init__(
        self, service: Service, prompts: Sequence[PromptRequest], request: Request, arrived: float | None = None
    ):
        self.service, self.prompts, self.request = service, list(prompts), request
        self.loaded = service.ready()
        self.caller, self.facts = request.state.caller, request.state.facts
        self.num_generated = 0
        self._arrived = request.state.arrived if arrived is None else arrived
        limits = service.settings.limits
        self._queue_end = self._arrived + limits.queue_timeout
        self._end = self._arrived + limits.request_timeout
        self._items = asyncio.Queue[tuple[int, StepOutput] | BaseException]()
        self._left = [prompt.params.n for prompt in self.prompts]  # texts of each prompt that have not ended
        self._last_token: dict[tuple[int, int], float] = {}
        self._is_cut_off = False

    @property
    def waiting(self) -> list[PromptRequest]:
        """The prompts that do not have a state yet."""
        return [prompt for prompt in self.prompts if not prompt.has_started]

    @property
    def num_states(self) -> int:
        """The number of texts that have a state or will fork that of their prompt."""
        return sum(prompt.num_left for prompt in self.prompts if prompt.has_started)

    async def submit(self) -> None:
        """Submits the prompts to the engine. If you do not read all outputs, call :meth:`close`.

        Raises:
            ApiError: as :meth:`Service.admit`; 400 if the engine refuses a prompt.
        """
        self.service.admit(self.prompts)
        self.service.running.add(self)
        try:
            for place, prompt in enumerate(self.prompts):
                prompt.deliver = partial(self._enqueue, place)
                await self._submit(prompt)
        except BaseException:
            self.close()
            raise

    async def _submit(self, prompt: PromptRequest) -> None:
        try:
            await self.loaded.engine.submit(prompt)
        except ValueError as error:
            setting = re.match(r"(\w+) is ", str(error))  # otherwise the error is about the prompt
            raise bad_request(str(error), setting[1] if setting else prompt.param) from error
        except RuntimeError as error:
            self.service.check_engine()
            raise unavailable("the engine has stopped", "engine_failed") from error

    def _enqueue(self, place: int, item: Item) -> None:
        if not isinstance(item, Started):
            self._items.put_nowait(item if isinstance(item, BaseException) else (place, item))
        elif self.service.metrics is not None:
            self.service.metrics.observe("request_queue_time", time.monotonic() - self._arrived)

    async def outputs(self, silence_seconds: float = math.inf) -> AsyncIterator[tuple[int, StepOutput] | None]:
        """Yields the outputs, each with the index of its prompt, until all texts have ended.

        Yields None after each ``silence_seconds`` without an output.

        Raises:
            ApiError: 503 if the request takes too long or the engine has failed.
            CutOff: the server is shutting down.
        """
        while any(self._left):
            item = await self._next(time.monotonic() + silence_seconds)
            if isinstance(item, CutOff):
                raise item
            if isinstance(item, BaseException):
                self.service.check_engine()
                raise unavailable("the engine has failed", "engine_failed")
            if item is not None:
                self._note(*item)
            yield item
        if self._is_cut_off:
            raise CutOff

    async def _next(self, silent_until: float) -> tuple[int, StepOutput] | BaseException | None:
        """Returns the next item, or None if none arrives before that time."""
        while True:
            ends = [self._end, silent_until, *([self._queue_end] if self.waiting else [])]
            try:
                async with asyncio.timeout(max(0.0, min(ends) - time.monotonic())):
                    return await self._items.get()
            except TimeoutError:
                now = time.monotonic()
                if self.waiting and now >= self._queue_end:
                    raise self._late("has waited for a state", "queue_timeout") from None
                if now >= self._end:
                    raise self._late("has run", "request_timeout") from None
                if now >= silent_until:
                    return None

    def _late(self, what: str, code: str) -> ApiError:
        seconds = time.monotonic() - self._arrived
        return unavailable(f"the request {what} for {seconds:.0f} seconds, which is the time limit", code)

    def _note(self, place: int, output: StepOutput) -> None:
        """Counts an output in the metrics."""
        now, metrics = time.monotonic(), self.service.metrics
        assert metrics is not None
        if output.token_ids:
            self.num_generated += len(output.token_ids)
            last = self._last_token.get((place, output.index))
            name = "time_to_first_token" if last is None else "inter_token_latency"
            metrics.observe(name, now - (self._arrived if last is None else last))
            self._last_token[place, output.index] = now
        if output.completion is not None:
            self._left[place] -= 1
            metrics.count("request_success", output.completion.finish_reason)
            if not any(self._left):
                metrics.observe("e2e_request_latency", now - self._arrived)

    def cut_off(self, *, keep: bool) -> None:
        """Ends the request because of a shutdown. With ``keep``, the snapshots of its texts are delivered first."""
        if keep and not self._is_cut_off:
            self._is_cut_off = True
            for prompt in self.prompts:
                self.loaded.engine.stop(prompt)
        else:
            self._items.put_nowait(CutOff())

    def close(self) -> None:
        """Ends all texts that still run, within a step."""
        for prompt in self.prompts:
            self.loaded.engine.abort(prompt)
        self.service.running.discard(self)
