"""Checks the arguments of ``forward`` and of transformers' ``generate``, and converts them to one form.

Libraries pass more arguments than the model needs. Values that agree with the defaults are accepted, descriptions of
packed documents are converted, and any other argument raises an error with its name.
"""

import copy
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils.deprecation import deprecate_kwarg

from bdh.model.configuration import BDHConfig
from bdh.model.state import Columns, SynapticState
from bdh.ops.attention import sum_dtype
from bdh.ops.eager import IGNORE_INDEX, layer_norm
from bdh.words import counted, nearest

_logger = logging.getLogger(__name__)

_PACKING = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Arguments with only one possible value, and the reason.
_ONE_VALUE = {
    "output_attentions": (False, "linear attention computes no weights"),
    "output_router_logits": (False, "there are no experts to route to"),
    "is_causal": (True, "a token sees those before it, in every form"),
}


@dataclass
class Inputs(Columns):
    """The checked inputs of a forward pass: embedded tokens, their mask and document starts, and the earlier state."""

    state: SynapticState | None
    """The state to continue from; None to start a text."""


takes_old_cache_name = deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
"""A decorator of methods that also accept ``cache`` under the name ``past_key_values``, which transformers used before
5.24. As in transformers' own models, this causes a warning."""


def read_inputs(
    model: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    state: SynapticState | None,
    others: dict[str, Any],
) -> Inputs:
    """Checks the arguments of ``forward`` and returns them in one form.

    Under ``torch.compile`` and ``torch.export`` the values of tensors are not checked.

    Args:
        model: the model, whose ``config``, ``embed`` and ``dtype`` are read.
        input_ids: as for :meth:`bdh.BDHForCausalLM.forward`.
        inputs_embeds: likewise.
        attention_mask: likewise.
        state: ``cache``.
        others: ``document_starts`` and the further keyword arguments of :meth:`bdh.BDHForCausalLM.forward`.

    Raises:
        TypeError: as ``forward``.
        ValueError: as ``forward``.
    """
    config = model.config
    others = {name: value for name, value in others.items() if value is not None}
    starts = others.pop("document_starts", None)
    _check_names(model, others)
    B, T = _shape(config, input_ids, inputs_embeds)
    if state is not None:
        check_state_type(state)
        _check_state(config, state, B, model.dtype)
    num_earlier = state.num_columns if state is not None else 0
    mask = _new_columns(attention_mask, B, T, num_earlier)
    _check_columns(others, T, num_earlier)
    if starts is not None and not (_has_shape(starts, (B, T)) and starts.dtype == torch.bool):
        raise ValueError(
            f"document_starts is {starts.dtype} of shape {tuple(starts.shape)}: must be bool {(B, T)}, that of the tokens"
        )
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if any(name in others for name in _PACKING):
        starts = _packed(others, starts, mask, state, (B, T), given.device)
    if input_ids is not None:
        given = model.embed(_known_ids(config, input_ids, mask))
    return Inputs(layer_norm(given, config.layer_norm_eps), mask, starts, state)


def check_state_type(state: object) -> None:
    """Raises an exception unless ``cache`` is a :class:`SynapticState`.

    Raises:
        TypeError: it is a cache for another kind of model.
    """
    if not isinstance(state, SynapticState):
        raise TypeError(
            f"cache is a {type(state).__name__}: must be a SynapticState, which forward returns and "
            "model.new_state() makes, or None. BDH keeps sums of fixed size, no keys and values"
        )


def token_positions(
    num_tokens: int,
    *,
    before: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the position of each token in its document, from 0. Padding does not count as a position.

    Args:
        num_tokens: T.
        before: int64 (B,): how many tokens of the current document each sequence has read. None for new texts.
        mask: bool (B, T): False for padding.
        starts: bool (B, T): True where a document starts; if that is padding, it starts with the next token.
        device: the device of the result, if no tensor is given.

    Returns:
        The positions, int64 (B, T), or (1, T) if they are the same for all sequences, and the positions of the next
        tokens, (B,) or (1,).
    """
    if mask is None:
        seen = torch.arange(num_tokens, device=device)[None]
        total = torch.full((1,), num_tokens, device=device)
    else:
        seen = mask.long().cumsum(1) - mask.long()  # (B, T): the number of tokens before each one
        total = mask.sum(1)
    if before is None:
        before = torch.zeros(1, dtype=torch.int64, device=device)
    if starts is None:
        return seen + before[:, None], total + before
    # The number of tokens before the latest start, whose position is 0. It never decreases: a running maximum finds it.
    at_start = torch.where(starts, seen, -before[:, None]).cummax(1).values  # (B, T)
    return seen - at_start, total - at_start[:, -1]


def shifted_labels(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    shape: torch.Size,
) -> torch.Tensor | None:
    """Returns the token to predict at each position, (B, T), or None without labels."""
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is None:
            continue
        if tuple(given.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(given.shape)}: must be {tuple(shape)}, that of the tokens")
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
            raise ValueError(f"logits_to_keep was given with {name}: the loss needs the logits of all positions")
    if shift_labels is None and labels is not None:
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return shift_labels


def _check_names(model: Any, others: dict[str, Any]) -> None:
    known = [*_PACKING, *_ONE_VALUE, "cache_position", "token_type_ids"]
    if unknown := sorted(set(others) - set(known)):
        names = [*inspect.signature(model.forward).parameters, "shift_labels", "return_dict", *known]
        near = nearest(unknown[0], names, 0.8)
        raise TypeError(f"forward does not know {', '.join(unknown)}{f': did you mean {near}?' if near else ''}")
    for name, (value, why) in _ONE_VALUE.items():
        if name in others and bool(others[name]) != value:
            raise ValueError(f"{name} is {others[name]}: {why}, must be {value}")


def _check_columns(others: dict[str, Any], T: int, num_earlier: int) -> None:
    """Raises ``ValueError`` if ``cache_position`` or ``token_type_ids`` differ from the defaults."""
    if torch.compiler.is_compiling():
        return
    cache_position = others.get("cache_position")
    if cache_position is not None:
        expected = torch.arange(num_earlier, num_earlier + T, device=cache_position.device)
        if tuple(cache_position.shape) != (T,) or not torch.equal(cache_position, expected):
            raise ValueError(
                f"cache_position is {_shown(cache_position)}: must be the columns {num_earlier} to "
                f"{num_earlier + T - 1}, those of the tokens after what the given cache has read; or leave it out"
            )
    types = others.get("token_type_ids")
    if types is not None and bool(types.any()):
        raise ValueError(f"token_type_ids is {_shown(types)}: must be all 0, or left out: there is one type of tokens")


def _packed(
    others: dict[str, Any],
    starts: torch.Tensor | None,
    mask: torch.Tensor | None,
    state: SynapticState | None,
    shape: tuple[int, int],
    device: torch.device,
) -> torch.Tensor | None:
    """Returns where documents start, bool (B, T), or None if none starts. All descriptions given must agree."""
    (B, T), is_compiling = shape, torch.compiler.is_compiling()
    found = {} if starts is None else {"document_starts": starts}
    for name, read in (("cu_seq_lens_q", _starts_of_lengths), ("seq_idx", _starts_of_numbers)):
        if name not in others:
            continue
        if state is not None and state.num_columns:
            raise ValueError(f"{name} is given with a cache: say with document_starts what continues from it")
        found[name] = read(others, B, T).to(device).expand(B, T)
    if "cu_seq_lens_q" not in others and (rest := [n for n in _PACKING[3:] if n in others]):
        raise ValueError(f"{rest[0]} is given without cu_seq_lens_q: give both, or neither")
    first = next(iter(found), "")
    starts = found.get(first)
    for name, other in found.items():  # the first column starts a text in any case
        if starts is not None and not is_compiling and not torch.equal(other[:, 1:], starts[:, 1:]):
            raise ValueError(f"{name} and {first} say that documents start at different tokens: give one of them")
    position_ids = others.get("position_ids")
    if position_ids is None:
        return starts
    if not _has_shape(position_ids, (B, T), (1, T), (T,)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}: must be {(B, T)}, that of the tokens")
    position_ids = position_ids.to(device).expand(B, T)

    def agree(starts: torch.Tensor | None) -> bool:
        before = state.positions if state is not None else None
        expected, _ = token_positions(T, before=before, mask=mask, starts=starts, device=device)
        same = position_ids == expected
        return bool((same if mask is None else same | ~mask).all())

    from_zero = position_ids == 0 if mask is None else (position_ids == 0) & mask
    for possible in [None, from_zero] if starts is None else [starts]:
        if (possible is not None) if is_compiling else agree(possible):
            return possible
    raise ValueError(
        f"position_ids is {_shown(position_ids)}: must count the tokens of each document from 0, padding aside"
        + (", and continue after those that the given cache has read" if state is not None else "")
        + (f", where documents start as {first} says" if found else "")
        + "; or leave it out, which means the same"
    )


def _starts_of_lengths(others: dict[str, Any], B: int, T: int) -> torch.Tensor:
    """Returns where documents start by ``cu_seq_lens_q``, bool (1, T)."""
    bounds = torch.as_tensor(others["cu_seq_lens_q"])
    if B != 1:
        raise ValueError(f"cu_seq_lens_q is given for {B} rows: must be of one row, in which all documents are")
    if not torch.compiler.is_compiling():
        numbers = bounds.flatten().tolist()
        lengths = [after - before for before, after in pairwise(numbers)]
        if not lengths or (numbers[0], numbers[-1]) != (0, T) or min(lengths) < 0:
            raise ValueError(f"cu_seq_lens_q is {_shown(bounds)}: must rise from 0 to {T}, the number of tokens")
        other = others.get("cu_seq_lens_k")
        if other is not None and torch.as_tensor(other).flatten().tolist() != numbers:
            raise ValueError(f"cu_seq_lens_k is {_shown(torch.as_tensor(other))}: must be cu_seq_lens_q")
        for name in ("max_length_q", "max_length_k"):
            if int(others.get(name, max(lengths))) < max(lengths):
                raise ValueError(
                    f"{name} is {int(others[name])}: the longest document has {counted(max(lengths), 'token')}"
                )
    starts = torch.zeros(1, T + 1, dtype=torch.bool, device=bounds.device)
    return starts.index_fill(1, bounds.flatten().long(), True)[:, :T]


def _starts_of_numbers(others: dict[str, Any], B: int, T: int) -> torch.Tensor:
    """Returns where documents start by ``seq_idx``, bool (1 or B, T)."""
    numbers = others["seq_idx"]
    if not _has_shape(numbers, (B, T), (1, T)):
        raise ValueError(f"seq_idx has shape {tuple(numbers.shape)}: must be {(B, T)}, that of the tokens")
    starts = torch.ones(numbers.shape, dtype=torch.bool, device=numbers.device)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return starts


def _has_shape(tensor: torch.Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether a tensor has one of the shapes. Compares size by size: tuples of symbolic sizes cannot be compared."""
    return any(
        tensor.ndim == len(shape) and all(size == wanted for size, wanted in zip(tensor.shape, shape, strict=True))
        for shape in shapes
    )


def _shown(tensor: torch.Tensor) -> str:
    """Returns the first numbers of a tensor, for an error message."""
    numbers = tensor.flatten()[:9].tolist()
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")


def _shape(config: BDHConfig, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    """Returns B and T."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("forward takes either input_ids or inputs_embeds: give exactly one of them")
    name, given = "input_ids", input_ids
    width: tuple[int, ...] = ()
    if inputs_embeds is not None:
        name, given, width = "inputs_embeds", inputs_embeds, (config.n_embd,)
    assert given is not None
    if given.ndim != 2 + len(width) or 0 in given.shape or tuple(given.shape[2:]) != width:
        wanted = ", ".join(["batch", "tokens", *map(str, width)])
        raise ValueError(f"{name} has shape {tuple(given.shape)}: must be ({wanted}) with at least 1 token")
    return given.shape[0], given.shape[1]


def _known_ids(config: BDHConfig, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns valid ids: checks those of tokens and replaces those of padding, which can have any value."""
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
    """Returns the mask of the T new columns, bool (B, T), or None if nothing is masked."""
    if attention_mask is None:
        return None
    if not _has_shape(attention_mask, (B, T), (B, num_earlier + T)):
        earlier = f" or, with the columns fed before, {(B, num_earlier + T)}" if num_earlier else ""
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be {(B, T)}{earlier}")
    mask = attention_mask[:, -T:].bool()
    # A mask costs another pass over the neurons, and a separate rotation for each sequence.
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _check_state(config: BDHConfig, state: SynapticState, B: int, dtype: torch.dtype) -> None:
    if not torch.compiler.is_compiling():
        state.check_whole()
    if state.kind != "sums":
        raise ValueError(f"the state is of kind {state.kind!r}: forward reads and writes sums alone, in float32")
    expected = (B, config.n_head, config.neurons_per_head, config.n_embd)
    shapes = [tuple(s.shape) for s in state.sums]  # not a set: under torch.export sizes are symbols, without a hash
    if shapes != [expected] * config.n_layer:
        raise ValueError(
            f"the state has sums of shapes {sorted(set(shapes))} for {counted(len(state.sums), 'layer step')}: this model and batch "
            f"need {expected} for {config.n_layer}"
        )
    dtypes = {s.dtype for s in state.sums}
    if dtypes != {sum_dtype(dtype)}:
        raise ValueError(
            f"the state has sums in {', '.join(sorted(map(str, dtypes)))}: a model in {dtype} keeps them in "
            f"{sum_dtype(dtype)}"
        )


# Private interfaces of transformers that its `generate` calls. Checked with transformers 5.24;
# ``tests/model/test_private_names.py`` fails if they change.


def checkpointing_of(model: Any) -> Callable[..., Any]:
    """Returns the checkpointing function: that of transformers' ``activation_checkpointing_enable``, or a default."""
    return getattr(model, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))


def _check_unread(state: SynapticState, num_unread: int) -> None:
    """Raises ``ValueError`` if the state has read every token of a text that begins with what it read."""
    if num_unread < 1:
        num_read = state.num_columns
        raise ValueError(
            f"the text has {counted(num_read + num_unread, 'token')}, but the given cache has read {num_read} already: give "
            "the whole text, those included; or the new tokens alone, and an attention_mask of "
            f"(sequences, {num_read} + the number of new tokens)"
        )


class StateForGeneration:
    """A mixin that makes transformers' ``generate`` use a :class:`SynapticState` instead of a cache of keys and values.

    It must precede ``GenerationMixin`` among the base classes.
    """

    new_state: Any

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Returns False, so that `generate` creates no cache of keys and values: ``forward`` creates the state."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *sizes: Any
    ) -> Any:
        """Creates a state if `generate` needs one before the first ``forward``.

        That is so for assisted generation, which removes tokens, and for a prompt that is read in chunks.

        Raises:
            TypeError: ``cache`` is that of another kind of model.
            ValueError: assisted generation is requested with a state that has read tokens already.
        """
        given = model_kwargs.get("cache")
        is_assisted = generation_mode.value == "assisted_generation"
        if given is not None:
            check_state_type(given)
            if is_assisted and given.num_columns:  # otherwise transformers would silently read the whole text again
                raise ValueError(
                    f"the given cache has read {counted(given.num_columns, 'column')}: must be left out with assistant_model and "
                    "prompt_lookup_num_tokens, with which transformers reads the whole text anew"
                )
        parent: Any = super()
        parent._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, batch_size, *sizes)
        takes_back = generation_config.is_assistant or is_assisted
        if given is not None or generation_config.use_cache is False:
            return
        if takes_back or generation_config.prefill_chunk_size is not None:
            sequences = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            state = model_kwargs["cache"] = self.new_state(sequences)
            if takes_back:
                state.activate_past_recording()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats each sequence for its beams or continuations, and gives the state a copy for each of them too."""
        state = model_kwargs.get("cache")
        given = input_ids if input_ids is not None else model_kwargs.get("inputs_embeds")
        if expand_size > 1 and state is not None and given is not None and state.batch_size == given.shape[0]:
            sequences = torch.arange(state.batch_size).repeat_interleave(expand_size)
            model_kwargs["cache"] = state.filter(sequences)
        parent: Any = super()
        return parent._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """Reads the prompt.

        Embeddings are read at once, also where ``prefill_chunk_size`` is set: transformers cannot read them in chunks.

        Raises:
            ValueError: the prompt is to be read in chunks, and the state has read all of it already. transformers would
                read it again.
        """
        cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
        in_chunks = generation_config.prefill_chunk_size is not None
        if in_chunks and model_kwargs.get("inputs_embeds") is not None and is_first_iteration:
            _logger.warning("inputs_embeds are read at once: prefill_chunk_size applies to input_ids only")
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        elif in_chunks and cache is not None and cache.num_columns:
            num_columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
            if num_columns == input_ids.shape[1]:  # the text contains what was read
                _check_unread(cache, input_ids.shape[1] - cache.num_columns)
        parent: Any = super()
        return parent._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    @takes_old_cache_name
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: SynapticState | None = None,
        attention_mask: torch.Tensor | None = None,  # must be named: `generate` inspects the signature
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the arguments of ``forward`` for a step of `generate`.

        As with a cache in transformers, ``input_ids`` is either the whole text, of which the state has read the first
        columns, or only the new tokens, if ``attention_mask`` also covers the columns that were read before.

        Raises:
            ValueError: the state has read all of ``input_ids`` already, and the mask does not say that they are new
                tokens; or a state is given with ``use_cache=False``.
        """
        if cache is not None:
            check_state_type(cache)
        if cache is not None and cache.num_columns:
            if next_sequence_length is not None:
                _check_unread(cache, next_sequence_length)
            if not kwargs.get("use_cache", True):
                raise ValueError("use_cache is False: must be True to continue from a cache")
        for name in ("tokenizer", "assistant_tokenizer"):  # `generate` passes on its own arguments
            kwargs.pop(name, None)
        kwargs |= {"cache": cache, "attention_mask": attention_mask}
        kwargs |= {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        parent: Any = super()
        return parent.prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **kwargs)
