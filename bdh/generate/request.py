"""A request on its way through an engine."""

from collections.abc import Callable

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput
from bdh.generate.sequence import Sequence as Running
from bdh.generate.snapshot import Snapshot
from bdh.model.fingerprint import WeightsMark


class Request:
    """A request: one sequence that reads the prompt, and later its further continuations."""

    def __init__(self, request_id: int, first: Running, make: Callable[[int], Running], snapshot: Snapshot | None):
        self.id, self.snapshot = request_id, snapshot
        self.sequences = [first]
        self.make = make
        self.places: set[int] = set()  # where the state on the way through the prompt is stored
        self.weights: WeightsMark | None = None  # of those that began to read it, where there are such places
        self.ended: set[int] = set()  # continuations whose last output is among the engine's

    @property
    def params(self) -> SamplingParams:
        return self.sequences[0].params

    @property
    def num_reserved(self) -> int:
        """Continuations that have not ended: each has a state, or will get one."""
        return self.params.n - len(self.ended)

    @property
    def is_done(self) -> bool:
        return len(self.ended) == self.params.n

    def failed(self, index: int, error: str) -> StepOutput:
        """The end of a continuation that may not have begun, and cannot even finish its text."""
        completion = Completion("", [], "error", error=error, num_prompt_tokens=self.sequences[0].num_before)
        if index < len(self.sequences):
            sequence = self.sequences[index]
            completion.text, completion.token_ids = sequence.text, sequence.tokens[sequence.num_before :]
            sequence.completion = completion
        return StepOutput(self.id, index, completion=completion)
