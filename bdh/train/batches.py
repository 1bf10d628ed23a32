"""The sequences of each step, prepared by a thread while the step before runs, and the states carried between steps."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bdh.data.corpus import Batch, Loader, join_states
from bdh.distributed.world import World
from bdh.model import BDHForCausalLM, SynapticState


class DataStopped(ValueError):
    """The sequences of the next step cannot be read, on this process or on another; the step has not begun."""


class Batches:
    """The sequences of this process, step by step.

    Within :meth:`prepared_ahead` a thread reads, tokenizes and packs those of the next step while this one runs. The position
    that is stored is always that of the sequences that were handed out.
    """

    def __init__(self, loader: Loader, world: World, *, is_streaming: bool, pin_memory: bool):
        """
        Args:
            is_streaming: whether the text is read from its source, which may be damaged for one process and not for another.
            pin_memory: so that a GPU copies the sequences while it computes.
        """
        self._loader, self._world, self._is_streaming, self._pin_memory = loader, world, is_streaming, pin_memory
        self._requests: SimpleQueue[Future[None] | None] | None = None
        self._prepared: Future[None] | None = None

    @contextmanager
    def prepared_ahead(self) -> Iterator[None]:
        """Within it, the next sequences are prepared in the background."""
        requests: SimpleQueue[Future[None] | None] = SimpleQueue()

        def work() -> None:
            while (future := requests.get()) is not None:
                try:
                    self._prepare()
                    future.set_result(None)
                except BaseException as error:  # for the training's own thread
                    future.set_exception(error)

        # A daemon: should the training end by an error while another process is waited for, this one ends all the same.
        threading.Thread(target=work, daemon=True, name="batches").start()
        self._requests = requests
        self._prepare_next()
        try:
            yield
            if self._prepared is not None:
                self._prepared.exception()  # waits
                self._prepared = None
        finally:
            self._requests = None
            requests.put(None)

    def next(self) -> Batch:
        """The sequences of the next step.

        Raises:
            DataStopped: some process cannot read its own; all raise it, and :meth:`state_dict` is from where they can be
                read once the text is mended.
        """
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            self._prepare()
        else:
            prepared.result()
        batch = self._loader.next()
        self._prepare_next()
        return batch.pinned() if self._pin_memory else batch

    def state_dict(self) -> dict[str, Any]:
        """The position after what was handed out, of all processes, which call this together."""
        if self._prepared is not None:
            self._prepared.exception()  # waits for the thread, which may be moving the loader
        return join_states(self._world.gather(self._loader.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ValueError`` where the state is that of another kind of loader. Not while batches are prepared ahead."""
        self._loader.load_state_dict(state)

    def _prepare_next(self) -> None:
        if self._requests is not None:
            self._prepared = Future()
            self._requests.put(self._prepared)

    def _prepare(self) -> None:
        """Prepares the next sequences. Raises ``DataStopped`` on all processes, if some process cannot."""
        reason = cause = None
        try:
            self._loader.prepare()
        except (ValueError, OSError) as error:
            cause, reason = error, str(error)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
        # The one exchange that it takes is between these threads: the steps do not wait for it.
        reasons = self._world.gather(reason, beside_training=True) if self._is_streaming else [reason]
        if there := [each for each in reasons if each is not None]:
            raise DataStopped(there[0]) from cause


class CarriedState:
    """The states of this process's sequences between two steps, one for each micro-batch.

    A step continues from them; gradients end at its first token (truncated backpropagation through time, a block long).
    """

    def __init__(self, model: BDHForCausalLM, num_micro_batches: int, batch_size: int):
        self._model = model
        self._batch_size = batch_size
        self._states = [model.new_state(batch_size) for _ in range(num_micro_batches)]

    def before(self, index: int) -> SynapticState:
        """What micro-batch ``index`` of a step continues from. ``forward`` leaves it alone until :meth:`keep`."""
        state = self._states[index]
        return SynapticState(list(state.sums), state.positions, state.num_columns)

    def keep(self, index: int, state: SynapticState) -> None:
        """Takes over the state after micro-batch ``index``, without its graph."""
        self._states[index] = state.detach()

    def forget(self, when: torch.Tensor) -> None:
        """Starts all sequences afresh if ``when``, bool (): the state after a loss that is not finite would spoil all steps."""
        if when.device.type == "cpu":
            if when:
                self._states = [self._model.new_state(self._batch_size) for _ in self._states]
            return
        for state in self._states:
            for tensor in (*state.sums, state.positions):
                tensor.masked_fill_(when, 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of all sequences in one: "sums.0" ..., (B, H, N, D) of each layer step, and "positions" (B,)."""
        state = SynapticState.concat(self._states)
        return {f"sums.{index}": sums for index, sums in enumerate(state.sums)} | {"positions": state.positions}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over what :meth:`tensors` gave, or the share of it that belongs to this process."""
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        sums = [local[f"sums.{index}"] for index in range(len(local) - 1)]
        whole = SynapticState(sums, local["positions"], 0)
        numbers = torch.arange(whole.batch_size).split(self._batch_size)
        self._states = [whole.filter(numbers_of_one) for numbers_of_one in numbers]
