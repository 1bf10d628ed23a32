"""The engine for asyncio: it steps in a thread of its own, and any number of tasks wait for their outputs."""

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
    """A request has a state."""


Item = StepOutput | BaseException | Started
"""What a request gets: an output, a failure, or that it has a state."""


@dataclass(eq=False)
class AsyncRequest:
    """One prompt for the engine, and how far it has come."""

    prompt: Prompt | None
    params: SamplingParams = field(default_factory=SamplingParams)
    snapshot: Snapshot | None = None
    keep_snapshot: bool = False
    record_activations: int | None = None
    residuals: Residuals | None = None
    """This one and those before are arguments of :meth:`Engine.add_request`."""
    deliver: Callable[[Item], None] | None = None
    """Is called in the event loop with what the steps add, and the exception if the engine fails. None keeps them for :meth:`outputs`."""
    id: int = -1
    """Its number in the engine; -1 until it has one."""
    has_started: bool = False
    """Whether it has a state, or has had one: until then it waits."""
    num_left: int = 0
    """Continuations that have not ended, from :meth:`AsyncEngine.submit` on."""

    def __post_init__(self) -> None:
        self._kept: asyncio.Queue[Item] = asyncio.Queue()

    def receive(self, item: Item) -> None:
        """Notes what has come, and delivers it."""
        self.has_started = True
        if isinstance(item, BaseException):
            self.num_left = 0
        elif isinstance(item, StepOutput) and item.completion is not None:
            self.num_left = max(0, self.num_left - 1)
        (self.deliver or self._kept.put_nowait)(item)

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """What the steps add, as it comes, until all continuations have ended.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        while self.num_left or not self._kept.empty():
            item = await self._kept.get()
            if isinstance(item, BaseException):
                raise RuntimeError(f"the engine has failed: {item}") from item
            if isinstance(item, StepOutput):
                yield item


class AsyncEngine:
    """Takes requests from any task or thread; the engine belongs to this object's thread from now on.

    An exception in the engine itself, not in a request, ends the thread, and is raised for everyone who waits or asks later.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []  # what the thread is to do between two steps
        self._receivers: dict[int, tuple[asyncio.AbstractEventLoop, AsyncRequest]] = {}
        self._is_closed = False
        self.failure: BaseException | None = None
        """Why the thread has ended; None while it runs."""
        self._beat, self._is_idle = time.monotonic(), True
        self.stats = engine.stats()
        """As they were after the last step."""
        self._thread = threading.Thread(target=self._run, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def seconds_without_progress(self) -> float:
        """Since a step, or some work of a step, came to its end; 0 where there is nothing to do. Large where a step hangs, and
        not where it has much to read."""
        return 0.0 if self._is_idle else time.monotonic() - max(self._beat, self.engine.advancer.last_progress)

    async def submit(self, request: AsyncRequest) -> None:
        """Hands a request to the engine. Who does not take all of its outputs is to call :meth:`abort`.

        Raises:
            ValueError: as :meth:`Engine.add_request`.
            RuntimeError: the engine is closed, or has failed.
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
        """Ends a request within a step; no further outputs come. Does nothing where it has ended."""

        def abort() -> None:  # carried out after the order that adds it
            if self._receivers.pop(request.id, None) is not None:
                self.engine.abort(request.id)

        if request.num_left:
            request.num_left = 0
            if self.failure is None:
                self._order(abort, is_wanted_always=True)

    def stop(self, request: AsyncRequest) -> None:
        """Ends a request within a step; the outputs that come last have snapshots of what had begun."""
        if request.num_left and self.failure is None:
            self._order(lambda: self.engine.abort(request.id, keep_snapshot=True), is_wanted_always=True)

    async def stream(
        self, prompt: Prompt | None, params: SamplingParams | None = None, **arguments: Any
    ) -> AsyncIterator[StepOutput]:
        """The outputs of a request as they come. Leaving the loop, or cancelling the task, aborts it within a step.

        Arguments are those of :class:`AsyncRequest`, errors those of :meth:`submit` and :meth:`AsyncRequest.outputs`.
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
        """The continuations of a prompt. Arguments and errors are those of :meth:`stream`."""
        found: dict[int, Completion] = {}
        async for output in self.stream(prompt, params, **arguments):
            if output.completion is not None:
                found[output.index] = output.completion
        return [found[index] for index in sorted(found)]

    def close(self, seconds: float | None = None) -> bool:
        """Ends the thread after its present step; requests that still run end with an error.

        Returns:
            Whether it has ended within so many seconds; None waits for as long as it takes.
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
        self._carry_out(self._orders)  # those that have just come get the failure too
        self._deliver([(request_id, failure) for request_id in self._receivers])
        self._receivers.clear()

    def _carry_out(self, orders: Sequence[Callable[[], None]]) -> None:
        """One that fails does so alone: what it asked for may not have happened, and all else continues."""
        for order in orders:
            try:
                order()
            except Exception:
                _logger.exception("the engine could not carry out an order")

    def _deliver(self, items: Sequence[tuple[int, Item]]) -> None:
        """Hands items to the requests of these ids: each event loop is woken once."""
        for_loop: dict[asyncio.AbstractEventLoop, list[tuple[AsyncRequest, Item]]] = {}
        for request_id, item in items:
            if found := self._receivers.get(request_id):
                for_loop.setdefault(found[0], []).append((found[1], item))
        for loop, several in for_loop.items():
            try:
                loop.call_soon_threadsafe(_receive_all, several)
            except RuntimeError:  # the loop has been closed: nobody waits any more
                if not loop.is_closed():
                    raise


def _receive_all(items: Sequence[tuple[AsyncRequest, Item]]) -> None:
    for request, item in items:
        request.receive(item)
