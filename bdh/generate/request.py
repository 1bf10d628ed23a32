"""A request on its way through an engine."""

from collections.abc import Callable

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Sequence as Running
from bdh.generate.snapshot import Snapshot


class Request:
    """A request: one sequence that reads the prompt, and later its further continuations."""

    def __init__(self, request_id: int, first: Running, make: Callable[[int], Running], snapshot: Snapshot | None):
        self.id, self.snapshot = request_id, snapshot
        self.sequences = [first]
        self.make = make
        self.num_reserved = first.params.n
        self.places: set[int] = set()  # where the state on the way through the prompt is stored

    @property
    def params(self) -> SamplingParams:
        return self.sequences[0].params

    @property
    def is_done(self) -> bool:
        return len(self.sequences) == self.params.n and all(s.completion for s in self.sequences)
