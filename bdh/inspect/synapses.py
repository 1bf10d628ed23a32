"""How strongly the state connects two neurons while a text is read.

The paper (arXiv 2509.26507) describes the state as synapses, which strengthen between neurons that fire together, and reports
single ones that do so where a text is about one concept. S holds them by the D directions of the residual stream: multiplied with the
weights of a neuron it gives the strength of the synapses to that neuron.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bdh.inspect.tracing import chosen, observe, token_ids
from bdh.model.weights import checked_layer_weights
from bdh.ops.attention import rotate, rotation_table


@dataclass(frozen=True, eq=False)
class SynapseTrace:
    """See :func:`synapse_trace`. Float64, on the CPU."""

    head: int
    layer_step: int
    source: int
    target: int
    strength: torch.Tensor
    """(T,): before each token is taken in."""
    shuffled: torch.Tensor
    """(orders, T): the same where the tokens stand in random order."""

    @property
    def shuffled_mean(self) -> torch.Tensor:
        """(T,): over the random orders."""
        return self.shuffled.mean(0)

    @property
    def shuffled_spread(self) -> torch.Tensor:
        """(T,): the standard deviation among the random orders."""
        return self.shuffled.std(0)


def synapse_trace(
    model: Any,
    ids: Sequence[int] | torch.Tensor,
    head: int,
    layer_step: int,
    source: int,
    target: int,
    *,
    num_shuffles: int = 8,
    seed: int = 0,
) -> SynapseTrace:
    """How strongly neuron ``source``, if it fired with 1 at token t, would drive neuron ``target`` through the state:

        (R_t e_source)^T S_t Ev_target

    with R_t the rotation at t, S_t the state that t reads, and Ev_target the weights (D,) of the target. That is before the layer
    norm of what attention reads, which scales all that a token reads alike. What is due to which tokens the text has, and not
    to their order, is there in the same text in random order, too.

    Args:
        ids: of the tokens of a text, (T,).
        source: a neuron of the head, and ``target`` another or the same.
        num_shuffles: random orders to compare with.
        seed: of these.

    Raises:
        ValueError: a number is out of range, or the layer is more than its weights; or as :func:`bdh.inspect.trace`.
    """
    config, tokens = model.config, token_ids(ids)
    (head,) = chosen("head", head, config.n_head, "head")
    (layer_step,) = chosen("layer_step", layer_step, config.n_layer, "layer step")
    (source,) = chosen("source", source, config.neurons_per_head, "neuron")
    (target,) = chosen("target", target, config.neurons_per_head, "neuron")
    if num_shuffles < 2:
        raise ValueError(f"num_shuffles is {num_shuffles}: must be at least 2, whose spread can be told")
    driven = checked_layer_weights(model, model.dtype).encoder_v[head][target].double().cpu()  # (D,)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(tokens), generator=generator) for _ in range(num_shuffles)]
    strength, *shuffled = (
        _strengths(model, each, head, layer_step, source, driven)
        for each in (tokens, *(tokens[order] for order in orders))
    )
    return SynapseTrace(head, layer_step, source, target, strength, torch.stack(shuffled))


def _strengths(
    model: Any, ids: torch.Tensor, head: int, layer_step: int, source: int, driven: torch.Tensor
) -> torch.Tensor:
    """(T,). Of the state only the two rows of the source's pair count, and of these the product with the target's weights (D,)."""
    config, T, pair = model.config, len(ids), source // 2
    queries, keys = torch.empty(2, T, 2, dtype=torch.float64)
    values = torch.empty(T, dtype=torch.float64)  # products with the target's weights
    unit = torch.eye(2, dtype=torch.float64)[source % 2]

    def on_keys(step: int, tokens: slice, q: torch.Tensor) -> None:
        if step == layer_step:
            keys[tokens] = q[head, :, 2 * pair : 2 * pair + 2].double().cpu()
            positions = torch.arange(tokens.start, tokens.stop)
            table = rotation_table(positions, config.neurons_per_head, config.rope_theta, torch.float64)
            queries[tokens] = rotate(unit.expand(len(positions), 2), table[:, pair : pair + 1])

    def on_values(step: int, tokens: slice, v: torch.Tensor) -> None:
        if step == layer_step:  # that before it
            values[tokens] = v.double().cpu() @ driven

    observe(model, ids, {"q": on_keys, "v": on_values})
    kept = 1.0 if config.half_lives is None else 2 ** (-1 / config.half_lives[head])
    first = second = 0.0  # the two rows' products with the target's weights
    strengths = []
    for query, key, value in zip(queries.tolist(), keys.tolist(), values.tolist(), strict=True):
        strengths.append(query[0] * first + query[1] * second)
        first, second = kept * first + key[0] * value, kept * second + key[1] * value
    return torch.tensor(strengths, dtype=torch.float64)
