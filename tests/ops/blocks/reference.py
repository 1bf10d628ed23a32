"""The wide part of a pass by the plain equations, and what the tests of the blocks compare."""

from dataclasses import dataclass

import torch

from bdh.ops import naive
from bdh.ops.attention import DecayMask, make_rotation
from bdh.ops.backends import LayerWeights
from bdh.ops.blocks.block import Dropout, is_kept, make_dropout
from bdh.ops.blocks.train import BlockSizes, BlockSpec, wide_step

THETA, EPS = 2.0**16, 1e-5


@dataclass
class Case:
    """A pass: its sizes, and what it is asked for."""

    T: int
    D: int
    H: int
    N: int
    B: int = 2
    dropout: float = 0.0
    state: bool = False
    half_lives: tuple[float, ...] | None = None
    starts: bool = False
    padding: bool = False
    rows: int = 1
    columns: int | None = None
    keep_wide: bool = False
    keep_scores: bool = False
    path: str = "torch"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        B, T, D, H, N = self.B, self.T, self.D, self.H, self.N

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(self.dtype)

        self.v = draw(B, T, D).requires_grad_()
        self.encoder = draw(H, D, N, scale=D**-0.5).requires_grad_()
        self.encoder_v = draw(H, D, N, scale=D**-0.5).requires_grad_()
        self.decoder = draw(H * N, D, scale=D**-0.5).requires_grad_()
        self.first = draw(B, H, N, D).requires_grad_() if self.state else None
        self.grad_out, self.grad_state = draw(B, T, D), draw(B, H, N, D)
        self.lives = None if self.half_lives is None else torch.tensor(self.half_lives, dtype=self.dtype)
        self.mask = torch.ones(B, T, dtype=torch.bool)
        if self.padding:
            self.mask[0, : T // 3] = False
        starts = torch.rand(B, T, generator=generator) < 4 / T
        self.document_starts = starts if self.starts else None
        self.positions = torch.arange(T).expand(B, T)
        if self.starts or self.padding:  # each sequence has its own then
            first = torch.where(starts, self.positions, 0).cummax(1).values
            self.positions = (self.positions - first + 3 * torch.arange(B)[:, None]).clamp(max=T)

    @property
    def inputs(self):
        found = [self.v, self.encoder, self.encoder_v, self.decoder]
        return found if self.first is None else [*found, self.first]

    @property
    def keeps_state(self):
        return self.state or self.half_lives is not None

    def mask_of_dropout(self) -> Dropout | None:
        if not self.dropout:
            return None
        return make_dropout(self.dropout, torch.tensor(123456789012345), self.H * self.N, self.B, self.T)

    def decay_mask(self) -> DecayMask | None:
        if self.lives is None and self.document_starts is None:
            return None
        return DecayMask(self.document_starts, self.lives, self.mask if self.padding else None)

    def spec(self) -> BlockSpec:
        return BlockSpec(
            eps=EPS,
            rotation=make_rotation(
                self.positions if self.starts or self.padding else self.positions[:1], self.N, THETA, self.dtype
            ),
            sizes=BlockSizes(self.rows, self.columns or self.T),
            backend={"torch": "blocks", "kernels": "cpu"}[self.path],
            decay_mask=self.decay_mask(),
            dropout=self.mask_of_dropout(),
            keep_state=self.keeps_state,
            keep_wide=self.keep_wide,
            keep_scores=self.keep_scores,
        )

    def by_blocks(self, spec: BlockSpec | None = None):
        """The output and the new state."""
        encoder = self.encoder.transpose(1, 2).reshape(self.H * self.N, self.D)
        encoder_v = tuple(head.t().contiguous() for head in self.encoder_v)
        values = self.v * self.mask[..., None].to(self.dtype)
        return wide_step(values, LayerWeights(encoder, encoder_v, self.decoder), spec or self.spec(), self.first)

    def by_equations(self):
        """The same, from ``bdh/ops/naive.py``."""
        x = torch.relu(self.v[:, None] @ self.encoder) * self.mask[:, None, :, None].to(self.dtype)
        q = torch.stack([naive.rope(row, at, THETA) for row, at in zip(x, self.positions, strict=True)])
        values = self.v * self.mask[..., None].to(self.dtype)
        state = None
        if self.first is None and self.decay_mask() is None:
            a = naive.attention(q, values)
        else:
            a, state = naive.attention_by_state(
                q, values, self.first, starts=self.document_starts, half_lives=self.lives, mask=self.mask
            )
        z = x * torch.relu(naive.layer_norm(a, EPS) @ self.encoder_v)
        dropout = self.mask_of_dropout()
        if dropout is not None:
            mask = is_kept(dropout, dropout.neuron_keys, dropout.token_keys).to(self.dtype) * dropout.scale
            z = z * mask.view(self.H, self.N, self.B, self.T).permute(2, 0, 3, 1)
        return z.transpose(1, 2).reshape(self.B, self.T, -1) @ self.decoder, state if self.keeps_state else None

    def found(self, output):
        """The output, the new state, and the gradients of all inputs."""
        out, state = output
        loss = (out * self.grad_out.to(out.dtype)).sum()
        if state is not None:
            loss = loss + (state * self.grad_state.to(state.dtype)).sum()
        gradients = torch.autograd.grad(loss, self.inputs)
        return [out.detach(), *([state.detach()] if state is not None else []), *gradients]


def differences(found, expected) -> list[float]:
    """The largest difference of each pair of tensors, as a share of the largest number in the second."""
    assert len(found) == len(expected)
    assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
    pairs = zip(found, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs]
