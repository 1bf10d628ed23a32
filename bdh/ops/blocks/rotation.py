"""The rotation's table for a whole forward pass, neuron by neuron."""

from typing import NamedTuple

import torch

from bdh.ops.rope import rotation_table


class Rotation(NamedTuple):
    """Cosine and sine of each pair's phase at each position that occurs, and where the tokens stand among these.

    Documents and padding give each sequence positions of its own, but few that no other has: a table of all tokens would
    be as wide as the neurons.
    """

    cos: torch.Tensor  # (N/2, positions)
    sin: torch.Tensor
    places: torch.Tensor | None  # int64 (B, T): the column of each token; None where token t's is t in all sequences

    def of_block(self, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for some sequences and tokens, (N/2, 1 or G, C)."""
        if self.places is None:
            # Not views: code compiled for one offset in memory is compiled again for another.
            return self.cos[:, None, columns].contiguous(), self.sin[:, None, columns].contiguous()
        places = self.places[rows, columns]
        return self.cos[:, places], self.sin[:, places]

    def runs(self, rows: slice, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The stretches of a block's G * C tokens that stand side by side in the table, none of two sequences.

        Returns:
            int64 (runs + 1,): the first token of each, and the number of tokens behind them; int64 (runs,): its column.
        """
        G, C = rows.stop - rows.start, columns.stop - columns.start
        if self.places is None:
            return torch.arange(G + 1, device="cpu") * C, torch.full((G,), columns.start, device="cpu")
        places = self.places[rows, columns].flatten()
        begins = torch.ones_like(places, dtype=torch.bool)
        begins[1:] = places[1:] != places[:-1] + 1
        begins[::C] = True
        starts = begins.nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([G * C])]), places[starts]


def make_rotation(positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The table at absolute ``positions``, int64 (1 or B, T), in float64 for that ``dtype`` and else in float32."""
    places = None
    if len(positions) > 1:
        positions, places = torch.unique(positions, return_inverse=True)
    table = rotation_table(positions.flatten(), num_neurons, theta, dtype).t()
    return Rotation(table.real.contiguous(), table.imag.contiguous(), places)
