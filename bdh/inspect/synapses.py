"""Measures the strength of a synapse: how strongly the state connects two neurons while a text is read.

The paper (arXiv 2509.26507) describes the state as synapses that strengthen between neurons that fire together, and
reports single synapses that do so while a text is about one concept. The state S stores them by the D directions of the
residual stream. Its product with the weights of a neuron is the strength of the synapses to this neuron.
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
    """The result of :func:`synapse_trace`. Float64, on the CPU."""

    head: int
    layer_step: int
    source: int
    target: int
    strength: torch.Tensor
    """(T,): the strength before each token is read."""
    shuffled: torch.Tensor
    """(orders, T): the same with the tokens in random order."""

    @property
    def shuffled_mean(self) -> torch.Tensor:
        """(T,): the mean over the random orders."""
        return self.shuffled.mean(0)

    @property
    def shuffled_spread(self) -> torch.Tensor:
        """(T,): the standard deviation over the random orders."""
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
    """Measures how strongly one neuron would drive another through the state, at each token of a text.

    The strength at token t is what neuron ``source``, if it fired with activation 1, would add to neuron ``target``:

        (R_t e_source)^T S_t Ev_target

    where R_t is the rotation at t, S_t the state that t reads, and Ev_target the weights (D,) of the target. It is
    computed before the layer norm of the attention output, which scales everything that a token reads by the same
    factor. Effects of which tokens the text contains, rather than of their order, also appear in the text in random
    order, which is the baseline.

    Args:
        model: as for :func:`bdh.inspect.trace`.
        ids: the token ids of a text, (T,).
        head: the head.
        layer_step: the layer step.
        source: a neuron of the head.
        target: a neuron of the head, which can be the same.
        num_shuffles: the number of random orders.
        seed: the seed of the random orders.

    Raises:
        ValueError: a number is out of range, the layer computes more than products with its weights; or as
            :func:`bdh.inspect.trace`.
    """
    config, tokens = model.config, token_ids(ids)
    (head,) = chosen("head", head, config.n_head, "head")
    (layer_step,) = chosen("layer_step", layer_step, config.n_layer, "layer step")
    (source,) = chosen("source", source, config.neurons_per_head, "neuron")
    (target,) = chosen("target", target, config.neurons_per_head, "neuron")
    if num_shuffles < 2:
        raise ValueError(f"num_shuffles is {num_shuffles}: must be at least 2, to estimate their spread")
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
    """Returns the strengths, (T,).

    Of the state, only the products of two rows, those of the source's pair, with the target's weights (D,) are needed.
    """
    config, T, pair = model.config, len(ids), source // 2
    queries, keys = torch.empty(2, T, 2, dtype=torch.float64)
    values = torch.empty(T, dtype=torch.float64)  # products of v with the target's weights
    unit = torch.eye(2, dtype=torch.float64)[source % 2]

    def on_keys(step: int, tokens: slice, q: torch.Tensor) -> None:
        if step == layer_step:
            keys[tokens] = q[head, :, 2 * pair : 2 * pair + 2].double().cpu()
            positions = torch.arange(tokens.start, tokens.stop)
            table = rotation_table(positions, config.neurons_per_head, config.rope_theta, torch.float64)
            queries[tokens] = rotate(unit.expand(len(positions), 2), table[:, pair : pair + 1])

    def on_values(step: int, tokens: slice, v: torch.Tensor) -> None:
        if step == layer_step:  # v before this layer step
            values[tokens] = v.double().cpu() @ driven

    observe(model, ids, {"q": on_keys, "v": on_values})
    kept = 1.0 if config.half_lives is None else 2 ** (-1 / config.half_lives[head])
    first = second = 0.0  # the products of the state's two rows with the target's weights
    strengths = []
    for query, key, value in zip(queries.tolist(), keys.tolist(), values.tolist(), strict=True):
        strengths.append(query[0] * first + query[1] * second)
        first, second = kept * first + key[0] * value, kept * second + key[1] * value
    return torch.tensor(strengths, dtype=torch.float64)
