"""States of running sequences: as many as their bytes allow, made when they are first needed, and used again."""

from bdh.generate.stepper import SequenceState, Stepper


class StatePool:
    """Hands out states. None is made beyond ``max_bytes``, so none is missing in mid-generation."""

    def __init__(self, stepper: Stepper, max_bytes: int):
        self._stepper = stepper
        self.max_bytes = max_bytes
        self.capacity = max_bytes // stepper.state_bytes
        """States that fit."""
        self.num_reserved = 0
        """States that are in use, or promised to a request."""
        self._free: list[SequenceState] = []

    @property
    def bytes_reserved(self) -> int:
        return self.num_reserved * self._stepper.state_bytes

    def reserve(self, count: int) -> bool:
        """Promises so many states, if they fit beside those that are promised already."""
        if self.num_reserved + count > self.capacity:
            return False
        self.num_reserved += count
        return True

    def take(self, *, copy_of: SequenceState | None = None) -> SequenceState:
        """One of the promised states: empty, or a copy."""
        state = self._free.pop() if self._free else self._stepper.new_state()
        if copy_of is not None:
            state.copy_(copy_of)
        elif state.position or state.is_torn:
            state.clear()
        return state

    def give_back(self, state: SequenceState | None) -> None:
        """A promised state is needed no more; None for one that was never taken, or whose content is unknown."""
        self.num_reserved -= 1
        if state is not None and not state.is_torn:
            self._free.append(state)
