"""The model: one layer that the text passes through L times."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bdh.model.configuration import BDHConfig
from bdh.model.kernels import kernel_obstacle, recheck_weights, recurrence_of
from bdh.model.passes import BlockPasses, Passes, plan_for
from bdh.model.positions import token_positions
from bdh.model.state import SynapticState
from bdh.model.text import TextGenerationMixin
from bdh.ops.attention import sum_dtype
from bdh.ops.dispatch import attend, choose_step_path
from bdh.ops.layer.plan import LayerOptions
from bdh.ops.loss import IGNORE_INDEX, chunked_cross_entropy, cross_entropy
from bdh.ops.norm import layer_norm
from bdh.ops.reach import Reach
from bdh.ops.rope import rotate, rotation_table

# Above this many logits (128 MiB in float32) the loss is computed in chunks of tokens.
MAX_LOGITS_IN_ONE_PIECE = 2**25


@dataclass
class BDHOutput(CausalLMOutputWithPast):
    """What ``forward`` returns. ``logits`` is None where the loss was computed in chunks."""

    past_key_values: SynapticState | None = None  # type: ignore[assignment]


class BDHForCausalLM(TextGenerationMixin, PreTrainedModel, GenerationMixin):
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

    config: BDHConfig
    config_class = BDHConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch, for transformers' Trainer
    _is_stateful = True  # a sum cannot be rolled back, so no assisted generation
    _no_split_modules: list[str] = []  # noqa: RUF012 (transformers declares it as a class variable)

    def __init__(self, config: BDHConfig):
        super().__init__(config)
        D, H, N = config.n_embd, config.n_head, config.neurons_per_head
        self.embed = nn.Embedding(config.vocab_size, D)
        self.encoder = nn.Linear(D, H * N, bias=False)
        self.encoder_v = nn.ModuleList(nn.Linear(D, N, bias=False) for _ in range(H))
        self.decoder = nn.Linear(H * N, D, bias=False)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.layer_options = LayerOptions()
        self.post_init()

    def train(self, mode: bool = True) -> Any:
        recheck_weights(self)
        return super().train(mode)

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
                "label" in its name.) And ``output_attentions``, which must not be true: there are no weights.

        Returns:
            :class:`BDHOutput`. With labels and more than ``MAX_LOGITS_IN_ONE_PIECE`` logits, the loss is
            computed in chunks of tokens and ``logits`` is None.

        Raises:
            TypeError: an argument that is none of these.
            ValueError: wrong shapes, token ids outside of the vocabulary (on the CPU), or a state of
                another model or batch size; the state is left as it was.
        """
        config = self.config
        shift_labels = self._shift_labels(kwargs)
        return_dict = config.return_dict if return_dict is None else return_dict
        if output_hidden_states is None:
            output_hidden_states = bool(config.output_hidden_states)
        if use_cache is None:
            has_labels = labels is not None or shift_labels is not None
            use_cache = past_key_values is not None or (config.use_cache and not self.training and not has_labels)

        v = self._embed(input_ids, inputs_embeds)  # (B, T, D)
        B, T, _ = v.shape
        num_earlier = past_key_values.num_columns if past_key_values is not None else 0
        mask = self._new_columns(attention_mask, B, T, num_earlier)  # (B, T) or None
        starts = self._starts(document_starts, B, T)  # (B, T) or None
        targets = self._targets(labels, shift_labels, logits_to_keep, B, T)  # (B, T) or None
        state = past_key_values
        if state is not None:
            self._check_state(state, B)
        elif use_cache:
            shape = (B, config.n_head, config.neurons_per_head, config.n_embd)
            state = SynapticState.zeros(shape, 0, device=v.device)  # the passes add their sums
        if past_key_values is not None and T == 1 and mask is None and starts is None and targets is None:
            step = self._kernel_step(input_ids, past_key_values, use_cache, attention_form, output_hidden_states)
            if step is not None:
                output = BDHOutput(logits=step, past_key_values=past_key_values)
                return output if return_dict else output.to_tuple()
        if not torch.compiler.is_compiling():
            recheck_weights(self)  # a prompt: the tokens after it are read by the kernels
        before = state.positions if state is not None and state.sums else None
        positions, following = token_positions(T, before=before, mask=mask, starts=starts, device=v.device)
        reach = self._reach(starts, mask)
        form = attention_form or config.attention_form
        is_step = T == 1 and past_key_values is not None
        # What keeps no state is no prompt, but is evaluated by its logits.
        plan = plan_for(self, B, T, form, for_loss=targets is not None or not use_cache) if not is_step else None
        passes: Passes
        if plan is not None and plan.path != "plain":
            passes = BlockPasses.of(self, plan, positions, (B, T), mask=mask, reach=reach, keep_state=use_cache)
        else:
            num_kept = config.n_layer if plan is None else plan.kept_passes
            table = rotation_table(positions, config.neurons_per_head, config.rope_theta, self.embed.weight.dtype)
            passes = _PlainPasses(self, num_kept, table[:, None], mask, reach, form, use_cache)

        hidden_states = [v]
        for index in range(config.n_layer):
            sums = past_key_values.sums[index] if past_key_values is not None else None
            v, sums = passes.run(index, v, sums)
            if use_cache and state is not None and sums is not None:
                state.sums[index : index + 1] = [sums]
            if output_hidden_states:
                hidden_states.append(v)
        if use_cache and state is not None:
            state.positions = following.expand(B).clone()
            state.num_columns += T

        loss, logits = self._loss_and_logits(v, targets, num_items_in_batch, logits_to_keep)
        output = BDHOutput(
            loss=loss,
            logits=logits,
            past_key_values=state if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()

    def _kernel_step(
        self,
        input_ids: torch.Tensor | None,
        state: SynapticState,
        use_cache: bool,
        attention_form: str | None,
        output_hidden_states: bool,
    ) -> torch.Tensor | None:
        """Logits (B, 1, V) of one token for each row, by the sparse kernels; None where they do not serve."""
        form = attention_form or self.config.attention_form
        is_plain = use_cache and form == "auto" and not output_hidden_states and not torch.is_grad_enabled()
        if not is_plain or input_ids is None or self.training or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(self.device.type) or self.config.half_lives is not None:
            return None
        if any(sums.requires_grad for sums in state.sums):
            return None
        if choose_step_path("auto", device=self.device, obstacle=kernel_obstacle(self)).name != "kernels":
            return None
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

    @staticmethod
    def _shift_labels(kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The only further argument of ``forward``; what else may be given without meaning anything is dropped."""
        unknown = sorted(set(kwargs) - {"shift_labels", "output_attentions"})
        if unknown:
            raise TypeError(f"forward does not know {', '.join(unknown)}")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is True: linear attention computes no weights, must be False")
        return kwargs.get("shift_labels")

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward takes either input_ids or inputs_embeds: give exactly one of them")
        if input_ids is not None:
            if input_ids.ndim != 2 or 0 in input_ids.shape:
                raise ValueError(
                    f"input_ids has shape {tuple(input_ids.shape)}: must be (batch, tokens) with at least 1 token"
                )
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                lowest, highest = input_ids.min().item(), input_ids.max().item()
                if lowest < 0 or highest >= self.config.vocab_size:
                    raise ValueError(
                        f"input_ids has ids from {lowest} to {highest}: must be within 0 to "
                        f"{self.config.vocab_size - 1}, the model's vocabulary"
                    )
            inputs_embeds = self.embed(input_ids)
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[2] != self.config.n_embd:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}: must be (batch, tokens, "
                f"{self.config.n_embd}) with at least 1 token"
            )
        return layer_norm(inputs_embeds, self.config.layer_norm_eps)

    @staticmethod
    def _new_columns(attention_mask: torch.Tensor | None, B: int, T: int, num_earlier: int) -> torch.Tensor | None:
        """The part of a mask that belongs to the T new columns, as bool (B, T); None where nothing is masked."""
        if attention_mask is None:
            return None
        if tuple(attention_mask.shape) not in [(B, T), (B, num_earlier + T)]:
            earlier = f" or, with the columns fed before, {(B, num_earlier + T)}" if num_earlier else ""
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: must be {(B, T)}{earlier}")
        mask = attention_mask[:, -T:].bool()
        # A mask costs one more sweep over the neurons, and a rotation for each row.
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return None
        return mask

    @staticmethod
    def _starts(document_starts: torch.Tensor | None, B: int, T: int) -> torch.Tensor | None:
        if document_starts is None:
            return None
        if tuple(document_starts.shape) != (B, T) or document_starts.dtype != torch.bool:
            raise ValueError(
                f"document_starts is {document_starts.dtype} of shape {tuple(document_starts.shape)}: must be bool "
                f"{(B, T)}, that of the tokens"
            )
        return document_starts

    @staticmethod
    def _targets(
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        B: int,
        T: int,
    ) -> torch.Tensor | None:
        """What is to be predicted at each position, (B, T); None without labels."""
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is None:
                continue
            if tuple(given.shape) != (B, T):
                raise ValueError(f"{name} has shape {tuple(given.shape)}: must be {(B, T)}, that of the tokens")
            if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep != 0:
                raise ValueError(f"logits_to_keep was given with {name}: the loss needs the logits of all positions")
        if shift_labels is None and labels is not None:
            return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        return shift_labels

    def _check_state(self, state: SynapticState, B: int) -> None:
        config = self.config
        expected = (B, config.n_head, config.neurons_per_head, config.n_embd)
        shapes = [tuple(s.shape) for s in state.sums]  # not a set: sizes may be symbols, which cannot be hashed
        if shapes != [expected] * config.n_layer:
            raise ValueError(
                f"the state has sums of shapes {sorted(set(shapes))} for {len(state.sums)} passes: this model and batch "
                f"need {expected} for {config.n_layer}"
            )
        dtypes = {s.dtype for s in state.sums}
        if dtypes != {sum_dtype(self.dtype)}:
            raise ValueError(
                f"the state has sums in {', '.join(sorted(map(str, dtypes)))}: a model in {self.dtype} keeps them in "
                f"{sum_dtype(self.dtype)}"
            )

    def _reach(self, starts: torch.Tensor | None, mask: torch.Tensor | None) -> Reach | None:
        """What weighs the past of a token; None where all of it counts alike."""
        half_lives = self.config.half_lives
        if half_lives is None:
            return None if starts is None else Reach(starts)
        dtype, device = sum_dtype(self.dtype), self.embed.weight.device
        return Reach(starts, torch.tensor(half_lives, dtype=dtype, device=device), mask)

    def _loss_and_logits(
        self,
        v: torch.Tensor,
        targets: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
        logits_to_keep: int | torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        v = v.to(self.embed.weight.dtype)
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

    def new_state(self, batch_size: int = 1) -> SynapticState:
        """The state before the first token, for ``past_key_values``."""
        config = self.config
        shape = (batch_size, config.n_head, config.neurons_per_head, config.n_embd)
        return SynapticState.zeros(shape, config.n_layer, dtype=sum_dtype(self.dtype), device=self.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tells `generate` to make no cache of keys and values: ``forward`` makes the state."""
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]  # what it calls a cache is a state here
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SynapticState | None = None,
        attention_mask: torch.Tensor | None = None,  # named, as `generate` looks at the names
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` feeds in a step; it goes on from a state as transformers does from a cache.

        ``input_ids`` is the whole text of which the state has read the first columns, or only the new tokens, if the
        ``attention_mask`` has a column for each one read before, too.

        Raises:
            ValueError: ``input_ids`` has no column that the state has not read and the mask does not say that all
                are new, or a state is given without ``use_cache``.
        """
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
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        return prepare(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
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


@dataclass(frozen=True)
class _PlainPasses:
    """The passes as the equations are, by autograd, over all tokens at once."""

    model: BDHForCausalLM
    num_kept: int
    """The first so many passes keep their activations for the backward pass; those of the others are recomputed."""
    table: torch.Tensor  # (1 or B, 1, T, N/2), complex: one row where all stand at the same positions
    mask: torch.Tensor | None
    reach: Reach | None
    form: str
    keep_state: bool

    def run(self, index: int, v: torch.Tensor, sums: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if index < self.num_kept:
            return self._layer(v, self.table, sums)
        checkpointed = getattr(self.model, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))
        return checkpointed(self._layer, v, self.table, sums)

    def _layer(
        self, v: torch.Tensor, table: torch.Tensor, sums: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass: (B, T, D) to (B, T, D), and the new sums (B, H, N, D) where they are kept."""
        model, config, mask = self.model, self.model.config, self.mask
        H, N, eps = config.n_head, config.neurons_per_head, config.layer_norm_eps
        dtype = model.embed.weight.dtype  # autocast, where it is on, overrides it
        v_in = v.to(dtype)
        x = F.relu(model.encoder(v_in))  # (B, T, H*N): which neurons fire
        if mask is not None:
            x = x * mask.to(x.dtype)[..., None]
        q = rotate(x.unflatten(-1, (H, N)).transpose(1, 2), table).contiguous()  # (B, H, T, N)
        a, sums = attend(
            q, v_in, sums, form=self.form, chunk_size=config.chunk_size, reach=self.reach, keep_state=self.keep_state
        )
        a = layer_norm(a, eps).to(dtype)  # (B, H, T, D)
        y = F.relu(torch.cat([head(a[:, h]) for h, head in enumerate(model.encoder_v)], dim=-1))  # (B, T, H*N)
        z = F.dropout(x * y, config.dropout, training=model.training)
        return layer_norm(v + layer_norm(model.decoder(z), eps), eps), sums


AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)
