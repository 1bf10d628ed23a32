"""The language model and the classifier, in transformers' classes: arguments, the loss, and the state as a cache."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from bdh.model.arguments import check_state_type, shifted_labels
from bdh.model.backbone import BDHModel, BDHPreTrainedModel
from bdh.model.configuration import BDHConfig
from bdh.model.conversion import from_reference, to_reference
from bdh.model.forward import step_by_kernels
from bdh.model.private_api import StateForGeneration
from bdh.model.state import SynapticState
from bdh.ops.eager import chunked_cross_entropy, cross_entropy
from bdh.texts import TextMethods

# Above this many logits (128 MiB in float32) the loss is computed in chunks of tokens.
MAX_LOGITS_IN_ONE_PIECE = 2**25


@dataclass
class BDHOutput(CausalLMOutputWithPast):
    """What ``forward`` returns. ``logits`` is None where the loss was computed in chunks."""

    past_key_values: SynapticState | None = None  # type: ignore[assignment]


class BDHForCausalLM(TextMethods, BDHPreTrainedModel, StateForGeneration, GenerationMixin):
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
    check_state = staticmethod(check_state_type)

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
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
        **kwargs: Any,
    ) -> BDHOutput:
        """Logits of the next token at every position, and the loss where labels are given.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, T), or (B, columns fed before + T): 0 marks padding, which neither is seen by
                other tokens nor takes up a position. What it says of columns fed before is not read again.
            past_key_values: the state to continue from; it is advanced in place, unless ``use_cache`` is False.
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
            output_hidden_states: return v before the first and after each layer step, (B, T, D) each.
            **kwargs: ``shift_labels``, (B, T) labels already shifted: that of a position is the token after it;
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
            ValueError: arguments that contradict each other or ask for what the model has not, wrong shapes, token ids outside of the
                vocabulary (on the CPU), or a state of another model or batch size; the state is left as it was.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        kwargs["document_starts"] = document_starts
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, kwargs)
        targets = shifted_labels(labels, shift_labels, logits_to_keep, inputs.v.shape[:2])  # (B, T) or None
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training and targets is None)
        keep_hidden = self._keeps_hidden_states(output_hidden_states)
        if targets is None and use_cache and not keep_hidden and input_ids is not None:
            logits = step_by_kernels(self, input_ids, inputs, attention_form)
            if logits is not None:
                return BDHOutput(logits=logits, past_key_values=past_key_values)
        hidden = self._run(inputs, use_cache, attention_form, keep_hidden, for_loss=targets is not None)
        loss, logits = self._loss_and_logits(hidden.v, targets, num_items_in_batch, logits_to_keep)
        return BDHOutput(loss=loss, logits=logits, past_key_values=hidden.state, hidden_states=hidden.every_v)

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
        """What `generate` feeds in a step; it continues from a state as transformers does from a cache.

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
                raise ValueError("use_cache is False: must be True to continue from past_key_values")
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

    @classmethod
    def from_reference(
        cls, state_dict: dict[str, torch.Tensor], config: BDHConfig | dict[str, Any] | None = None
    ) -> "BDHForCausalLM":
        """A model with the weights of the published reference code; see :func:`bdh.model.conversion.from_reference`."""
        config, weights, dtype = from_reference(state_dict, config)
        model = cls(config).to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps `to`
        model.load_state_dict(weights)
        return model.eval()

    def to_reference(self) -> dict[str, torch.Tensor]:
        """The weights in the layout of the published reference code, ``attn.freqs`` included.

        Raises:
            ValueError: the model's state decays, which that code cannot compute.
        """
        return to_reference(self.config, self)


class BDHForSequenceClassification(BDHPreTrainedModel):
    """A Dragon Hatchling that tells texts apart: ``score`` is a ``Linear`` from D to ``config.num_labels``.

    ``AutoModelForSequenceClassification.from_pretrained`` makes one of the export of a language model, with a new head.
    """

    accepts_loss_kwargs = False  # the loss is the mean of a batch, whatever transformers' Trainer accumulates
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (transformers declares it as a class variable)

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.n_embd, config.num_labels or 2, bias=False)  # 2: transformers' default
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) of each text, at its last token, and the loss where labels are given.

        The last token is that of ``attention_mask``; without one, the last that is not ``config.pad_token_id``.

        Args:
            labels: of classes int64 (B,); of regression (``num_labels`` 1) float (B,); of several classes at once float
                (B, num_labels). ``config.problem_type`` says which, or follows from them, as in all of transformers.

        The other arguments are those of :meth:`bdh.BDHForCausalLM.forward`.

        Raises:
            TypeError, ValueError: as there.
        """
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, kwargs)
        use_cache = past_key_values is not None if use_cache is None else use_cache
        hidden = self._run(inputs, use_cache, None, output_hidden_states, for_loss=labels is not None)
        B, T, _ = inputs.v.shape
        is_token = attention_mask[:, -T:].bool() if attention_mask is not None else None
        if is_token is None and input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        v = hidden.v
        columns = torch.arange(T, device=v.device)
        last = columns[-1:].expand(B) if is_token is None else (columns * is_token.to(v.device)).argmax(1)
        logits = self.score(v[torch.arange(B, device=v.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=hidden.state,  # type: ignore[arg-type]  # a state here
            hidden_states=hidden.every_v,
        )


# All of them here, which needs the others: importing an auto class imports this module (bdh.autoregister).
AutoModel.register(BDHConfig, BDHModel, exist_ok=True)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BDHConfig, BDHForSequenceClassification, exist_ok=True)
