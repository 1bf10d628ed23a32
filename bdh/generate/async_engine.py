"""The engine for asyncio: it runs in its own thread, and any number of tasks can await its outputs."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from bdh.generate.advance import Residuals
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, Prompt, StepOutput
from bdh.generate.snapshot import Snapshot

_logger = logging.getLogger(__name__)


class Started:
    """Reports that a request has started running."""


Item = StepOutput | BaseException | Started
"""What a request receives: an output, the engine's failure, or the report that it has started."""


@dataclass(eq=False)
class AsyncRequest:
    """A request for an :class:`AsyncEngine`, and its progress."""

    prompt: Prompt | None
    params: SamplingParams = field(default_factory=SamplingParams)
    snapshot: Snapshot | None = None
    keep_snapshot: bool = False
    record_activations: int | None = None
    residuals: Residuals | None = None
    """This field and those before it are the arguments of :meth:`Engine.add_request`."""
    deliver: Callable[[Item], None] | None = None
    """Called in the event loop with each output, or with the exception if the engine fails. None queues them for
    :meth:`outputs`."""
    id: int = -1
    """The request's id in the engine; -1 before it is submitted."""
    has_started: bool = False
    """Whether the request has started running."""
    num_left: int = 0
    """The number of unfinished continuations; set by :meth:`AsyncEngine.submit`."""

    def __post_init__(self) -> None:
        self._kept: asyncio.Queue[Item] = asyncio.Queue()

    def receive(self, item: Item) -> None:
        """Updates the progress with an item, and delivers it."""
        self.has_started = True
        if isinstance(item, BaseException):
            self.num_left = 0
        elif isinstance(item, StepOutput) and item.completion is not None:
            self.num_left = max(0, self.num_left - 1)
        (self.deliver or self._kept.put_nowait)(item)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """Yields the outputs as they are generated, until all continuations have ended.

        Raises:
            RuntimeError: the engine is closed or has failed.
        """
        while self.num_left or not self._kept.empty():
            item = await self._kept.get()
            if isinstance(item, BaseException):
                raise RuntimeError(f"the engine has failed: {item}") from item
            if isinstance(item, StepOutput):
                yield item


class AsyncEngine:
    """Runs an :class:`Engine` in a thread, and accepts requests from any task or thread.

    Do not use the engine directly any more. An exception in the engine itself, rather than in a request, ends the
    thread; it is raised in all tasks that await outputs, and by later calls.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # calls that the thread makes between two steps
        self._receivers: dict[int, tuple[asyncio.AbstractEventLoop, AsyncRequest]] = {}
        self._is_closed = False
        self.failure: BaseException | None = None
        """The exception that ended the thread; None while it runs."""
        self._beat, self._is_idle = time.monotonic(), True
        self.stats = engine.stats()
        """The engine's statistics after the last step."""
        self._thread = threading.Thread(target=self._run, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def seconds_without_progress(self) -> float:
        """The time since a step, or a part of its work, last completed; 0 if there is nothing to do.

        It grows large if a step hangs, but not while a long prompt is read.
        """
        return 0.0 if self._is_idle else time.monotonic() - max(self._beat, self.engine.advancer.last_progress)

    async def submit(self, request: AsyncRequest) -> None:
        """Submits a request. If you do not read all of its outputs, call :meth:`abort`.

        Raises:
            ValueError: as :meth:`Engine.add_request`.
            RuntimeError: the engine is closed or has failed.
        """
        loop = asyncio.get_running_loop()
        taken_up: Future[None] = Future()
        request.num_left = request.params.n

        def add() -> None:
            if not taken_up.set_running_or_notify_cancel():
                return
            try:
                request.id = self.engine.add_request(
                    request.prompt,
                    request.params,
                    snapshot=request.snapshot,
                    keep_snapshot=request.keep_snapshot,
                    record_activations=request.record_activations,
                    residuals=request.residuals,
                )
            except Exception as error:
                taken_up.set_exception(error)
                return
            self._receivers[request.id] = (loop, request)
            taken_up.set_result(None)

        self._order(add)
        try:
            await asyncio.wrap_future(taken_up)
        except asyncio.CancelledError:
            self.abort(request)
            raise

    def abort(self, request: AsyncRequest) -> None:
        """Ends a request within a step, without further outputs. Does nothing if it has ended."""

        def abort() -> None:  # runs after the call that adds the request
            if self._receivers.pop(request.id, None) is not None:
                self.engine.abort(request.id)

        if request.num_left:
            request.num_left = 0
            if self.failure is None:
                self._order(abort, is_wanted_always=True)

    def stop(self, request: AsyncRequest) -> None:
        """Ends a request within a step. The last outputs have snapshots of the continuations that had started."""
        if request.num_left and self.failure is None:
            self._order(lambda: self.engine.abort(request.id, keep_snapshot=True), is_wanted_always=True)

    async def stream(
        self, prompt: Prompt | None, params: SamplingParams | None = None, **arguments: Any
    ) -> AsyncIterator[StepOutput]:
        """Submits a request and yields its outputs. Leaving the loop, or cancelling the task, aborts it within a step.

        The arguments are those of :class:`AsyncRequest`, the exceptions those of :meth:`submit` and
        :meth:`AsyncRequest.outputs`.
        """
        request = AsyncRequest(prompt, params or SamplingParams(), **arguments)
        await self.submit(request)
        try:
            async for output in request.outputs():
                yield output
        finally:
            self.abort(request)

    async def generate(
        self, prompt: Prompt | None, params: SamplingParams | None = None, **arguments: Any
    ) -> list[Completion]:
        """Returns the continuations of a prompt. Arguments and exceptions are those of :meth:`stream`."""
        found: dict[int, Completion] = {}
        async for output in self.stream(prompt, params, **arguments):
            if output.completion is not None:
                found[output.index] = output.completion
        return [found[index] for index in sorted(found)]

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread after its current step. Requests that are still running fail.

        Args:
            seconds: the time to wait for the thread; None to wait without limit.

        Returns:
            Whether the thread has ended in this time.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _order(self, order: Callable[[], None], *, is_wanted_always: bool = False) -> None:
        with self._changed:
            if self._is_closed and not is_wanted_always:
                raise RuntimeError("the engine is closed")
            if self.failure is not None and not is_wanted_always:
                raise RuntimeError(f"the engine has failed: {self.failure}") from self.failure
            self._orders.append(order)
            self._changed.notify()

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the engine was closed")
        try:
            while True:
                with self._changed:
                    self._is_idle = True
                    self._changed.wait_for(lambda: self._orders or self._is_closed or self.engine.has_work)
                    self._beat, self._is_idle = time.monotonic(), False
                    if self._is_closed:
                        break
                    orders, self._orders = self._orders, []
                self._carry_out(orders)
                outputs = self.engine.step() if self.engine.has_work else []
                started: list[tuple[int, Item]] = [(each, Started()) for each in self.engine.take_started()]
                self._deliver([*started, *((output.request_id, output) for output in outputs)])
                for request_id in [each for each in self._receivers if not self.engine.knows(each)]:
                    del self._receivers[request_id]
                self.stats = self.engine.stats()
        except BaseException as error:
            failure = error
        with self._changed:
            self.failure = failure
        self._carry_out(self._orders)  # calls that arrived last get the failure too
        self._deliver([(request_id, failure) for request_id in self._receivers])
        self._receivers.clear()

    def _carry_out(self, orders: Sequence[Callable[[], None]]) -> None:
        """Makes queued calls. One that fails is logged and does not affect the others."""
        for order in orders:
            try:
                order()
            except Exception:
                _logger.exception("the engine could not process a call")

    def _deliver(self, items: Sequence[tuple[int, Item]]) -> None:
        """Delivers items to the requests with these ids, waking each event loop once."""
        for_loop: dict[asyncio.AbstractEventLoop, list[tuple[AsyncRequest, Item]]] = {}
        for request_id, item in items:
            if found := self._receivers.get(request_id):
                for_loop.setdefault(found[0], []).append((found[1], item))
        for loop, several in for_loop.items():
            try:
                loop.call_soon_threadsafe(_receive_all, several)
            except RuntimeError:  # the event loop is closed: no task awaits the outputs any more
                if not loop.is_closed():
                    raise


def _receive_all(items: Sequence[tuple[AsyncRequest, Item]]) -> None:
    for request, item in items:
        request.receive(item)
