"""What `forward` is given, checked and brought into one form."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bdh.model.configuration import BDHConfig
from bdh.model.state import SynapticState
from bdh.ops.attention import sum_dtype
from bdh.ops.norm import layer_norm


@dataclass(frozen=True)
class Inputs:
    """Of one forward."""

    v: torch.Tensor
    """The residual stream before the first pass, (B, T, D)."""
    mask: torch.Tensor | None
    """Bool (B, T), False for padding; None where nothing is masked."""
    starts: torch.Tensor | None
    """Bool (B, T), True for the first token of a document; None where none starts."""
    state: SynapticState | None
    """That of the text before; None where there is none."""

    @property
    def is_plain_step(self) -> bool:
        """Whether it is one token for each sequence of a state, with nothing said about it."""
        return self.state is not None and self.v.shape[1] == 1 and self.mask is None and self.starts is None


def read_inputs(
    config: BDHConfig,
    embed: nn.Module,
    *,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: SynapticState | None,
    document_starts: torch.Tensor | None,
    others: dict[str, Any],
    dtype: torch.dtype,
) -> Inputs:
    """
    Args:
        embed: the embedding.
        others: the further arguments of ``forward``; all of them must be known, and mean nothing.
        dtype: that of the model.

    Raises:
        TypeError, ValueError: as ``forward`` does.
    """
    if unknown := sorted(set(others) - {"output_attentions"}):
        raise TypeError(f"forward does not know {', '.join(unknown)}")
    if others.get("output_attentions"):
        raise ValueError("output_attentions is True: linear attention computes no weights, must be False")
    B, T = _shape(config, input_ids, inputs_embeds)
    num_earlier = past_key_values.num_columns if past_key_values is not None else 0
    mask = _new_columns(attention_mask, B, T, num_earlier)
    starts = _starts(document_starts, B, T)
    if past_key_values is not None:
        _check_state(config, past_key_values, B, dtype)
    if input_ids is not None:
        inputs_embeds = embed(_known_ids(config, input_ids, mask))
    assert inputs_embeds is not None
    return Inputs(layer_norm(inputs_embeds, config.layer_norm_eps), mask, starts, past_key_values)


def _shape(config: BDHConfig, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    """B and T."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("forward takes either input_ids or inputs_embeds: give exactly one of them")
    if input_ids is not None:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {tuple(input_ids.shape)}: must be (batch, tokens) with at least 1 token"
            )
        return input_ids.shape[0], input_ids.shape[1]
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[2] != config.n_embd:
        raise ValueError(
            f"inputs_embeds has shape {tuple(inputs_embeds.shape)}: must be (batch, tokens, "
            f"{config.n_embd}) with at least 1 token"
        )
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def _known_ids(config: BDHConfig, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Ids within the vocabulary: those of padding, which is never seen, may be any."""
    if mask is not None:
        input_ids = input_ids.masked_fill(~mask, 0)
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        lowest, highest = input_ids.min().item(), input_ids.max().item()
        if lowest < 0 or highest >= config.vocab_size:
            raise ValueError(
                f"input_ids has ids from {lowest} to {highest}: must be within 0 to {config.vocab_size - 1}, the "
                "model's vocabulary; others may only stand where attention_mask is 0"
            )
    return input_ids


def _new_columns(attention_mask: torch.Tensor | None, B: int, T: int, num_earlier: int) -> torch.Tensor | None:
    """The part of a mask that belongs to the T new columns, as bool (B, T); None where nothing is masked."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) not in [(B, T), (B, num_earlier + T)]:
        earlier = f" or, with the columns fed before, {(B, num_earlier + T)}" if num_earlier else ""
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be {(B, T)}{earlier}")
    mask = attention_mask[:, -T:].bool()
    # A mask costs one more sweep over the neurons, and a rotation for each row.
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _starts(document_starts: torch.Tensor | None, B: int, T: int) -> torch.Tensor | None:
    if document_starts is None:
        return None
    if tuple(document_starts.shape) != (B, T) or document_starts.dtype != torch.bool:
        raise ValueError(
            f"document_starts is {document_starts.dtype} of shape {tuple(document_starts.shape)}: must be bool "
            f"{(B, T)}, that of the tokens"
        )
    return document_starts


def _check_state(config: BDHConfig, state: SynapticState, B: int, dtype: torch.dtype) -> None:
    expected = (B, config.n_head, config.neurons_per_head, config.n_embd)
    shapes = [tuple(s.shape) for s in state.sums]  # no set: torch.export's sizes are symbols, which have no hash
    if shapes != [expected] * config.n_layer:
        raise ValueError(
            f"the state has sums of shapes {sorted(set(shapes))} for {len(state.sums)} passes: this model and batch "
            f"need {expected} for {config.n_layer}"
        )
    dtypes = {s.dtype for s in state.sums}
    if dtypes != {sum_dtype(dtype)}:
        raise ValueError(
            f"the state has sums in {', '.join(sorted(map(str, dtypes)))}: a model in {dtype} keeps them in "
            f"{sum_dtype(dtype)}"
        )
