"""How weights are stored in fewer bits: what a neuron's row looks like in memory, and how numbers are rounded into it.

A *row* is the D weights of a neuron. The CPU's kernels read rows in these formats as they are:

    int8   D codes of -127 to 127, int8; then the row's scale, bfloat16
    int4   for each GROUP of weights, the last of which is filled up: its scale, bfloat16; then 16 bytes, of which byte i
           holds the code of weight i, plus 8, in its lower half, and that of weight 16 + i in its upper half

A weight is its code times its scale. A code has at most 8 bits and a scale 8, so that in float32 the product is exact.
"""

from typing import Literal, NamedTuple

import torch

from bdh.ops import QuantizedFormat, WeightFormat

MatrixFormat = Literal["float32", "bfloat16"] | QuantizedFormat
"""That of one matrix."""

GROUP = 32
"""Weights that share a scale in int4."""
_HALF = GROUP // 2
CODE_RANGES: dict[QuantizedFormat, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""The smallest and the largest code."""
SCALE_BYTES = 2
BLOCK_BYTES = SCALE_BYTES + _HALF
"""Of a group in int4."""
# Each group of int4 takes the best of these: the weight of the largest magnitude, whatever its sign, becomes about -8.
# By the error of a trained model's weights: (8,) 7.5e-3, (7, 8) 7.3e-3, these 6.9e-3.
_ROWS_AT_ONCE = 1024
_INT4_RANGES = (7.0, 7.5, 8.0, 8.5, 9.0)


class Codes(NamedTuple):
    """Rounded weights."""

    codes: torch.Tensor
    """int8 (rows, D)."""
    scales: torch.Tensor
    """bfloat16 (rows, groups): one of a row in int8, one for each GROUP of its weights in int4."""

    def dequantized(self) -> torch.Tensor:
        """float32 (rows, D)."""
        scales = self.scales.float()
        if scales.shape[1] == 1:
            return self.codes.float().mul_(scales)
        return _in_groups(self.codes.float()).mul_(scales[:, :, None]).flatten(1)[:, : self.codes.shape[1]]


class LayerFormats(NamedTuple):
    """Those of E, Ev and Dec, and of the head."""

    encoder: MatrixFormat
    encoder_v: MatrixFormat
    decoder: MatrixFormat
    lm_head: MatrixFormat


def layer_formats(weights: WeightFormat) -> LayerFormats:
    """What a format of a model's weights is for each of its matrices. Whole numbers leave the head as it is: of a token it
    takes little, and its errors would be those of the logits."""
    match weights:
        case "int8":
            return LayerFormats("int8", "int8", "int8", "float32")
        case "int4":
            return LayerFormats("int4", "int4", "int4", "float32")
        case "mixed":
            return LayerFormats("int8", "int4", "int4", "float32")
    return LayerFormats(weights, weights, weights, weights)


class Rows(NamedTuple):
    """A matrix neuron by neuron, or token of the vocabulary by token, as it lies in memory."""

    tensor: torch.Tensor
    """(rows, D) numbers, or uint8 (rows, row_bytes)."""
    format: MatrixFormat

    @classmethod
    def of(cls, weight: torch.Tensor, format: MatrixFormat, name: str = "the matrix") -> "Rows":
        """Of numbers (rows, D); what has the format already is not copied.

        Raises:
            ValueError: whole numbers are asked for, and a weight is infinite or not a number.
        """
        if format == "int8" or format == "int4":
            return cls(pack(rounded(weight, format, name), format), format)
        return cls(weight.to(torch.bfloat16 if format == "bfloat16" else torch.float32).contiguous(), format)


def row_bytes(format: MatrixFormat, D: int) -> int:
    """Bytes of a row of D weights."""
    match format:
        case "int8":
            return D + SCALE_BYTES
        case "int4":
            return -(-D // GROUP) * BLOCK_BYTES
        case "bfloat16":
            return 2 * D
    return 4 * D


def rounded(weight: torch.Tensor, format: QuantizedFormat, name: str = "the matrix") -> Codes:
    """Each weight of (rows, D) to the nearest code of its format; ``name`` is for messages.

    Raises:
        ValueError: a weight is infinite or not a number.
    """
    weight = weight.detach().float()
    check_finite(weight, name)
    # Some rows at a time, which stay in the cache: 8.4M weights to int4 take 0.1 s instead of 1.1.
    some = [_codes(rows, scales_of(rows, format), format) for rows in weight.split(_ROWS_AT_ONCE)]
    return Codes(torch.cat([each.codes for each in some]), torch.cat([each.scales for each in some]))


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raises ``ValueError`` for the first weight of (rows, D) that is infinite or not a number."""
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        value = weight[row, column].item()
        raise ValueError(f"weight {column} of row {row} of {name} is {value}: only finite weights can be rounded")


def scales_of(weight: torch.Tensor, format: QuantizedFormat) -> torch.Tensor:
    """bfloat16 (rows, groups), for float32 weights (rows, D)."""
    if format == "int8":
        return (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    groups = _in_groups(weight)  # (rows, groups, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # (rows, groups, 1)
    best, least = None, None
    for width in _INT4_RANGES:
        scales = (-largest / width).to(torch.bfloat16)
        errors = _sums((_divided(groups, scales).clamp_(*CODE_RANGES[format]).mul_(scales.float()) - groups).square_())
        if best is None or least is None:
            best, least = scales, errors
        else:
            best, least = torch.where(errors < least, scales, best), torch.minimum(errors, least)
    assert best is not None
    return best.squeeze(2)


def _sums(groups: torch.Tensor) -> torch.Tensor:
    """Of each group (rows, groups, GROUP), in the same order on every device: where two errors are close, the scale depends on it."""
    while (half := groups.shape[2] // 2) > 0:
        groups = groups[:, :, :half] + groups[:, :, half:]
    return groups


def _codes(weight: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> Codes:
    if format == "int8":
        return Codes(_divided(weight, scales).clamp_(*CODE_RANGES[format]).to(torch.int8), scales)
    codes = _divided(_in_groups(weight), scales[:, :, None]).clamp_(*CODE_RANGES[format]).to(torch.int8)
    return Codes(codes.flatten(1)[:, : weight.shape[1]], scales)


def rounded_with(weight: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> Codes:
    """Finite weights (rows, D) with given scales (rows, groups) in bfloat16."""
    return _codes(weight.detach().float(), scales, format)


def _in_groups(weight: torch.Tensor) -> torch.Tensor:
    """(rows, groups, GROUP), filled up with 0."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _divided(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """To the nearest whole multiple of its scale; 0 for a scale of 0, that of a row or group of zeros."""
    wide = scales.float()
    return (weight / torch.where(wide == 0, 1.0, wide)).round_()


def pack(rounded: Codes, format: QuantizedFormat) -> torch.Tensor:
    """uint8 (rows, row_bytes)."""
    codes, scales = rounded
    scale_bytes = scales.contiguous().view(torch.uint8)
    if format == "int8":
        return torch.cat([codes.view(torch.uint8), scale_bytes], dim=1)
    nibbles = (_in_groups(codes) + 8).view(torch.uint8)  # (rows, groups, GROUP)
    halves = nibbles[:, :, :_HALF] | (nibbles[:, :, _HALF:] << 4)
    return torch.cat([scale_bytes.unflatten(1, (-1, SCALE_BYTES)), halves], dim=2).flatten(1)


def unpack(packed: torch.Tensor, D: int, format: QuantizedFormat) -> Codes:
    """Of uint8 (rows, row_bytes).

    Raises:
        ValueError: the rows have another length.
    """
    if packed.shape[1] != row_bytes(format, D):
        expected = row_bytes(format, D)
        raise ValueError(f"rows of {D} weights in {format} have {expected} bytes, not {packed.shape[1]}")
    if format == "int8":
        return Codes(packed[:, :D].view(torch.int8), packed[:, D:].contiguous().view(torch.bfloat16))
    blocks = packed.unflatten(1, (-1, BLOCK_BYTES))
    scales = blocks[:, :, :SCALE_BYTES].contiguous().view(torch.bfloat16).squeeze(2)
    halves = blocks[:, :, SCALE_BYTES:]
    codes = torch.cat([halves & 15, halves >> 4], dim=2).view(torch.int8) - 8
    return Codes(codes.flatten(1)[:, :D], scales)
