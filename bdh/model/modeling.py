"""The model classes for transformers: their modules, arguments and losses, and the state as ``cache``.

The layer itself is computed by :mod:`bdh.model.forward`, which does not depend on transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import (
    initialization as init,
)
from transformers import modeling_outputs as outputs
from transformers.utils import can_return_tuple

from bdh.model.arguments import StateForGeneration, read_inputs, shifted_labels, takes_old_cache_name
from bdh.model.configuration import BDHConfig
from bdh.model.conversion import from_reference, to_reference
from bdh.model.forward import run_layer, step_by_kernels
from bdh.model.hook_points import HookPoints
from bdh.model.quantization import keep_as_saved, num_quantized_weights, plain_tensor
from bdh.model.quantized import QuantizedEmbedding, QuantizedLinear
from bdh.model.quantizer import BDHQuantizer  # noqa: F401 (which registers itself)
from bdh.model.state import SynapticState
from bdh.model.weights import recheck_weights
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerOptions
from bdh.ops.eager import chunked_cross_entropy, cross_entropy
from bdh.texts import TextMethods, TraceMethod

# Above this many logits (128 MiB in float32) the loss is computed in chunks of tokens.
MAX_LOGITS_IN_ONE_PIECE = 2**25


@dataclass
class BDHModelOutput(outputs.BaseModelOutputWithPast):
    """The output of :meth:`BDHModel.forward`."""

    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]  # transformers requires defaults in outputs
    cache: SynapticState | None = None  # type: ignore[assignment]


@dataclass
class BDHOutput(outputs.CausalLMOutputWithPast):
    """The output of :meth:`BDHForCausalLM.forward`. ``logits`` is None if the loss was computed in chunks."""

    cache: SynapticState | None = None  # type: ignore[assignment]


class BDHPreTrainedModel(TraceMethod, PreTrainedModel):
    """The base of all model classes: the modules of the layer.

    Their names are the same in all classes, so that each class can load weights that another one saved.
    """

    config: BDHConfig
    config_class = BDHConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012 (transformers declares them as class variables)
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        D, H, N = config.n_embd, config.n_head, config.neurons_per_head
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Linear(D, H * N, bias=False)
        self.encoder_v = nn.ModuleList(nn.Linear(D, N, bias=False) for _ in range(H))
        self.decoder = nn.Linear(H * N, D, bias=False)
        self.hook_points = HookPoints()
        self.gradient_checkpointing = False
        self.layer_options = LayerOptions()

    def _init_weights(self, module: Any) -> None:
        """Initializes weights that were not read from a file."""
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            init.constant_(module.packed, 255)  # makes the scales NaN, which check_packed reports
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Loads a model as :meth:`transformers.PreTrainedModel.from_pretrained` does, with the same arguments."""
        loaded = super().from_pretrained(*arguments, **options)
        keep_as_saved(loaded[0] if isinstance(loaded, tuple) else loaded)  # it is a tuple with output_loading_info=True
        return loaded

    def train(self, mode: bool = True) -> Any:
        recheck_weights(self)
        return super().train(mode)

    @property
    def base_model(self) -> "BDHModel":
        """The model without its head: a :class:`BDHModel` with the same modules and current settings.

        Each access creates a new object. It shares weights and modules with this model. Call methods that change
        settings, such as ``train()`` and ``activation_checkpointing_enable()``, and register hooks, on this model
        itself.
        """
        backbone = BDHModel.__new__(BDHModel)
        nn.Module.__init__(backbone)  # without hooks, which would run twice
        of_module = {*vars(backbone), "forward"} - {"training"}  # libraries replace the forward of the model
        vars(backbone).update((name, value) for name, value in vars(self).items() if name not in of_module)
        for name in ("embed", "encoder", "encoder_v", "decoder", "hook_points"):
            setattr(backbone, name, getattr(self, name))
        return backbone

    def get_decoder(self) -> "BDHModel":
        """Returns :attr:`base_model`, not the module named ``decoder``."""
        return self.base_model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Returns the model itself, as every transformers model without an encoder does."""
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:
        return plain_tensor(self).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the unquantized weights. Quantized weights are multiplied in the dtype of their input."""
        return plain_tensor(self).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of parameters, as in all of transformers.

        A quantized weight counts as one parameter, whatever its number of bytes, and never as a trainable one.
        """
        plain = super().num_parameters(only_trainable, exclude_embeddings)
        return plain if only_trainable else plain + num_quantized_weights(self, embeddings=not exclude_embeddings)

    def new_state(self, batch_size: int = 1) -> SynapticState:
        """Returns an empty state for ``cache``: the state before the first token."""
        config = self.config
        shape = (batch_size, config.n_head, config.neurons_per_head, config.n_embd)
        return SynapticState.zeros(shape, config.n_layer, dtype=sum_dtype(self.dtype), device=self.device)


class BDHModel(BDHPreTrainedModel):
    """The Dragon Hatchling model without a head: it returns the residual stream after the last layer step.

    ``AutoModel.from_pretrained`` loads it from an exported language model and ignores the head.
    """

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.post_init()

    @property
    def base_model(self) -> "BDHModel":
        """The model itself."""
        return self

    @takes_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        attention_form: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BDHModelOutput:
        """Computes the residual stream after the last layer step.

        The arguments and exceptions are those of :meth:`bdh.BDHForCausalLM.forward`, without those for its head.

        Returns:
            A :class:`BDHModelOutput`, with ``last_hidden_state`` (B, T, D) in the model's dtype.
        """
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, cache, kwargs)
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        hidden = run_layer(
            self, inputs, use_cache=use_cache, form=attention_form, keep_hidden_states=output_hidden_states
        )
        return BDHModelOutput(last_hidden_state=hidden.v, cache=hidden.state, hidden_states=hidden.every_v)


class BDHForCausalLM(TextMethods, BDHPreTrainedModel, StateForGeneration, GenerationMixin):
    """A Dragon Hatchling language model (arXiv 2509.26507).

    The weights, with their names in the published reference code and in the paper:

    ============  ========  ==========================  ======================================================
    module        paper     shape                       purpose
    ============  ========  ==========================  ======================================================
    encoder       D_x       Linear D -> H * N           which neurons fire on the residual stream: x
    encoder_v     D_y       H Linears D -> N            which neurons fire on the output of attention: y
    decoder       E         Linear H * N -> D           maps x * y, nonzero where both fire, back to the residual
    embed                   Embedding V -> D            token embeddings
    lm_head                 Linear D -> V               logits
    ============  ========  ==========================  ======================================================

    Elsewhere in the code, E, Ev and Dec stand for encoder, encoder_v and decoder. That E is not the paper's E.

    ``embed`` and ``lm_head`` are not tied, no layer has a bias, and the layer norms have no parameters. The same
    layer is applied ``config.n_layer`` times. Attention is linear, and its state is a :class:`SynapticState`.
    """

    accepts_loss_kwargs = True  # num_items_in_batch, for transformers' Trainer
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012 (as above)

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @takes_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SynapticState | None = None,
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
        """Computes the logits of the next token at every position, and the loss if labels are given.

        Args:
            input_ids: int64 (B, T).
            attention_mask: (B, T), or (B, columns already read + T). 0 marks padding: no token attends to it, and it
                does not count as a position. Entries for columns already read are ignored.
            cache: the state to continue from. It is advanced in place unless ``use_cache`` is False. None
                starts a new text.
            inputs_embeds: (B, T, D), to give instead of ``input_ids``. The first layer norm is applied to them as well.
            labels: (B, T), aligned with ``input_ids`` as in all of transformers: the label of a position is the token
                at that position, predicted from the ones before. -100 is ignored.
            document_starts: bool (B, T): True marks the first token of a document. This token and those after it see
                nothing before it, neither in this call nor in ``cache``, and positions restart at 0.
            num_items_in_batch: the divisor of the summed loss; by default the number of labels that are not ignored.
            use_cache: whether to return the state. By default it is returned if one was given, and otherwise in
                evaluation mode without labels, if ``config.use_cache`` is set.
            logits_to_keep: compute only the logits of this many last positions (0: all), or of the positions in an
                index tensor. Cannot be combined with labels, which need all logits.
            attention_form: overrides ``config.attention_form``.
            output_hidden_states: whether to return v before the first and after each layer step, (B, T, D) each.
            **kwargs: further arguments, in three groups:

                - ``shift_labels`` (B, T): labels that are already shifted, instead of ``labels``. It is not a named
                  argument because transformers' Trainer requires every named argument with "label" in its name.
                - Other descriptions of packed documents: ``seq_idx`` (B, T), whose value changes where a document
                  starts; ``cu_seq_lens_q`` (documents + 1,) for a single sequence, with ``cu_seq_lens_k``,
                  ``max_length_q`` and ``max_length_k``; ``position_ids`` (B, T), which restart at 0 in each document.
                - Values that agree with the defaults: ``cache_position``, ``token_type_ids`` of zeros,
                  ``output_attentions=False``, None. Checking tensors on a GPU synchronizes with the device, so leave
                  out what you do not need.

        Returns:
            A :class:`BDHOutput`. With labels and more than ``MAX_LOGITS_IN_ONE_PIECE`` logits, the loss is computed in
            chunks of tokens and ``logits`` is None.

        Raises:
            TypeError: an argument is unknown, or ``cache`` is a cache of keys and values.
            ValueError: arguments contradict each other, have wrong shapes or ask for something the model does not have;
                token ids are outside the vocabulary (checked on the CPU); or the state belongs to another model or
                batch size. The state is left unchanged.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        kwargs["document_starts"] = document_starts
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, cache, kwargs)
        targets = shifted_labels(labels, shift_labels, logits_to_keep, inputs.v.shape[:2])  # (B, T) or None
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training and targets is None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if targets is None and use_cache and not output_hidden_states and input_ids is not None:
            logits = step_by_kernels(self, input_ids, inputs, attention_form)
            if logits is not None:
                return BDHOutput(logits=logits, cache=cache)
        hidden = run_layer(
            self,
            inputs,
            use_cache=use_cache,
            form=attention_form,
            keep_hidden_states=output_hidden_states,
            for_loss=targets is not None,
        )
        if targets is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            loss, logits = None, self.lm_head(hidden.v[:, kept])
        else:
            loss, logits = self._loss_and_logits(hidden.v, targets, num_items_in_batch)
        return BDHOutput(loss=loss, logits=logits, cache=hidden.state, hidden_states=hidden.every_v)

    def _loss_and_logits(
        self, v: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        targets, V = targets.reshape(-1).to(v.device), self.config.vocab_size
        if targets.numel() * V > MAX_LOGITS_IN_ONE_PIECE:
            chunk = max(1, MAX_LOGITS_IN_ONE_PIECE // V)
            loss = chunked_cross_entropy(
                v.flatten(0, 1), self.lm_head, targets, tokens_per_chunk=chunk, num_items=num_items
            )
            return loss, None
        logits = self.lm_head(v)
        return cross_entropy(logits.flatten(0, 1), targets, num_items=num_items), logits

    @classmethod
    def from_reference(
        cls, state_dict: dict[str, torch.Tensor], config: BDHConfig | dict[str, Any] | None = None
    ) -> "BDHForCausalLM":
        """Returns a model with weights of the published reference code, in evaluation mode.

        See :func:`bdh.model.conversion.from_reference` for the arguments and exceptions.
        """
        config, weights, dtype = from_reference(state_dict, config)
        model = cls(config).to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps `to`
        model.load_state_dict(weights)
        return model.eval()

    def to_reference(self) -> dict[str, torch.Tensor]:
        """Returns the weights in the layout of the published reference code.

        See :func:`bdh.model.conversion.to_reference` for the exceptions.
        """
        return to_reference(self.config, self)


class BDHForSequenceClassification(BDHPreTrainedModel):
    """A Dragon Hatchling with a classification or regression head, the linear module ``score`` (D -> num_labels).

    ``AutoModelForSequenceClassification.from_pretrained`` loads it from an exported language model, with a newly
    initialized head.
    """

    accepts_loss_kwargs = False  # the loss is a batch mean, so Trainer must divide accumulated losses

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.n_embd, config.num_labels or 2, bias=False)  # 2: transformers' default
        self.post_init()

    @takes_old_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> outputs.SequenceClassifierOutputWithPast:
        """Computes the logits (B, num_labels) of each text at its last token, and the loss if labels are given.

        The last token is the last one that ``attention_mask`` does not mask or, without a mask, the last that is not
        ``config.pad_token_id``.

        The other arguments and the exceptions are those of :meth:`bdh.BDHForCausalLM.forward`.

        Args:
            labels: int64 (B,) for classes, float (B,) for regression (``num_labels`` is 1), or float (B, num_labels)
                for several classes at once. As in all of transformers, ``config.problem_type`` selects the kind; if it
                is not set, ``num_labels`` and the dtype of the labels do.
        """
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, cache, kwargs)
        use_cache = cache is not None if use_cache is None else use_cache
        hidden = run_layer(
            self, inputs, use_cache=use_cache, keep_hidden_states=output_hidden_states, for_loss=labels is not None
        )
        v, (B, T) = hidden.v, hidden.v.shape[:2]
        is_token = attention_mask[:, -T:].bool() if attention_mask is not None else None
        if is_token is None and input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        columns = torch.arange(T, device=v.device)
        last = columns[-1:].expand(B) if is_token is None else (columns * is_token.to(v.device)).argmax(1)
        logits = self.score(v[torch.arange(B, device=v.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return outputs.SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            cache=hidden.state,  # type: ignore[arg-type]  # here it is a state
            hidden_states=hidden.every_v,
        )


# Importing an auto class of transformers imports this module (see bdh/__init__.py).
AutoModel.register(BDHConfig, BDHModel, exist_ok=True)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BDHConfig, BDHForSequenceClassification, exist_ok=True)
