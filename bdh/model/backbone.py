"""What all BDH models of transformers have in common, and the model without a head.

What they compute stands in :mod:`bdh.model.forward`, which knows nothing of transformers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from bdh.model.arguments import Inputs, read_inputs
from bdh.model.configuration import BDHConfig
from bdh.model.forward import Hidden, run_layer
from bdh.model.kernels import recheck_weights
from bdh.model.state import SynapticState
from bdh.ops.attention import sum_dtype
from bdh.ops.blocks.plan import LayerOptions


@dataclass
class BDHModelOutput(BaseModelOutputWithPast):
    """What ``forward`` of :class:`BDHModel` returns."""

    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]  # an output of transformers wants a default
    past_key_values: SynapticState | None = None  # type: ignore[assignment]


class BDHPreTrainedModel(PreTrainedModel):
    """What BDH models with any head, or none, have in common: the modules of the layer, and their computation.

    A head is a further module beside those of the layer, whose names are the same in all classes. So a class reads the
    weights that another has written.
    """

    config: BDHConfig
    config_class = BDHConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012 (transformers declares it as a class variable)

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        D, H, N = config.n_embd, config.n_head, config.neurons_per_head
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Linear(D, H * N, bias=False)
        self.encoder_v = nn.ModuleList(nn.Linear(D, N, bias=False) for _ in range(H))
        self.decoder = nn.Linear(H * N, D, bias=False)
        self.gradient_checkpointing = False
        self.layer_options = LayerOptions()

    def train(self, mode: bool = True) -> Any:
        recheck_weights(self)
        return super().train(mode)

    @property
    def base_model(self) -> "BDHModel":
        """The model without its head, as it is now: a :class:`BDHModel` of the same modules and settings.

        It is put together anew at each access. Weights and modules are shared, so that what changes them changes the
        model; settings such as ``train()`` and ``gradient_checkpointing_enable()``, and hooks, belong on the model itself.
        """
        backbone = BDHModel.__new__(BDHModel)
        nn.Module.__init__(backbone)  # with no hooks, which would run twice
        of_module = {*vars(backbone), "forward"} - {"training"}  # libraries replace the forward of the model
        vars(backbone).update((name, value) for name, value in vars(self).items() if name not in of_module)
        for name in ("embed", "encoder", "encoder_v", "decoder"):
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

    def new_state(self, batch_size: int = 1) -> SynapticState:
        """The state before the first token, for ``past_key_values``."""
        config = self.config
        shape = (batch_size, config.n_head, config.neurons_per_head, config.n_embd)
        return SynapticState.zeros(shape, config.n_layer, dtype=sum_dtype(self.dtype), device=self.device)

    def _read(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: SynapticState | None,
        inputs_embeds: torch.Tensor | None,
        others: dict[str, Any],
    ) -> Inputs:
        """The arguments of ``forward``, checked; ``others`` are those that not every ``forward`` names."""
        return read_inputs(
            self.config,
            self.embed,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            others=others,
            dtype=self.dtype,
        )

    def _keeps_hidden_states(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def _run(
        self,
        inputs: Inputs,
        use_cache: bool,
        form: str | None,
        output_hidden_states: bool | None,
        *,
        for_loss: bool = False,
    ) -> Hidden:
        keep_hidden_states = self._keeps_hidden_states(output_hidden_states)
        return run_layer(
            self, inputs, use_cache=use_cache, form=form, keep_hidden_states=keep_hidden_states, for_loss=for_loss
        )


class BDHModel(BDHPreTrainedModel):
    """A Dragon Hatchling without a head, which gives the residual stream after the last layer step.

    ``AutoModel.from_pretrained`` makes one of the export of a language model, whose head it leaves aside.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 (transformers declares it as a class variable)

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

        The arguments are those of :meth:`bdh.BDHForCausalLM.forward`, without those of its head.

        Raises:
            TypeError, ValueError: as there.
        """
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, kwargs)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        hidden = self._run(inputs, use_cache, attention_form, output_hidden_states)
        return BDHModelOutput(last_hidden_state=hidden.v, past_key_values=hidden.state, hidden_states=hidden.every_v)
