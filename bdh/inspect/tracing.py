"""Traces of the values that a model computes while it reads a text, by layer step, head and token.

:func:`trace` stores values. :func:`observe`, on which it and the measurements of this package build, passes each value
to a function.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bdh.model.arguments import read_inputs
from bdh.model.forward import run_layer
from bdh.model.hook_points import watching
from bdh.model.network import inference
from bdh.ops.attention import sum_dtype
from bdh.ops.eager import HOOK_POINTS
from bdh.tokenizer.plain import PlainTokenizer
from bdh.words import counted

MAX_BYTES = 2**26
"""The most bytes of a tensor as wide as the neurons, or of the attention scores. Longer texts are read in chunks."""
Text = str | Sequence[int] | torch.Tensor
Observer = Callable[[int, slice, torch.Tensor], object]
"""Called with the index of a layer step, the tokens of a chunk, and their values.

The values are (H, T, N), but (H, T, D) for a and (T, D) for v.
"""


@dataclass(frozen=True, eq=False)
class Trace:
    """The values that :func:`trace` recorded, on the model's device; None for values that were not requested.

    L, H and P are the numbers of requested layer steps, heads and tokens.
    """

    layer_steps: tuple[int, ...]
    heads: tuple[int, ...]
    positions: tuple[int, ...]
    """The positions of the tokens in the text, from 0."""
    tokens: tuple[int, ...]
    """The ids of the tokens."""
    x: torch.Tensor | None = None
    """(L, H, P, N): the neurons' activations on the residual stream."""
    q: torch.Tensor | None = None
    """(L, H, P, N): x with rotary positions: the queries and the keys."""
    a: torch.Tensor | None = None
    """(L, H, P, D): the output of attention, before its layer norm."""
    y: torch.Tensor | None = None
    """(L, H, P, N): the neurons' activations on the normalized attention output."""
    z: torch.Tensor | None = None
    """(L, H, P, N): x * y."""
    v: torch.Tensor | None = None
    """(L + 1, P, D): the residual stream before the model's first layer step, and after each requested layer step."""


def trace(
    model: Any,
    text: Text,
    names: Sequence[str] = ("x", "y"),
    *,
    tokenizer: Any = None,
    positions: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    layer_steps: Sequence[int] | None = None,
) -> Trace:
    """Reads a text with an empty state, in evaluation mode, and records values that the layer steps compute.

    A long text is read in chunks, so that memory grows with the recorded values, not with the text. Meanwhile the model
    has hooks attached, so no other thread may use it.

    Args:
        model: a :class:`bdh.BDHForCausalLM`, :class:`bdh.BDHModel` or :class:`bdh.BDHForSequenceClassification`.
        text: a string, in which nothing is parsed as a special token, or its token ids, (T,) or (1, T).
        names: the values to record, of x, q, a, y, z and v.
        tokenizer: the tokenizer, required for a string.
        positions: the positions of the tokens to record; None for all. Tokens after the last position are not read.
            Negative positions, heads and layer steps count from the end.
        heads: the heads to record; None for all.
        layer_steps: the layer steps to record; None for all.

    Raises:
        ValueError: a name, position, head or layer step does not exist; the text is a string without a tokenizer, or
            empty; or ids are outside the vocabulary.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in HOOK_POINTS]
    if unknown or not names:
        raise ValueError(f"names is {', '.join(unknown) or 'empty'}: must be some of {', '.join(HOOK_POINTS)}")
    ids = token_ids(text, tokenizer)
    kept = chosen("positions", positions, len(ids), "token")
    of_heads = chosen("heads", heads, model.config.n_head, "head")
    of_steps = chosen("layer_steps", layer_steps, model.config.n_layer, "layer step")
    rows_of = dict.fromkeys(names, of_steps) | {"v": (0, *(step + 1 for step in of_steps))}
    places = torch.tensor(kept, device=model.device)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, step: int, tokens: slice, values: torch.Tensor) -> None:
        if step not in rows_of[name]:
            return
        columns = ((places >= tokens.start) & (places < tokens.stop)).nonzero()[:, 0]
        values = values.index_select(-2, places[columns] - tokens.start)
        if name != "v":
            values = values[list(of_heads)]
        if name not in found:
            *outer, _, width = values.shape
            found[name] = values.new_empty(len(rows_of[name]), *outer, len(kept), width)
        for row, wanted in enumerate(rows_of[name]):
            if wanted == step:
                found[name][row].index_copy_(-2, columns, values)

    observe(model, ids[: max(kept) + 1], {name: partial(keep, name) for name in names})
    return Trace(of_steps, of_heads, kept, tuple(ids[list(kept)].tolist()), **found)


def observe(model: Any, ids: torch.Tensor, observers: Mapping[str, Observer]) -> None:
    """Reads tokens (T,) with an empty state, in evaluation mode and in chunks, and passes each value to its observer.

    For v, layer step 0 is the residual stream before the first layer step, and 1 to L are those after each. Observers
    must not modify the values, which can be views.

    Args:
        model: as for :func:`trace`.
        ids: the token ids.
        observers: functions by the name of the value.
    """
    config = model.config
    H, widest = config.n_head, max(config.neurons_per_head, config.n_embd)
    num_values = MAX_BYTES // (H * sum_dtype(model.dtype).itemsize)
    piece_tokens = max(1, min(num_values // widest, math.isqrt(num_values)))
    state = None
    with inference(model):
        for first in range(0, len(ids), piece_tokens):
            tokens = slice(first, min(first + piece_tokens, len(ids)))
            inputs = read_inputs(model, ids[None, tokens].to(model.device), None, None, state, {})
            calls: Counter[str] = Counter()

            def report(name: str, values: torch.Tensor, tokens: slice = tokens, calls: Counter[str] = calls) -> None:
                if name in ("x", "y", "z"):
                    values = values.unflatten(-1, (H, -1)).transpose(-2, -3)
                observers[name](calls[name], tokens, values[0])
                calls[name] += 1

            if "v" in observers:
                report("v", inputs.v)
            with watching(model, {name: partial(report, name) for name in observers}):
                use_cache = tokens.stop < len(ids)
                state = run_layer(model, inputs, use_cache=use_cache, keep_hidden_states=False).state


def token_ids(text: Text, tokenizer: Any = None) -> torch.Tensor:
    """Returns the token ids of a text, int64 (T,) on the CPU.

    Raises:
        ValueError: the text is a string without a tokenizer, or the ids are not those of a single text.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text is given without its tokenizer: give tokenizer too, or the ids of the tokens")
        text = PlainTokenizer.of(tokenizer).encode(text)
    ids = torch.as_tensor(text, device="cpu")
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or ids.numel() == 0:
        raise ValueError(f"the ids have shape {tuple(ids.shape)}: must be (tokens,) of one text, with at least 1 token")
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"the ids are {ids.dtype}: must be whole numbers")
    return ids.long()


def chosen(name: str, given: int | Sequence[int] | None, count: int, noun: str) -> tuple[int, ...]:
    """Returns indices from 0 to ``count`` - 1: the given ones, of which negative ones count from the end, or all.

    Raises:
        ValueError: an index is out of range, or none is given.
    """
    if given is None:
        return tuple(range(count))
    numbers = (given,) if isinstance(given, int) else tuple(int(each) for each in given)
    wrong = [each for each in numbers if not -count <= each < count]
    if wrong or not numbers:
        allowed = f"within {-count} to {count - 1}, of {counted(count, noun)}"
        raise ValueError(f"{name} is {wrong[0] if wrong else 'empty'}: must be {allowed}")
    return tuple(each % count for each in numbers)
