"""The rotation of queries and keys, exact at any position a text can reach.

A pair's phase is ``position * frequency`` turns, of which only the fraction counts. In float32 that product
has lost a 64th of a turn at position 10^6; in float64 it is good to 4e-8 of a turn at position 10^9. So the
fraction is taken in float64 and only then rounded.
"""

import math
from typing import NamedTuple

import torch


def turns_per_token(num_neurons: int, theta: float, device: torch.device | str = "cpu") -> torch.Tensor:
    """The frequency of each pair of a head's N neurons, in turns per token: float64, (N/2,)."""
    if torch.compiler.is_exporting():  # ONNX rounds the numbers in a program to float32, but not its tensors
        turns = [theta ** (-2 * i / num_neurons) / (2 * math.pi) for i in range(num_neurons // 2)]
        return torch.tensor(turns, dtype=torch.float64, device=device)
    pair = torch.arange(num_neurons // 2, dtype=torch.float64, device=device)
    return theta ** (-2 * pair / num_neurons) / (2 * math.pi)


def rotation_table(
    positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The rotation of every pair at every position, as unit complex numbers.

    Args:
        positions: int64, (...,): absolute positions.
        num_neurons: N, the neurons of one head.
        dtype: float64 gives complex128; everything else gives complex64, since half-precision phases would
            be off by a hundredth of a turn.

    Returns:
        (..., N/2) complex; while torch.compile or torch.export traces, (..., N/2, 2), cosine and sine: their backends,
        ONNX among them, know no complex numbers.
    """
    device = positions.device
    # MPS has no float64: the table is small, so it is made on the CPU there.
    exact_device = torch.device("cpu") if device.type == "mps" else device
    frequencies = turns_per_token(num_neurons, theta, exact_device)
    turns = torch.remainder(positions.to(exact_device)[..., None].double() * frequencies, 1.0)
    angles = (2 * math.pi * turns).to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    if torch.compiler.is_compiling():
        return torch.stack((angles.cos(), angles.sin()), dim=-1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i + 1) of ``x`` (..., N): (a, b) goes to (a cos - b sin, b cos + a sin).

    That is a complex product, which one sweep over memory computes where the written-out form takes six, unless it is
    compiled.

    Args:
        table: from :func:`rotation_table`, broadcast against x's pairs.

    Returns:
        A tensor of x's shape and dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = wide.unflatten(-1, (-1, 2))
    if table.is_complex():
        return torch.view_as_real(torch.view_as_complex(pairs) * table).flatten(-2).to(x.dtype)
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


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
            int64 (runs + 1,): the first token of each, and the number of tokens after them; int64 (runs,): its column.
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


def make_rotation(
    positions: torch.Tensor, num_neurons: int, theta: float, dtype: torch.dtype, *, bound: int | None = None
) -> Rotation:
    """The table at absolute ``positions``, int64 (1 or B, T), in float64 for that ``dtype`` and else in float32.

    Args:
        bound: all positions are below it, where that is known: a GPU then need not be waited for.
    """
    places = None
    if len(positions) > 1:
        if bound is None or positions.device.type == "cpu":
            positions, places = torch.unique(positions, return_inverse=True)
        else:  # how many differ is not known here before the device has got so far
            positions, places = torch.arange(bound, device=positions.device), positions
    table = rotation_table(positions.flatten(), num_neurons, theta, dtype).t()
    return Rotation(table.real.contiguous(), table.imag.contiguous(), places)
