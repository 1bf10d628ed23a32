"""The engine for asyncio: it steps in a thread of its own, and any number of tasks wait for their outputs."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput
from bdh.generate.snapshot import Snapshot
from bdh.model.text import Prompt

Deliver = Callable[[StepOutput | BaseException], None]


class AsyncEngine:
    """Requests from any task or thread; the engine belongs to this object's thread from now on.

    An exception in the engine itself, not in a request, ends the thread, and reaches everyone who waits and
    who asks from then on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()  # what the thread is to do between two steps
        self._receivers: dict[int, Deliver] = {}
        self._is_closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="bdh-engine", daemon=True)
        self._thread.start()

    async def stream(
        self,
        prompt: Prompt | None,
        params: SamplingParams | None = None,
        *,
        snapshot: Snapshot | None = None,
        keep_snapshot: bool = False,
    ) -> AsyncIterator[StepOutput]:
        """The outputs of a request as they come. Leaving the loop, or cancelling the task, aborts it within a step.

        Raises:
            ValueError: as :meth:`Engine.add_request`.
            RuntimeError: the engine is closed, or has failed.
        """
        params = params or SamplingParams()
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[StepOutput | BaseException]()
        taken_up: asyncio.Future[None] = loop.create_future()
        numbers: list[int] = []  # the request's, once the thread has taken it up

        def add() -> None:
            try:
                request_id = self.engine.add_request(prompt, params, snapshot=snapshot, keep_snapshot=keep_snapshot)
            except Exception as error:
                _call_soon(loop, _set, taken_up, error)
                return
            numbers.append(request_id)
            self._receivers[request_id] = lambda item: _call_soon(loop, queue.put_nowait, item)
            _call_soon(loop, _set, taken_up, None)

        def abort() -> None:  # carried out behind `add`
            for request_id in numbers:
                self._receivers.pop(request_id, None)
                self.engine.abort(request_id)

        self._order(add)
        num_ended = 0
        try:
            await taken_up
            while num_ended < params.n:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise RuntimeError(f"the engine has failed: {item}") from item
                num_ended += item.completion is not None
                yield item
        finally:
            if num_ended < params.n and self._failure is None:
                self._order(abort, is_wanted_always=True)

    async def generate(
        self, prompt: Prompt | None, params: SamplingParams | None = None, **arguments: Any
    ) -> list[Completion]:
        """The continuations of a prompt. Arguments and errors are those of :meth:`stream`."""
        found: dict[int, Completion] = {}
        async for output in self.stream(prompt, params, **arguments):
            if output.completion is not None:
                found[output.index] = output.completion
        return [found[index] for index in sorted(found)]

    def close(self) -> None:
        """Ends the thread after its present step; requests that still run end with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

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
                    self._changed.wait_for(lambda: self._orders or self._is_closed or self.engine.has_work)
                    if self._is_closed:
                        break
                    orders = list(self._orders)
                    self._orders.clear()
                for order in orders:
                    order()
                for output in self.engine.step() if self.engine.has_work else ():
                    if receiver := self._receivers.get(output.request_id):
                        receiver(output)
                self._drop_ended()
        except BaseException as error:
            failure = error
        with self._changed:
            self._failure = failure
            orders = list(self._orders)
        for order in orders:  # those that have just come are told what happened, like all others
            order()
        for receiver in self._receivers.values():
            receiver(failure)
        self._receivers.clear()

    def _drop_ended(self) -> None:
        for request_id in [each for each in self._receivers if not self.engine.knows(each)]:
            del self._receivers[request_id]


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop has been closed: nobody waits any more
        if not loop.is_closed():
            raise


def _set(future: "asyncio.Future[None]", error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
