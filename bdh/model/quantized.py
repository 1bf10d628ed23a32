"""Modules with quantized weights, which replace the ``Linear`` and ``Embedding`` modules of a model."""

import torch
from torch import nn
from torch.nn.functional import linear

from bdh.ops import QuantizedFormat
from bdh.ops.formats import Codes, pack, row_bytes, unpack


class QuantizedLinear(nn.Module):
    """A ``Linear`` without bias whose weight is stored in a format of :mod:`bdh.ops.formats`.

    The CPU kernels read ``packed`` directly. PyTorch operations dequantize it to :attr:`weight` in each call.

    Args:
        in_features: as for ``nn.Linear``.
        out_features: as for ``nn.Linear``.
        weight_format: "int8" or "int4".
        by_input: whether each row of ``packed`` belongs to an input feature, as in the decoder, whose inputs are the
            neurons. Otherwise it belongs to an output feature.
        device: of the weight, which is to be loaded into ``packed``.
    """

    packed: torch.Tensor
    """uint8 (rows, bytes of a row): one row for each output feature, or for each input feature with ``by_input``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_format: QuantizedFormat,
        *,
        by_input: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_format: QuantizedFormat = weight_format
        self.by_input = by_input
        num_rows, D = (in_features, out_features) if by_input else (out_features, in_features)
        packed = torch.zeros(num_rows, row_bytes(weight_format, D), dtype=torch.uint8, device=device)
        self.register_buffer("packed", packed)

    @classmethod
    def of(cls, rounded: Codes, weight_format: QuantizedFormat, *, by_input: bool = False) -> "QuantizedLinear":
        """Returns a module with these codes: a row for each output feature, or each input feature with ``by_input``."""
        num_rows, D = rounded.codes.shape
        sizes = (num_rows, D) if by_input else (D, num_rows)
        module = cls(*sizes, weight_format, by_input=by_input, device="meta")
        module.packed = pack(rounded, weight_format)
        return module

    @property
    def codes(self) -> Codes:
        """The codes and scales of the rows, unpacked at each access."""
        return unpack(self.packed, self.out_features if self.by_input else self.in_features, self.weight_format)

    @property
    def rows(self) -> torch.Tensor:
        """The dequantized rows, float32 (rows, D), computed at each access."""
        return self.codes.dequantized()

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32 (out_features, in_features), computed at each access."""
        return self.rows.t() if self.by_input else self.rows

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight_format}"


class QuantizedEmbedding(nn.Module):
    """An ``Embedding`` whose weight is stored in a format of :mod:`bdh.ops.formats`."""

    packed: torch.Tensor
    """uint8 (entries, bytes of a row)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        weight_format: QuantizedFormat,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight_format: QuantizedFormat = weight_format
        packed = torch.zeros(num_embeddings, row_bytes(weight_format, embedding_dim), dtype=torch.uint8, device=device)
        self.register_buffer("packed", packed)
        # An empty tensor whose dtype, which `to` changes as usual, is the dtype of the output.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output."""
        like: torch.Tensor = self._like  # type: ignore[assignment]
        return like.dtype

    @property
    def codes(self) -> Codes:
        """The codes and scales of the rows, unpacked at each access."""
        return unpack(self.packed, self.embedding_dim, self.weight_format)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight, float32 (entries, D), computed at each access."""
        return self.codes.dequantized()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = unpack(self.packed[ids.flatten()], self.embedding_dim, self.weight_format).dequantized()
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight_format}"
