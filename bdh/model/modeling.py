"""BDH in transformers' classes: arguments, loss, the state as a cache. :mod:`bdh.model.forward` computes, and knows none of these."""

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

from bdh.model.arguments import StateForGeneration, read_inputs, shifted_labels
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
    """What ``forward`` of :class:`BDHModel` returns."""

    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]  # an output of transformers wants a default
    past_key_values: SynapticState | None = None  # type: ignore[assignment]


@dataclass
class BDHOutput(outputs.CausalLMOutputWithPast):
    """What ``forward`` returns. ``logits`` is None where the loss was computed in chunks."""

    past_key_values: SynapticState | None = None  # type: ignore[assignment]


class BDHPreTrainedModel(TraceMethod, PreTrainedModel):
    """The modules of the layer, with the same names in all classes: so a class reads the weights that another has written."""

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
        """Fills what was not read from a file."""
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            init.constant_(module.packed, 255)  # with scales that are no numbers, which check_packed finds
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As that of all of transformers' models."""
        loaded = super().from_pretrained(*arguments, **options)
        keep_as_saved(loaded[0] if isinstance(loaded, tuple) else loaded)  # with output_loading_info a tuple
        return loaded

    def train(self, mode: bool = True) -> Any:
        recheck_weights(self)
        return super().train(mode)

    @property
    def base_model(self) -> "BDHModel":
        """The model without its head, as it is now: a :class:`BDHModel` of the same modules and settings.

        It is made anew at each access. Weights and modules are shared; settings such as ``train()`` and
        ``gradient_checkpointing_enable()``, and hooks, belong on the model itself.
        """
        backbone = BDHModel.__new__(BDHModel)
        nn.Module.__init__(backbone)  # with no hooks, which would run twice
        of_module = {*vars(backbone), "forward"} - {"training"}  # libraries replace the forward of the model
        vars(backbone).update((name, value) for name, value in vars(self).items() if name not in of_module)
        for name in ("embed", "encoder", "encoder_v", "decoder", "hook_points"):
            setattr(backbone, name, getattr(self, name))
        return backbone

    def get_decoder(self) -> "BDHModel":
        """:attr:`base_model`, and not the layer of this name."""
        return self.base_model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The model itself, as of all that have no encoder in transformers' sense."""
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
        """Of the plain weights; quantized ones are multiplied with in the dtype of what comes in."""
        return plain_tensor(self).dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As in all of transformers; quantized weights count as the numbers that they are, none of which is trained."""
        plain = super().num_parameters(only_trainable, exclude_embeddings)
        return plain if only_trainable else plain + num_quantized_weights(self, embeddings=not exclude_embeddings)

    def new_state(self, batch_size: int = 1) -> SynapticState:
        """The state before the first token, for ``past_key_values``."""
        config = self.config
        shape = (batch_size, config.n_head, config.neurons_per_head, config.n_embd)
        return SynapticState.zeros(shape, config.n_layer, dtype=sum_dtype(self.dtype), device=self.device)


class BDHModel(BDHPreTrainedModel):
    """A Dragon Hatchling without a head, which gives the residual stream after the last layer step.

    ``AutoModel.from_pretrained`` makes one of the export of a language model, whose head it leaves aside.
    """

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        self.post_init()

    @property
    def base_model(self) -> "BDHModel":
        """The model itself."""
        return self

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        attention_form: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BDHModelOutput:
        """The residual stream after the last layer step, ``last_hidden_state`` (B, T, D), in the dtype of the model.

        The arguments, and what is raised, are those of :meth:`bdh.BDHForCausalLM.forward`, without those of its head.
        """
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, past_key_values, kwargs)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        hidden = run_layer(
            self, inputs, use_cache=use_cache, form=attention_form, keep_hidden_states=output_hidden_states
        )
        return BDHModelOutput(last_hidden_state=hidden.v, past_key_values=hidden.state, hidden_states=hidden.every_v)


class BDHForCausalLM(TextMethods, BDHPreTrainedModel, StateForGeneration, GenerationMixin):  # type: ignore[misc]
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

    Elsewhere in the code E, Ev and Dec are the encoder, encoder_v and decoder: not the paper's E.

    ``embed`` and ``lm_head`` are not tied, no layer has a bias and no layer norm has parameters. The same
    layer is applied ``config.n_layer`` times. The attention is linear, its state a :class:`SynapticState`.
    """

    accepts_loss_kwargs = True  # num_items_in_batch, for transformers' Trainer
    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012 (as above)

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
            attention_mask: (B, T), or (B, columns read before + T): 0 marks padding, which no token sees and which takes up
                no position. What it says of columns read before is ignored.
            past_key_values: the state to continue from, advanced in place unless ``use_cache`` is False. None starts a text.
            inputs_embeds: (B, T, D) instead of ``input_ids``; the first layer norm is applied to them too.
            labels: (B, T), aligned with ``input_ids`` as in all of transformers: the label of a position is its own token,
                predicted from the ones before. -100 is not counted.
            document_starts: bool (B, T): True marks the first token of a document. It and what follows see nothing
                before it, of this call or of ``past_key_values``, and positions count from it.
            num_items_in_batch: divides the summed loss instead of the number of counted labels.
            use_cache: return the state. By default where one was given, or else outside of training without labels.
            logits_to_keep: compute the logits of the last so many positions only (0: of all), or of the positions in an
                index tensor. Not together with labels, which need all of them.
            attention_form: overrides the configuration's.
            output_hidden_states: return v before the first and after each layer step, (B, T, D) each.
            **kwargs: ``shift_labels`` (B, T), labels already shifted, which replace ``labels`` (transformers' Trainer wants every
                named argument with "label" in its name). Other descriptions of packed documents: ``seq_idx`` (B, T), which
                changes where one starts; ``cu_seq_lens_q`` (documents + 1,) of one sequence, with ``cu_seq_lens_k``,
                ``max_length_q`` and ``max_length_k``; ``position_ids`` (B, T), which count from 0 in each document. And what
                agrees with the defaults: ``cache_position``, ``token_type_ids`` of zeros, ``output_attentions=False``, None.
                Comparing them on a GPU makes the host wait for it: leave out what is not needed.

        Returns:
            :class:`BDHOutput`. With labels and more than ``MAX_LOGITS_IN_ONE_PIECE`` logits, the loss is computed in chunks
            of tokens and ``logits`` is None.

        Raises:
            TypeError: an argument that is none of these, or a cache of keys and values.
            ValueError: arguments that contradict each other or ask for what the model has not, wrong shapes, token ids outside
                of the vocabulary (on the CPU), or a state of another model or batch size; the state is left as it was.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        kwargs["document_starts"] = document_starts
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, past_key_values, kwargs)
        targets = shifted_labels(labels, shift_labels, logits_to_keep, inputs.v.shape[:2])  # (B, T) or None
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training and targets is None)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if targets is None and use_cache and not output_hidden_states and input_ids is not None:
            logits = step_by_kernels(self, input_ids, inputs, attention_form)
            if logits is not None:
                return BDHOutput(logits=logits, past_key_values=past_key_values)
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
        return BDHOutput(loss=loss, logits=logits, past_key_values=hidden.state, hidden_states=hidden.every_v)

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
        """A model with the weights of the published reference code; see :func:`bdh.model.conversion.from_reference`."""
        config, weights, dtype = from_reference(state_dict, config)
        model = cls(config).to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps `to`
        model.load_state_dict(weights)
        return model.eval()

    def to_reference(self) -> dict[str, torch.Tensor]:
        """The weights in the layout of the published reference code; see :func:`bdh.model.conversion.to_reference`."""
        return to_reference(self.config, self)


class BDHForSequenceClassification(BDHPreTrainedModel):
    """A Dragon Hatchling that tells texts apart: ``score`` is a ``Linear`` from D to ``config.num_labels``.

    ``AutoModelForSequenceClassification.from_pretrained`` makes one of the export of a language model, with a new head.
    """

    accepts_loss_kwargs = False  # the loss is the mean of a batch, whatever transformers' Trainer accumulates

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
    ) -> outputs.SequenceClassifierOutputWithPast:
        """Logits (B, num_labels) of each text, at its last token, and the loss where labels are given.

        The last token is that of ``attention_mask``; without one, the last that is not ``config.pad_token_id``.

        Args:
            labels: of classes int64 (B,); of regression (``num_labels`` 1) float (B,); of several classes at once float
                (B, num_labels). ``config.problem_type`` says which, or follows from them, as in all of transformers.

        The other arguments, and what is raised, are those of :meth:`bdh.BDHForCausalLM.forward`.
        """
        inputs = read_inputs(self, input_ids, inputs_embeds, attention_mask, past_key_values, kwargs)
        use_cache = past_key_values is not None if use_cache is None else use_cache
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
            past_key_values=hidden.state,  # type: ignore[arg-type]  # a state here
            hidden_states=hidden.every_v,
        )


# Importing an auto class imports this module (bdh.autoregister).
AutoModel.register(BDHConfig, BDHModel, exist_ok=True)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BDHConfig, BDHForSequenceClassification, exist_ok=True)
