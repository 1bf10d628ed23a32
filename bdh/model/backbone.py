"""The model without a head: one layer that the text passes through L times."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from bdh.model.arguments import Inputs, read_inputs
from bdh.model.configuration import BDHConfig
from bdh.model.kernels import recheck_weights
from bdh.model.passes import BlockPasses, Passes, plan_for
from bdh.model.positions import token_positions
from bdh.model.state import Columns, SynapticState
from bdh.ops import eager
from bdh.ops.attention import DecayMask, sum_dtype
from bdh.ops.blocks.plan import LayerOptions
from bdh.ops.rope import rotation_table


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
        document_starts: torch.Tensor | None,
        others: dict[str, Any],
    ) -> Inputs:
        """The arguments of ``forward``, checked. ``others`` must all be such as mean nothing."""
        return read_inputs(
            self.config,
            self.embed,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            document_starts=document_starts,
            others=others,
            dtype=self.dtype,
        )

    def _all_passes(
        self,
        inputs: Inputs,
        *,
        use_cache: bool,
        form: str | None,
        keep_hidden_states: bool | None,
        for_loss: bool,
    ) -> BDHModelOutput:
        """The backbone of every ``forward``.

        Args:
            for_loss: whether a loss is computed from it.
        """
        config, mask, starts = self.config, inputs.mask, inputs.starts
        v, given = inputs.v, inputs.state
        B, T, _ = v.shape
        form = form or config.attention_form
        if keep_hidden_states is None:
            keep_hidden_states = bool(config.output_hidden_states)
        state = given
        if given is not None and use_cache:
            given.remember(inputs, self._advance)
        if state is None and use_cache:
            shape = (B, config.n_head, config.neurons_per_head, config.n_embd)
            state = SynapticState.zeros(shape, 0, device=v.device)  # the passes add their sums
        if not torch.compiler.is_compiling():
            recheck_weights(self)  # a prompt: the tokens after it are read by the kernels
        before = given.positions if given is not None else None
        positions, following = token_positions(T, before=before, mask=mask, starts=starts, device=v.device)
        decay_mask = self._decay_mask(starts, mask)
        is_step = T == 1 and given is not None
        # Blocks break the graph that torch.compile makes. It saves memory in training; what is not trained stays whole.
        is_one_graph = torch.compiler.is_exporting() or (
            torch.compiler.is_compiling() and not (for_loss or self.training)
        )
        # What keeps no state is no prompt, but is evaluated by its logits.
        plan = None
        if not (is_step or is_one_graph):
            plan = plan_for(self, B, T, form, for_loss=for_loss or not use_cache)
        passes: Passes
        if plan is not None and plan.path != "plain":
            passes = BlockPasses.of(
                self, plan, positions, (B, T), mask=mask, decay_mask=decay_mask, keep_state=use_cache
            )
        else:
            num_kept = config.n_layer if plan is None else plan.kept_passes
            table = rotation_table(positions, config.neurons_per_head, config.rope_theta, self.embed.weight.dtype)
            spec = eager.EagerSpec(
                table=table[:, None],
                eps=config.layer_norm_eps,
                dtype=self.embed.weight.dtype,
                form=form,
                chunk_size=config.chunk_size,
                decay_mask=decay_mask,
                mask=mask,
                dropout=config.dropout if self.training else 0.0,
                keep_state=use_cache,
            )
            passes = _PlainPasses(self, num_kept, spec)

        hidden_states = [v]
        for index in range(config.n_layer):
            sums = given.sums[index] if given is not None else None
            v, sums = passes.run(index, v, sums)
            if use_cache and state is not None and sums is not None:
                state.sums[index : index + 1] = [sums]
            if keep_hidden_states:
                hidden_states.append(v)
        if use_cache and state is not None:
            state.positions = following.expand(B).clone()
            state.num_columns += T
        return BDHModelOutput(
            last_hidden_state=v.to(self.embed.weight.dtype),
            past_key_values=state if use_cache else None,
            hidden_states=tuple(hidden_states) if keep_hidden_states else None,
        )

    @torch.no_grad()
    def _advance(self, state: SynapticState, columns: Columns) -> None:
        """Reads columns into a state."""
        inputs = Inputs(columns.v, columns.mask, columns.starts, state)
        self._all_passes(inputs, use_cache=True, form=None, keep_hidden_states=False, for_loss=False)

    def _decay_mask(self, starts: torch.Tensor | None, mask: torch.Tensor | None) -> DecayMask | None:
        """What weighs the past of a token; None where all of it counts alike."""
        half_lives = self.config.half_lives
        if half_lives is None:
            return None if starts is None else DecayMask(starts)
        dtype, device = sum_dtype(self.dtype), self.embed.weight.device
        return DecayMask(starts, torch.tensor(half_lives, dtype=dtype, device=device), mask)


class BDHModel(BDHPreTrainedModel):
    """A Dragon Hatchling without a head, which gives the residual stream after the last pass.

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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        use_cache: bool | None = None,
        attention_form: str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BDHModelOutput | tuple[Any, ...]:
        """The residual stream after the last pass, ``last_hidden_state`` (B, T, D), in the dtype of the model.

        The arguments are those of :meth:`bdh.BDHForCausalLM.forward`, without those of its head.

        Raises:
            TypeError, ValueError: as there.
        """
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, document_starts, kwargs)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        output = self._all_passes(
            inputs,
            use_cache=use_cache,
            form=attention_form,
            keep_hidden_states=output_hidden_states,
            for_loss=False,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


@dataclass(frozen=True)
class _PlainPasses:
    """The layer steps by autograd, over all tokens at once."""

    model: BDHPreTrainedModel
    num_kept: int
    """The first so many passes keep their activations for the backward pass; those of the others are recomputed."""
    spec: eager.EagerSpec

    def run(self, index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = eager.Layer(self.model.encoder, list(self.model.encoder_v), self.model.decoder)
        if index < self.num_kept:
            return eager.train(v, layer, self.spec, sums)
        checkpointed = getattr(self.model, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))
        return checkpointed(eager.train, v, layer, self.spec, sums)
