"""The model that a run starts from, where it does not start from nothing."""

import copy
import logging
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from bdh.model import BDHForCausalLM
from bdh.tokenizer import TextEncoder, TokenizerConfig, is_byte_tokenizer, load_tokenizer
from bdh.tokenizer.chat import CHAT_TOKENS, add_special_tokens
from bdh.tokenizer.plain import NUM_BYTES
from bdh.train.config import LoraSettings, ModelSettings, RunSettings
from bdh.train.models import open_model
from bdh.vocabulary import vocabulary_size

_logger = logging.getLogger(__name__)
# What the weights fix. The rest, such as dropout, is the new run's to choose.
_TAKEN_OVER = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "rope_theta")
_ONE_ROW_A_TOKEN = ("embed.weight", "lm_head.weight")


class InitialModel:
    """The model that ``train.init_from`` names: its sizes, its tokenizer and its weights."""

    def __init__(self, name: str):
        """
        Raises:
            FileNotFoundError: there is no such model.
            ValueError: it is no BDH model, or is damaged.
        """
        self.name = name
        opened = open_model(name)
        self.base = opened.pinned()
        """Which model exactly it is that the run starts from."""
        self._model = opened.merged()
        self._tokenizer_path = opened.tokenizer.path
        self._tokenizer = load_tokenizer(opened.tokenizer)
        self._data: dict[str, Any] | None = getattr(self._model.config, "train_data", None)  # where it says so
        if opened.checkpoint is not None:
            training = opened.checkpoint.training
            self._data = {"source": training["data_facts"]["source"], "fingerprint": training["data_fingerprint"]}

    def completed(self, settings: RunSettings) -> RunSettings:
        """The settings with the sizes, and unless another was chosen the tokenizer, of this model.

        Raises:
            ValueError: a size or a vocabulary was chosen that is not this model's.
        """
        defaults = {field.name: field.default for field in fields(ModelSettings)}
        sizes = {name: getattr(self._model.config, name) for name in _TAKEN_OVER}
        wrong = [
            f"model.{name} is {value!r}, but {self.name} has {sizes[name]!r}"
            for name in _TAKEN_OVER
            if (value := getattr(settings.model, name)) not in (defaults[name], sizes[name])
        ]
        if wrong:
            raise ValueError(
                f"train.init_from fixes the sizes of the model: {'; '.join(wrong)}. Leave them out, and they follow"
            )
        # A decay may be added, but one that the weights were trained with is not lost by leaving it out.
        decay = self._model.config.decay if settings.model.decay is None else settings.model.decay
        tokenizer = settings.tokenizer
        template = tokenizer.chat_template
        if tokenizer == TokenizerConfig(chat_template=template):
            tokenizer = replace(self._tokenizer_settings(), chat_template=template)
        return replace(settings, model=replace(settings.model, **sizes, decay=decay), tokenizer=tokenizer)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Warns where the run's tokenizer gives other tokens than the model was trained on.

        Raises:
            ValueError: it has another number of entries.
        """
        known = copy.deepcopy(self._tokenizer)
        if len(tokenizer) > len(known) and tokenizer.chat_template:
            new = [token for token in CHAT_TOKENS if token in set(tokenizer.get_vocab()) - set(known.get_vocab())]
            add_special_tokens(known, new)
            _logger.warning("%s does not know %s: they start from random weights", self.name, ", ".join(new))
        if vocabulary_size(tokenizer) != vocabulary_size(known):
            raise ValueError(
                f"the run's tokenizer has {vocabulary_size(tokenizer)} entries, but {self.name} was trained with one of "
                f"{vocabulary_size(self._tokenizer)}: leave tokenizer.path out, and it takes that one"
            )
        if TextEncoder(tokenizer).hash != TextEncoder(known).hash:
            _logger.warning(
                "the tokenizer is not the one that %s was trained with: its tokens mean other text", self.name
            )

    def check_data(self, fingerprint: str) -> None:
        """Says where the run's data are others than those the model was trained on, if that is known."""
        data = self._data or {}
        if data.get("fingerprint", fingerprint) != fingerprint:
            _logger.warning("%s was trained on other data, %s", self.name, data["source"])

    def copy_into(self, model: BDHForCausalLM) -> None:
        """Gives a model of the same sizes the weights, in the model's own dtype.

        Of a larger vocabulary, the entries at its end keep the weights that they have.
        """
        model.config.layer_norm_eps = self._model.config.layer_norm_eps
        weights = self._model.state_dict()
        V = self._model.config.vocab_size
        if model.config.vocab_size > V:
            own = model.state_dict()
            weights |= {name: torch.cat([weights[name], own[name][V:].cpu()]) for name in _ONE_ROW_A_TOKEN}
        model.load_state_dict(weights)

    def check_lora(self, lora: LoraSettings, model: BDHForCausalLM) -> None:
        """
        Raises:
            ValueError: there are tokens that this model does not know, and nothing would train their weights.
        """
        num_new = model.config.vocab_size - self._model.config.vocab_size
        if lora.r and num_new > 0 and not lora.embeddings:
            raise ValueError(
                f"{self.name} does not know the last {num_new} tokens of the vocabulary, and train.lora would leave their "
                "weights random: set train.lora.embeddings=true, or start from a model that knows them"
            )

    def _tokenizer_settings(self) -> TokenizerConfig:
        if is_byte_tokenizer(self._tokenizer) and self._tokenizer.chat_template is None:
            return TokenizerConfig(special_tokens=len(self._tokenizer) > NUM_BYTES)
        return TokenizerConfig(path=self._tokenizer_path)
