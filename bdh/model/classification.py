"""The classifier of whole texts: the backbone, and a head at the last token of each."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from bdh.model.backbone import BDHPreTrainedModel
from bdh.model.configuration import BDHConfig
from bdh.model.state import SynapticState


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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SynapticState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits (B, num_labels) of each text, at its last token, and the loss where labels are given.

        The last token is that of ``attention_mask``; without one, the last that is not ``config.pad_token_id``.

        Args:
            labels: of classes int64 (B,); of regression (``num_labels`` 1) float (B,); of several classes at once float
                (B, num_labels). ``config.problem_type`` says which, or follows from them, as in all of transformers.

        The other arguments are those of :meth:`bdh.BDHForCausalLM.forward`.

        Raises:
            TypeError, ValueError: as there.
        """
        inputs = self._read(input_ids, attention_mask, past_key_values, inputs_embeds, None, kwargs)
        hidden = self._all_passes(
            inputs,
            use_cache=past_key_values is not None if use_cache is None else use_cache,
            form=None,
            keep_hidden_states=output_hidden_states,
            for_loss=labels is not None,
        )
        B, T, _ = inputs.v.shape
        is_token = attention_mask[:, -T:].bool() if attention_mask is not None else None
        if is_token is None and input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        v = hidden.last_hidden_state
        columns = torch.arange(T, device=v.device)
        last = columns[-1:].expand(B) if is_token is None else (columns * is_token.to(v.device)).argmax(1)
        logits = self.score(v[torch.arange(B, device=v.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=hidden.past_key_values,  # type: ignore[arg-type]  # a state here
            hidden_states=hidden.hidden_states,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
