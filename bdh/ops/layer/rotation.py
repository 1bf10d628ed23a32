"""The rotation's table for a whole forward pass, neuron by neuron."""

from typing import NamedTuple

import torch

from bdh.ops.rope import rotation_table


class Rotation(NamedTuple):
    """Cosine and sine of each pair's phase at each token: (1 or B, N/2, T), one row where all stand alike."""

    cos: torch.Tensor
    sin: torch.Tensor

    def of_block(self, rows: slice, columns: slice) -> "Rotation":
        """Views of the part of some sequences and tokens."""
        rows = rows if len(self.cos) > 1 else slice(0, 1)
        return Rotation(self.cos[rows, :, columns], self.sin[rows, :, columns])


def make_rotation(positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The table at absolute ``positions``, int64 (1 or B, T), in float64 for that ``dtype`` and else in float32."""
    table = rotation_table(positions, num_neurons, theta, dtype).transpose(-1, -2)
    return Rotation(table.real.contiguous(), table.imag.contiguous())
