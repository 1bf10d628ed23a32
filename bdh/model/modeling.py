"""The language model: the backbone, and a head that predicts the next token."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from bdh.model.arguments import Inputs, check_state_type
from bdh.model.backbone import BDHModel, BDHPreTrainedModel
from bdh.model.classification import BDHForSequenceClassification
from bdh.model.configuration import BDHConfig
from bdh.model.kernels import kernel_obstacle, recurrence_of
from bdh.model.state import SynapticState
from bdh.model.text import TextGenerationMixin
from bdh.ops.backends import Work, choose_backend
from bdh.ops.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy

# Above this many logits (128 MiB in float32) the loss is computed in chunks of tokens.
MAX_LOGITS_IN_ONE_PIECE = 2**25


@dataclass
class BDHOutput(CausalLMOutputWithPast):
    """What ``forward`` returns. ``logits`` is None where the loss was computed in chunks."""

    past_key_values: SynapticState | None = None  # type: ignore[assignment]


class BDHForCausalLM(TextGenerationMixin, BDHPreTrainedModel, GenerationMixin):
    """A Dragon Hatchling language model (arXiv 2509.26507).

    The weights, with the names of the published reference code and those of the paper:

    ============  ========  ==========================  =================================================
    module        paper     shape                       what it does
    ============  ========  ==========================  =================================================
    encoder       D_x       Linear D -> H * N           which neurons fire on the residual stream: x
    encoder_v     D_y       H Linears D -> N            which neurons fire on what attention recalls: y
    decoder       E         Linear H * N -> D           back to the residual stream, where both fire
    embed                   Embedding V -> D
    lm_head                 Linear D -> V
    ============  ========  ==========================  =================================================

    ``embed`` and ``lm_head`` are not tied, no layer has a bias and no layer norm has parameters. The same
    layer is applied ``config.n_layer`` times. The attention is linear, its state a :class:`SynapticState`.
    """

    accepts_loss_kwargs = True  # num_items_in_batch, for transformers' Trainer

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        attention_form: str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BDHOutput | tuple[Any, ...]:
        """Logits of the next token at every position, and the loss where labels are given.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, T), or (B, columns fed before + T): 0 marks padding, which neither is seen by
                other tokens nor takes up a position. What it says of columns fed before is not read again.
            past_key_values: the state to go on from; it is advanced in place, unless ``use_cache`` is False.
                None starts a text.
            inputs_embeds: (B, T, D) instead of ``input_ids``; the first layer norm is applied to them too.
            labels: (B, T), aligned with ``input_ids`` as in all of transformers: the label of a position is
                its own token, and the loss is of predicting it from the ones before. -100 is not counted.
            document_starts: bool (B, T): True marks the first token of a document. It and what follows see nothing
                before it, of this call or of ``past_key_values``, and positions count from it.
            num_items_in_batch: divides the summed loss instead of the number of counted labels.
            use_cache: return the state. By default yes where one was given; else outside of training and
                without labels.
            logits_to_keep: compute the logits of the last so many positions only (0: of all), or of the
                positions in an index tensor. Not together with labels, which need all of them.
            attention_form: overrides the configuration's.
            output_hidden_states: return v before the first and after each pass, (B, T, D) each.
            **kwargs: ``shift_labels``, (B, T) labels already shifted: that of a position is the token behind it;
                they are taken where both are given. (transformers' Trainer wants every named argument with
                "label" in its name.) What libraries tell of packed batches, as ``document_starts`` does: ``seq_idx``
                (B, T), which changes where one starts; ``cu_seq_lens_q`` (documents + 1,) of one row, with
                ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``; ``position_ids`` (B, T), which count from 0 in
                each document. And what says nothing new: ``position_ids`` and ``cache_position`` as they would be anyway,
                ``token_type_ids`` of zeros, ``output_attentions=False``, and whatever is None. Comparing them on a GPU
                makes the host wait for it: leave out what is not needed.

        Returns:
            :class:`BDHOutput`. With labels and more than ``MAX_LOGITS_IN_ONE_PIECE`` logits, the loss is
            computed in chunks of tokens and ``logits`` is None.

        Raises:
            TypeError: an argument that is none of these, or a cache of keys and values.
            ValueError: arguments that contradict each other or ask for what the model has not, wrong shapes, token ids outside of the vocabulary (on the CPU), or a state of
                another model or batch size; the state is left as it was.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, document_starts, kwargs)
        targets = _targets(labels, shift_labels, logits_to_keep, inputs.v.shape[:2])  # (B, T) or None
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training and targets is None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if targets is None and inputs.is_plain_step and input_ids is not None:
            step = self._kernel_step(input_ids, inputs, use_cache, attention_form, output_hidden_states)
            if step is not None:
                output = BDHOutput(logits=step, past_key_values=past_key_values)
                return output if return_dict else output.to_tuple()
        hidden = self._all_passes(
            inputs,
            use_cache=use_cache,
            form=attention_form,
            keep_hidden_states=output_hidden_states,
            for_loss=targets is not None,
        )
        loss, logits = self._loss_and_logits(hidden.last_hidden_state, targets, num_items_in_batch, logits_to_keep)
        output = BDHOutput(
            loss=loss, logits=logits, past_key_values=hidden.past_key_values, hidden_states=hidden.hidden_states
        )
        return output if return_dict else output.to_tuple()

    def _kernel_step(
        self,
        input_ids: torch.Tensor,
        inputs: Inputs,
        use_cache: bool,
        attention_form: str | None,
        output_hidden_states: bool | None,
    ) -> torch.Tensor | None:
        """Logits (B, 1, V) of one token for each row, by the sparse kernels; None where they do not serve."""
        form = attention_form or self.config.attention_form
        is_plain = use_cache and form == "auto" and not torch.is_grad_enabled()
        if not is_plain or self.training or torch.compiler.is_compiling():
            return None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            return None
        if torch.is_autocast_enabled(self.device.type) or self.config.half_lives is not None:
            return None
        state = inputs.state
        if state is None or any(sums.requires_grad for sums in state.sums):
            return None
        if choose_backend("advance", "auto", Work(self.device, obstacle=kernel_obstacle(self))).backend.name != "cpu":
            return None
        state.remember(inputs, self._advance)
        state.sums = [sums.contiguous() for sums in state.sums]
        recurrence = recurrence_of(self, is_prompt=state.num_columns == 0)
        v = recurrence.read(
            np.ascontiguousarray(input_ids[:, 0], np.int64),
            state.positions.contiguous().numpy(),
            np.arange(len(input_ids) + 1),
            np.array([[row.data_ptr() for row in sums] for sums in state.sums]),
            torch.float32,
        )
        # Written to behind PyTorch's back: a backward pass that has kept them must see that they have changed.
        torch.autograd.graph.increment_version(state.sums)
        state.positions = state.positions + 1
        state.num_columns += 1
        return recurrence.logits(v)[:, None]

    def _loss_and_logits(
        self,
        v: torch.Tensor,
        targets: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
        logits_to_keep: int | torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if targets is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return None, self.lm_head(v[:, kept])
        targets = targets.reshape(-1).to(v.device)
        if targets.numel() * self.config.vocab_size > MAX_LOGITS_IN_ONE_PIECE:
            loss = chunked_cross_entropy(
                v.flatten(0, 1),
                self.lm_head,
                targets,
                tokens_per_chunk=max(1, MAX_LOGITS_IN_ONE_PIECE // self.config.vocab_size),
                num_items=num_items,
            )
            return loss, None
        logits = self.lm_head(v)
        return cross_entropy(logits.flatten(0, 1), targets, num_items=num_items), logits

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tells `generate` to make no cache of keys and values: ``forward`` makes the state."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, *sizes: Any
    ) -> Any:
        """Makes a state where `generate` wants one beforehand: to take tokens back, and for a prompt read in pieces.

        Raises:
            TypeError: the cache that is given is that of another kind of model.
            ValueError: a text is to be continued from a state, with tokens proposed by an assistant.
        """
        given = model_kwargs.get("past_key_values")
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if given is not None:
            check_state_type(given)
            if is_assisted and given.num_columns:  # transformers reads the whole text on any cache then, silently
                raise ValueError(
                    f"past_key_values has read {given.num_columns} columns: must be left out with assistant_model and "
                    "prompt_lookup_num_tokens, with which transformers reads the whole text anew"
                )
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare(generation_config, model_kwargs, generation_mode, batch_size, *sizes)
        takes_back = generation_config.is_assistant or is_assisted
        if given is not None or generation_config.use_cache is False:
            return
        if takes_back or generation_config.prefill_chunk_size is not None:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            state = model_kwargs["past_key_values"] = self.new_state(rows)
            if takes_back:
                state.activate_past_recording()

    def prepare_inputs_for_generation(  # type: ignore[override]  # what it calls a cache is a state here
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SynapticState | None = None,
        attention_mask: torch.Tensor | None = None,  # named, as `generate` looks at the names
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` feeds in a step; it goes on from a state as transformers does from a cache.

        ``input_ids`` is the whole text of which the state has read the first columns, or only the new tokens, if the
        ``attention_mask`` has a column for each one read before, too.

        Raises:
            ValueError: ``input_ids`` has no column that the state has not read and the mask does not say that all
                are new, or a state is given without ``use_cache``.
        """
        if past_key_values is not None:
            check_state_type(past_key_values)
        if past_key_values is not None and past_key_values.num_columns:
            num_read = past_key_values.num_columns
            if next_sequence_length is not None and next_sequence_length < 1:
                length = num_read + next_sequence_length
                raise ValueError(
                    f"the text has {length} tokens, but past_key_values has read {num_read} already: give the whole "
                    "text, those included; or the new tokens alone, and an attention_mask of "
                    f"({input_ids.shape[0]}, {num_read} + the number of new tokens)"
                )
            if not kwargs.get("use_cache", True):
                raise ValueError("use_cache is False: must be True to go on from past_key_values")
        for name in ("tokenizer", "assistant_tokenizer"):  # of `generate` itself, which hands them on
            kwargs.pop(name, None)
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        return prepare(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeats each row for its beams or continuations: those of the state too, into a copy of it."""
        state = model_kwargs.get("past_key_values")
        given = input_ids if input_ids is not None else model_kwargs.get("inputs_embeds")
        if expand_size > 1 and state is not None and given is not None and state.batch_size == given.shape[0]:
            rows = torch.arange(state.batch_size).repeat_interleave(expand_size)
            model_kwargs["past_key_values"] = state.filter(rows)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        return expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    @classmethod
    def from_reference(
        cls, state_dict: dict[str, torch.Tensor], config: BDHConfig | dict[str, Any] | None = None
    ) -> "BDHForCausalLM":
        """A model with the weights of the published reference code; see :mod:`bdh.model.conversion`."""
        from bdh.model.conversion import model_from_reference

        return model_from_reference(state_dict, config)

    def to_reference(self) -> dict[str, torch.Tensor]:
        """The weights in the layout of the published reference code, ``attn.freqs`` included."""
        from bdh.model.conversion import reference_state_dict

        return reference_state_dict(self)


def _targets(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    shape: torch.Size,
) -> torch.Tensor | None:
    """What is to be predicted at each position, (B, T); None without labels."""
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


# All of them here, which needs the others: importing an auto class imports this module (bdh.autoregister).
AutoModel.register(BDHConfig, BDHModel, exist_ok=True)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BDHConfig, BDHForSequenceClassification, exist_ok=True)
