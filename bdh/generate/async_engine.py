"""The engine for asyncio: it steps in a thread of its own, and any number of tasks wait for their outputs."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from bdh.generate.advance import Residuals
from bdh.generate.decoder import Prompt
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput
from bdh.generate.snapshot import Snapshot

_log = logging.getLogger(__name__)
Item = StepOutput | BaseException | None
"""What a submission gets: an output, a failure, or, as None, that it has a state."""


class Submission:
    """A request that the engine has taken up, for one event loop.

    Args:
        deliver: is called in the event loop with what the steps add, and the exception if the engine fails. By default
            it is kept for :meth:`outputs`.

    Attributes:
        id: its number in the engine.
        started: whether it has a state, or has had one: until then it waits.
    """

    def __init__(
        self,
        front: "AsyncEngine",
        num_sequences: int,
        deliver: Callable[["Submission", Item], None] | None = None,
    ):
        self.id = -1  # until the engine has given it one
        self.started = False
        self.num_left = num_sequences
        """Continuations that have not ended."""
        self._front = front
        self._outputs = asyncio.Queue[StepOutput | BaseException]()
        self._on_delivery = deliver

    async def outputs(self) -> AsyncIterator[StepOutput]:
        """What the steps add, as it comes, until all continuations have ended.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        while self.num_left or not self._outputs.empty():
            item = await self._outputs.get()
            if isinstance(item, BaseException):
                raise RuntimeError(f"the engine has failed: {item}") from item
            yield item

    def abort(self) -> None:
        """Ends it within a step; no further outputs come. Does nothing where it has ended."""
        if self.num_left:
            self.num_left = 0
            self._front._order_abort(self)

    def stop(self) -> None:
        """Ends it within a step; the outputs that come last have snapshots of what had begun."""
        if self.num_left:
            self._front._order_stop(self)

    def _deliver(self, item: Item) -> None:
        self.started = True
        if isinstance(item, BaseException):
            self.num_left = 0
        elif item is not None and item.completion is not None:
            self.num_left = max(0, self.num_left - 1)
        if self._on_delivery is not None:
            self._on_delivery(self, item)
        elif item is not None:
            self._outputs.put_nowait(item)


class AsyncEngine:
    """Requests from any task or thread; the engine belongs to this object's thread from now on.

    An exception in the engine itself, not in a request, ends the thread, and reaches everyone who waits and
    who asks from then on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()  # what the thread is to do between two steps
        self._receivers: dict[int, tuple[asyncio.AbstractEventLoop, Submission]] = {}
        self._is_closed = False
        self._failure: BaseException | None = None
        self._beat, self._is_idle = time.monotonic(), True
        self.stats = engine.stats()
        """As they were behind the last step."""
        self._thread = threading.Thread(target=self._run, name="bdh-engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> BaseException | None:
        """Why the thread has ended; None while it runs."""
        return self._failure

    @property
    def seconds_without_progress(self) -> float:
        """Since the thread last went from one step to the next, or a step from one of its parts to the next; 0 where it
        has nothing to do. Large where a step hangs, and not where it has much to read."""
        return 0.0 if self._is_idle else time.monotonic() - max(self._beat, self.engine.advancer.last_progress)

    async def submit(
        self,
        prompt: Prompt | None,
        params: SamplingParams | None = None,
        *,
        snapshot: Snapshot | None = None,
        keep_snapshot: bool = False,
        watch: int | None = None,
        residuals: Residuals | None = None,
        deliver: Callable[[Submission, Item], None] | None = None,
    ) -> Submission:
        """Hands a request to the engine. Who does not take all of its outputs is to abort it.

        Args:
            deliver: see :class:`Submission`; the other arguments are those of :meth:`Engine.add_request`.

        Raises:
            ValueError: as :meth:`Engine.add_request`.
            RuntimeError: the engine is closed, or has failed.
        """
        params = params or SamplingParams()
        loop = asyncio.get_running_loop()
        taken_up: asyncio.Future[None] = loop.create_future()
        submission = Submission(self, params.n, deliver)

        def add() -> None:
            try:
                submission.id = self.engine.add_request(
                    prompt, params, snapshot=snapshot, keep_snapshot=keep_snapshot, watch=watch, residuals=residuals
                )
            except Exception as error:
                _call_soon(loop, _set, taken_up, error)
                return
            self._receivers[submission.id] = (loop, submission)
            _call_soon(loop, _set, taken_up, None)

        self._order(add)
        try:
            await taken_up
        except asyncio.CancelledError:
            submission.abort()
            raise
        return submission

    async def stream(
        self, prompt: Prompt | None, params: SamplingParams | None = None, **arguments: Any
    ) -> AsyncIterator[StepOutput]:
        """The outputs of a request as they come. Leaving the loop, or cancelling the task, aborts it within a step.

        Arguments and errors are those of :meth:`submit`, and :meth:`Submission.outputs`.
        """
        submission = await self.submit(prompt, params, **arguments)
        try:
            async for output in submission.outputs():
                yield output
        finally:
            submission.abort()

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

        Args:
            seconds: to wait for that at most; None for as long as it takes.

        Returns:
            Whether it has ended.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _order_abort(self, submission: Submission) -> None:
        def abort() -> None:  # carried out behind the order that adds it
            if self._receivers.pop(submission.id, None) is not None:
                self.engine.abort(submission.id)

        if self._failure is None:
            self._order(abort, is_wanted_always=True)

    def _order_stop(self, submission: Submission) -> None:
        if self._failure is None:
            self._order(lambda: self.engine.abort(submission.id, keep_snapshot=True), is_wanted_always=True)

    def _order(self, order: Callable[[], None], *, is_wanted_always: bool = False) -> None:
        with self._changed:
            if not is_wanted_always:
                self._check_running()
            self._orders.append(order)
            self._changed.notify()

    def _check_running(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed")
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed: {self._failure}") from self._failure

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
                    orders = list(self._orders)
                    self._orders.clear()
                for order in orders:
                    _carry_out(order)
                outputs = self.engine.step() if self.engine.has_work else []
                started: list[tuple[int, Item]] = [(each, None) for each in self.engine.take_started()]
                self._deliver([*started, *((output.request_id, output) for output in outputs)])
                self._drop_ended()
                self.stats = self.engine.stats()
        except BaseException as error:
            failure = error
        with self._changed:
            self._failure = failure
            orders = list(self._orders)
        for order in orders:  # those that have just come are told what happened, like all others
            _carry_out(order)
        self._deliver([(request_id, failure) for request_id in self._receivers])
        self._receivers.clear()

    def _deliver(self, items: Sequence[tuple[int, Item]]) -> None:
        """Hands items to the submissions of these ids: each event loop is woken once."""
        for_loop: dict[asyncio.AbstractEventLoop, list[tuple[Submission, Item]]] = {}
        for request_id, item in items:
            if found := self._receivers.get(request_id):
                for_loop.setdefault(found[0], []).append((found[1], item))
        for loop, several in for_loop.items():
            _call_soon(loop, _deliver_all, several)

    def _drop_ended(self) -> None:
        for request_id in [each for each in self._receivers if not self.engine.knows(each)]:
            del self._receivers[request_id]


def _carry_out(order: Callable[[], None]) -> None:
    """An order whose failure is its own: what it asked for may not have happened, and all else goes on."""
    try:
        order()
    except Exception:
        _log.exception("the engine could not carry out an order")


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has been closed: nobody waits any more
        if not loop.is_closed():
            raise


def _deliver_all(items: Sequence[tuple[Submission, Item]]) -> None:
    for submission, item in items:
        submission._deliver(item)


def _set(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
