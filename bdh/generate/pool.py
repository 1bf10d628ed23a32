"""States of running sequences: as many as their bytes allow, made when they are first needed, and used again."""

from bdh.generate.stepper import SequenceState, Stepper


class StatePool:
    """Hands out states. None is made beyond ``max_bytes``, so none is missing in mid-generation."""

    def __init__(self, stepper: Stepper, max_bytes: int):
        self._stepper = stepper
        self.max_bytes = max_bytes
        self.capacity = max_bytes // stepper.state_bytes
        """States that fit."""
        self._free: list[SequenceState] = []

    def take(self, *, copy_of: SequenceState | None = None) -> SequenceState:
        """A state, empty or a copy. For the engine to ask for no more than there is capacity for."""
        state = self._free.pop() if self._free else self._stepper.new_state()
        if copy_of is not None:
            state.copy_(copy_of)
        elif state.position or state.is_torn:
            state.clear()
        return state

    def give_back(self, state: SequenceState) -> None:
        """A state is needed no more. One whose content is unknown is dropped."""
        if not state.is_torn:
            self._free.append(state)
