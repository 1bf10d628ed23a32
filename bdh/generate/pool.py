"""States of running sequences: as many as their bytes allow, made when they are first needed, and used again."""

from bdh.generate.advance import Advancer
from bdh.model.state import SynapticState


class StatePool:
    """Hands out states. None is made beyond ``max_bytes``, so none is missing in mid-generation."""

    def __init__(self, advancer: Advancer, max_bytes: int):
        self._advancer = advancer
        self.max_bytes = max_bytes
        self.capacity = max_bytes // advancer.state_bytes
        """States that fit."""
        self._free: list[SynapticState] = []

    def take(self, *, copy_of: SynapticState | None = None) -> SynapticState:
        """A state, empty or a copy. For the engine to ask for no more than there is capacity for."""
        state = self._free.pop() if self._free else self._advancer.new_state()
        if copy_of is not None:
            state.copy_(copy_of)
        elif state.position or state.is_torn:
            state.clear()
        return state

    def give_back(self, state: SynapticState) -> None:
        """A state is needed no more. One whose content is unknown is dropped."""
        if not state.is_torn:
            self._free.append(state)
