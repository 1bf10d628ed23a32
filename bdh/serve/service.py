"""What stands between the routes and the engine: who may come in, how long things may take, and how it all ends."""

import asyncio
import itertools
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from transformers import PreTrainedTokenizerFast

from bdh.generate.async_engine import AsyncEngine, Submission
from bdh.generate.params import SamplingParams
from bdh.generate.residuals import Residuals
from bdh.generate.sequence import StepOutput
from bdh.generate.snapshot import Snapshot
from bdh.model.modeling import BDHForCausalLM
from bdh.serve.config import ServeSettings
from bdh.serve.errors import ApiError, bad_request
from bdh.serve.keys import Caller
from bdh.serve.metrics import Metrics
from bdh.serve.prompts import ChatPrompts
from bdh.serve.states import StateStore
from bdh.serve.tokens import TokenNames

Result = TypeVar("Result")
RETRY_SECONDS = 5.0  # where nothing better is known


@dataclass
class Job:
    """One prompt of a request."""

    tokens: list[int]
    """Behind the snapshot, where there is one."""
    params: SamplingParams
    snapshot: Snapshot | None = None
    keep_snapshot: bool = False
    watch: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """For the snapshots of its texts."""
    param: str = "prompt"
    """What the request calls it."""
    residuals: Residuals | None = None
    """Takes those of its tokens."""


@dataclass
class Loaded:
    """What is there once the model is."""

    model: BDHForCausalLM
    tokenizer: PreTrainedTokenizerFast
    front: AsyncEngine
    chat: ChatPrompts
    names: TokenNames
    states: StateStore
    model_names: list[str]
    created: int = field(default_factory=lambda: int(time.time()))
    text_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "bdh-text"))
    """Of ``tokenizer``, which only this thread uses: the engine has another one."""

    async def in_text_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self.text_thread, function, *arguments)

    @property
    def name(self) -> str:
        return self.model_names[0]


class Service:
    """
    Attributes:
        status: loading, ready, draining, or failed.
    """

    def __init__(self, settings: ServeSettings):
        self.settings = settings
        self.status: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.failure: BaseException | None = None
        self.loaded: Loaded | None = None
        self.metrics: Metrics | None = None
        self._running: set[Generation] = set()
        self._numbers = itertools.count()

    def open(self, loaded: Loaded) -> None:
        """From here on requests are taken."""
        self.metrics = Metrics(loaded.name, self._gauges)
        self.loaded = loaded
        if self.status == "loading":
            self.status = "ready"

    def ready(self) -> Loaded:
        """What requests work with.

        Raises:
            ApiError: 503, the model is loading, the server ends, or its engine has failed.
        """
        self.watch_engine()
        if self.status == "ready" and self.loaded is not None:
            return self.loaded
        message = {
            "loading": "the model is being loaded",
            "draining": "the server is ending",
            "failed": "the engine has failed",
        }[self.status]
        code = {"loading": "loading", "draining": "draining", "failed": "engine_failed"}[self.status]
        raise ApiError(503, message, code=code, retry_after=RETRY_SECONDS)

    def watch_engine(self) -> None:
        """Takes note where the engine's thread has ended, or hangs."""
        if self.loaded is None or self.status == "failed":
            return
        failure = self.loaded.front.failure
        most, seconds = self.settings.limits.stall_timeout, self.loaded.front.seconds_without_progress
        if failure is None and most is not None and seconds > most:
            failure = RuntimeError(f"the engine has made no progress for {seconds:.0f} seconds")
        if failure is not None and self.status == "ready":
            self.status, self.failure = "failed", failure

    def check_model(self, name: str | None) -> str:
        """The name that the answer has.

        Raises:
            ApiError: 404, there is no such model; or 503.
        """
        names = self.ready().model_names
        if name and name not in names:
            raise ApiError(
                404,
                f"there is no model {name!r} here: must be one of {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    def check_texts(self, count: int, param: str) -> None:
        """
        Raises:
            ApiError: 400, the request asks for more texts of a prompt than this server generates; or 503.
        """
        most = min(self.settings.limits.texts, self.ready().front.engine.max_sequences)
        if count > most:
            raise bad_request(f"{param} is {count}: must be at most {most}", param)

    def check_lengths(self, jobs: Sequence[Job]) -> None:
        """
        Raises:
            ApiError: 400, a prompt has more tokens than this server reads.
        """
        most = self.settings.limits.prompt_tokens
        for job in jobs:
            if len(job.tokens) > most:
                raise bad_request(
                    f"the prompt has {len(job.tokens):,} tokens: must be at most {most:,}",
                    job.param,
                    "context_length_exceeded",
                )

    @property
    def num_waiting(self) -> int:
        return sum(generation.num_waiting for generation in self._running)

    def admit(self, jobs: Sequence[Job]) -> None:
        """
        Raises:
            ApiError: 400, the request is larger than this server takes; 429, its queue is full; or 503.
        """
        loaded, limits = self.ready(), self.settings.limits
        if len(jobs) > limits.prompts:
            raise bad_request(f"the request has {len(jobs)} prompts: must be at most {limits.prompts}", "prompt")
        self.check_lengths(jobs)
        num_waiting = self.num_waiting
        num_tokens = sum(generation.waiting_tokens for generation in self._running)
        stats = loaded.front.stats
        # What can begin with the next step does not wait.
        room = self._free_states(stats.state_bytes)
        if num_waiting + len(jobs) > limits.queue_requests + room:
            raise self._full(f"{num_waiting} prompts wait already, and {limits.queue_requests} may")
        if num_waiting and num_tokens + sum(len(job.tokens) for job in jobs) > limits.queue_tokens:
            raise self._full(f"the prompts that wait have {num_tokens:,} tokens, and {limits.queue_tokens:,} may wait")

    def _free_states(self, bytes_in_use: int) -> int:
        assert self.loaded is not None
        engine = self.loaded.front.engine
        capacity = min(engine.max_sequences, engine.config.max_running)
        return max(0, capacity - bytes_in_use // engine.stepper.state_bytes)

    def _full(self, why: str) -> ApiError:
        return ApiError(429, f"the queue is full: {why}", code="queue_full", retry_after=RETRY_SECONDS)

    async def begin(self, jobs: Sequence[Job], *, caller: Caller, arrived: float) -> "Generation":
        """Hands prompts to the engine. Who does not take all outputs is to close the result.

        Raises:
            ApiError: as :meth:`admit`; 400, the engine refuses one.
        """
        self.admit(jobs)
        generation = Generation(self, jobs, caller, arrived)
        self._running.add(generation)
        try:
            await generation.submit()
        except BaseException:
            generation.close()
            raise
        return generation

    def answered(self, route: str, status: int) -> None:
        """Counts an answer."""
        if self.metrics is not None:
            self.metrics.answered(route, status)

    def end(self, generation: "Generation") -> None:
        self._running.discard(generation)

    def refuse(self) -> None:
        """From here on no more requests are taken."""
        if self.status in ("ready", "loading"):
            self.status = "draining"

    async def drain(self, seconds: float) -> int:
        """Takes no more requests, and waits for those that run; after that time they are cut off.

        Returns:
            How many were.
        """
        self.refuse()
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.05)
        cut = list(self._running)
        for generation in cut:
            generation.cut_off(keep=self.settings.resume_on_restart)
        end = time.monotonic() + 5
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return len(cut)

    def _gauges(self) -> dict[str, float]:
        assert self.loaded is not None
        stats, states = self.loaded.front.stats, self.loaded.states
        return {
            "num_requests_running": stats.running,
            "num_requests_waiting": self.num_waiting,
            "state_bytes_in_use": stats.state_bytes,
            "state_bytes_limit": self.loaded.front.engine.max_state_bytes,
            "prefix_cache_bytes": stats.prefix_cache_bytes,
            "saved_states": states.num_states,
            "saved_state_bytes": states.bytes_in_memory,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generated_tokens,
            "prefix_cache_hits": stats.prefix_cache_hits,
            "prefix_cache_tokens": stats.prefix_cache_tokens,
            "prefix_cache_failures": stats.prefix_cache_failures,
        }


class CutOff(Exception):
    """The server ends before the request does."""


@dataclass(eq=False)
class Event:
    """What a step has added to one text of a request."""

    job: int
    output: StepOutput


class Generation:
    """The texts of one request, while they are generated."""

    def __init__(self, service: Service, jobs: Sequence[Job], caller: Caller, arrived: float):
        self.jobs, self.caller = list(jobs), caller
        self._service = service
        self._arrived = arrived
        limits = service.settings.limits
        self._queue_end = arrived + limits.queue_timeout
        self._end = arrived + limits.request_timeout
        self._submissions: list[Submission] = []
        self._places: dict[Submission, int] = {}
        self._items = asyncio.Queue[tuple[Submission, StepOutput] | BaseException]()
        self._num_left = sum(job.params.n for job in jobs)
        self._last_token: dict[tuple[int, int], float] = {}
        self._is_cut_off = self._is_closed = False
        self.num_generated = 0

    @property
    def num_waiting(self) -> int:
        """Prompts that have no state yet."""
        return len(self.jobs) - sum(submission.started for submission in self._submissions)

    @property
    def waiting_tokens(self) -> int:
        waits = [True] * len(self.jobs)
        for submission in self._submissions:
            waits[self._places[submission]] = not submission.started
        return sum(len(job.tokens) for job, waiting in zip(self.jobs, waits, strict=True) if waiting)

    async def submit(self) -> None:
        loaded = self._service.loaded
        assert loaded is not None
        for place, job in enumerate(self.jobs):
            try:
                submission = await loaded.front.submit(
                    job.tokens,
                    job.params,
                    snapshot=job.snapshot,
                    keep_snapshot=job.keep_snapshot,
                    watch=job.watch,
                    residuals=job.residuals,
                    deliver=self._take,
                )
            except ValueError as error:
                setting = re.match(r"(\w+) is ", str(error))  # else it is the prompt
                raise bad_request(str(error), setting[1] if setting else job.param) from error
            except RuntimeError as error:
                self._service.watch_engine()
                raise ApiError(503, "the engine has ended", code="engine_failed", retry_after=RETRY_SECONDS) from error
            self._submissions.append(submission)
            self._places[submission] = place
            if submission.started:  # before it was in the list
                self._note_start()

    def _take(self, submission: Submission, item: StepOutput | BaseException | None) -> None:
        if isinstance(item, BaseException):
            self._items.put_nowait(item)
        elif item is not None:
            self._items.put_nowait((submission, item))
        elif submission in self._places:
            self._note_start()

    def _note_start(self) -> None:
        if self._service.metrics is not None:
            self._service.metrics.request_queue_time.observe(time.monotonic() - self._arrived)

    @property
    def is_done(self) -> bool:
        """Whether everything has come."""
        return not self._num_left

    async def next(self, seconds: float | None = None) -> Event | None:
        """What comes next; None where nothing has come for so long. Not when it is done.

        Raises:
            ApiError: 503, it takes too long, or the engine has failed.
            CutOff: the server ends.
        """
        silent_until = None if seconds is None else time.monotonic() + seconds
        while True:
            end = self._end if not self.num_waiting else min(self._end, self._queue_end)
            until = end if silent_until is None else min(end, silent_until)
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    item = await self._items.get()
            except TimeoutError:
                now = time.monotonic()
                if self.num_waiting and now >= self._queue_end:
                    raise self._late("has waited for a state", "queue_timeout") from None
                if now >= self._end:
                    raise self._late("has run", "request_timeout") from None
                if silent_until is not None and now >= silent_until:
                    return None
                continue
            if isinstance(item, CutOff):
                raise item
            if isinstance(item, BaseException):
                self._service.watch_engine()
                raise ApiError(503, "the engine has failed", code="engine_failed", retry_after=RETRY_SECONDS)
            submission, output = item
            return self._event(submission, output)

    def _event(self, submission: Submission, output: StepOutput) -> Event:
        place, metrics = self._places[submission], self._service.metrics
        self._num_left -= output.completion is not None
        assert metrics is not None
        now = time.monotonic()
        if output.token_ids:
            self.num_generated += len(output.token_ids)
            last = self._last_token.get((place, output.index))
            if last is None:
                metrics.time_to_first_token.observe(now - self._arrived)
            else:
                metrics.inter_token_latency.observe(now - last)
            self._last_token[place, output.index] = now
        if output.completion is not None:
            metrics.finished(output.completion.finish_reason)
            if not self._num_left:
                metrics.e2e_request_latency.observe(now - self._arrived)
        return Event(place, output)

    def _late(self, what: str, code: str) -> ApiError:
        return ApiError(
            503,
            f"the request {what} for {time.monotonic() - self._arrived:.0f} seconds, which is as long as it may",
            code=code,
            retry_after=RETRY_SECONDS,
        )

    def cut_off(self, *, keep: bool) -> None:
        """The server ends. With ``keep`` the texts' snapshots come before the end."""
        if keep and not self._is_cut_off:
            self._is_cut_off = True
            for submission in self._submissions:
                submission.stop()
        else:
            self._items.put_nowait(CutOff())

    @property
    def is_cut_off(self) -> bool:
        return self._is_cut_off

    def close(self) -> None:
        """Ends what still runs, within a step."""
        if self._is_closed:
            return
        self._is_closed = True
        for submission in self._submissions:
            submission.abort()
        self._service.end(self)
