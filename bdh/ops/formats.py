"""The formats of quantized weights: the layout in memory, and rounding to the nearest.

A *row* holds the D weights of a neuron. The CPU kernels read rows in these formats directly:

    int8   D codes of -127 to 127, int8; then the row's scale, bfloat16
    int4   for each GROUP of weights, the last of which is padded: its scale, bfloat16; then 16 bytes, of which byte i
           holds the code of weight i, plus 8, in its lower half, and that of weight 16 + i in its upper half

A weight is its code times its scale. Both have at most 8 significant bits, so that the product is exact in float32.
"""

from typing import Literal, NamedTuple

import torch

from bdh.ops import QuantizedFormat, WeightFormat

MatrixFormat = Literal["float32", "bfloat16"] | QuantizedFormat
"""The format of one matrix."""

GROUP = 32
"""The number of weights that share a scale in int4."""
_HALF = GROUP // 2
CODE_RANGES: dict[QuantizedFormat, tuple[int, int]] = {"int8": (-127, 127), "int4": (-8, 7)}
"""The smallest and largest code of each format."""
SCALE_BYTES = 2
BLOCK_BYTES = SCALE_BYTES + _HALF
"""The size of a group in int4, in bytes."""
_ROWS_AT_ONCE = 1024
# Each group of int4 uses the best of these as the magnitude to which its largest weight is scaled; its code is about
# -8, whatever the weight's sign. Errors of a trained model's weights: (8,) 7.5e-3, (7, 8) 7.3e-3, these 6.9e-3.
_INT4_RANGES = (7.0, 7.5, 8.0, 8.5, 9.0)


class Codes(NamedTuple):
    """Rounded weights: integer codes and their scales."""

    codes: torch.Tensor
    """int8 (rows, D)."""
    scales: torch.Tensor
    """bfloat16 (rows, groups): one for each row in int8, one for each GROUP of weights in int4."""

    def dequantized(self) -> torch.Tensor:
        """Returns the weights, float32 (rows, D)."""
        scales = self.scales.float()
        if scales.shape[1] == 1:
            return self.codes.float().mul_(scales)
        return _in_groups(self.codes.float()).mul_(scales[:, :, None]).flatten(1)[:, : self.codes.shape[1]]


class LayerFormats(NamedTuple):
    """The formats of E, Ev, Dec and the head."""

    encoder: MatrixFormat
    encoder_v: MatrixFormat
    decoder: MatrixFormat
    lm_head: MatrixFormat


def layer_formats(weights: WeightFormat) -> LayerFormats:
    """Returns the format of each matrix for a format of a model's weights.

    Quantized formats leave the head unchanged: it takes a small part of a token's time, and its errors would directly
    be errors of the logits.
    """
    match weights:
        case "int8":
            return LayerFormats("int8", "int8", "int8", "float32")
        case "int4":
            return LayerFormats("int4", "int4", "int4", "float32")
        case "mixed":
            return LayerFormats("int8", "int4", "int4", "float32")
    return LayerFormats(weights, weights, weights, weights)


class Rows(NamedTuple):
    """A matrix as the kernels read it from memory, with a row for each neuron or vocabulary entry."""

    tensor: torch.Tensor
    """Float (rows, D), or packed uint8 (rows, row_bytes)."""
    format: MatrixFormat

    @classmethod
    def of(cls, weight: torch.Tensor, format: MatrixFormat, name: str = "the matrix") -> "Rows":
        """Converts a matrix (rows, D) to a format. It is not copied if it has the format already.

        Raises:
            ValueError: the format is quantized, and a weight is infinite or NaN.
        """
        if format == "int8" or format == "int4":
            return cls(pack(rounded(weight, format, name), format), format)
        return cls(weight.to(torch.bfloat16 if format == "bfloat16" else torch.float32).contiguous(), format)


def row_bytes(format: MatrixFormat, D: int) -> int:
    """Returns the size in bytes of a row of D weights."""
    match format:
        case "int8":
            return D + SCALE_BYTES
        case "int4":
            return -(-D // GROUP) * BLOCK_BYTES
        case "bfloat16":
            return 2 * D
    return 4 * D


def rounded(weight: torch.Tensor, format: QuantizedFormat, name: str = "the matrix") -> Codes:
    """Rounds each weight of a matrix (rows, D) to the nearest code.

    Args:
        weight: (rows, D).
        format: the format.
        name: the matrix's name, for error messages.

    Raises:
        ValueError: a weight is infinite or NaN.
    """
    weight = weight.detach().float()
    check_finite(weight, name)
    # A few rows at a time, which stay in the cache: rounding 8.4M weights to int4 takes 0.1 s instead of 1.1 s.
    some = [_codes(rows, scales_of(rows, format), format) for rows in weight.split(_ROWS_AT_ONCE)]
    return Codes(torch.cat([each.codes for each in some]), torch.cat([each.scales for each in some]))


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raises ``ValueError`` with the first weight of a matrix (rows, D) that is infinite or NaN, if there is one."""
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        value = weight[row, column].item()
        raise ValueError(f"weight {column} of row {row} of {name} is {value}: only finite weights can be rounded")


def scales_of(weight: torch.Tensor, format: QuantizedFormat) -> torch.Tensor:
    """Returns the scales for float32 weights (rows, D), bfloat16 (rows, groups)."""
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
    """Sums each group of (rows, groups, GROUP) in the same order on every device.

    If two candidate scales have nearly equal errors, rounding of these sums decides between them.
    """
    while (half := groups.shape[2] // 2) > 0:
        groups = groups[:, :, :half] + groups[:, :, half:]
    return groups


def _codes(weight: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> Codes:
    if format == "int8":
        return Codes(_divided(weight, scales).clamp_(*CODE_RANGES[format]).to(torch.int8), scales)
    codes = _divided(_in_groups(weight), scales[:, :, None]).clamp_(*CODE_RANGES[format]).to(torch.int8)
    return Codes(codes.flatten(1)[:, : weight.shape[1]], scales)


def rounded_with(weight: torch.Tensor, scales: torch.Tensor, format: QuantizedFormat) -> Codes:
    """Rounds finite weights (rows, D) with given scales, bfloat16 (rows, groups)."""
    return _codes(weight.detach().float(), scales, format)


def _in_groups(weight: torch.Tensor) -> torch.Tensor:
    """Splits rows into groups, (rows, groups, GROUP), the last of which is padded with 0."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _divided(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Divides weights by their scales and rounds; 0 for a scale of 0, which a row or group of zeros has."""
    wide = scales.float()
    return (weight / torch.where(wide == 0, 1.0, wide)).round_()


def pack(rounded: Codes, format: QuantizedFormat) -> torch.Tensor:
    """Packs codes and scales into uint8 (rows, row_bytes)."""
    codes, scales = rounded
    scale_bytes = scales.contiguous().view(torch.uint8)
    if format == "int8":
        return torch.cat([codes.view(torch.uint8), scale_bytes], dim=1)
    nibbles = (_in_groups(codes) + 8).view(torch.uint8)  # (rows, groups, GROUP)
    halves = nibbles[:, :, :_HALF] | (nibbles[:, :, _HALF:] << 4)
    return torch.cat([scale_bytes.unflatten(1, (-1, SCALE_BYTES)), halves], dim=2).flatten(1)


def unpack(packed: torch.Tensor, D: int, format: QuantizedFormat) -> Codes:
    """Unpacks the codes and scales of uint8 (rows, row_bytes).

    Raises:
        ValueError: the rows do not have the length for D weights.
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
