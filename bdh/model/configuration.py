"""The model configuration that transformers reads from and writes to ``config.json``."""

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from bdh.model.config_fields import ALIASES, ConfigFields, name_faults

# Without `import bdh`, transformers looks for the model's code in the model folder. There it finds this file.
STUB = "bdh_auto.py"
_STUB_TEXT = '''\
"""This model is run by the package bdh, which has to be installed. After `import bdh` nothing here is needed, nor trust_remote_code."""

from bdh import BDHConfig, BDHForCausalLM, BDHForSequenceClassification, BDHModel
'''
_AUTO_MAP = {
    "AutoConfig": "bdh_auto.BDHConfig",
    "AutoModel": "bdh_auto.BDHModel",
    "AutoModelForCausalLM": "bdh_auto.BDHForCausalLM",
    "AutoModelForSequenceClassification": "bdh_auto.BDHForSequenceClassification",
}


@strict
class BDHConfig(ConfigFields, PreTrainedConfig):
    """The configuration of a BDH model.

    The fields have the names of the published reference code. The usual transformers names (``hidden_size``,
    ``num_attention_heads``, ``num_hidden_layers``) are aliases for three of them.

    Args:
        vocab_size: V, the number of vocabulary entries.
        n_embd: D, the width of the residual stream.
        n_head: H, the number of heads.
        n_layer: L, the number of times that the one shared layer is applied.
        mlp_internal_dim_multiplier: the number of neurons in all heads together, as a multiple of D.
        dropout: the fraction of the neurons' outputs x * y that is dropped during training.
        rope_theta: the base of the rotary frequencies.
        layer_norm_eps: added to the variance in every layer norm.
        initializer_range: the standard deviation of newly initialized weights.
        tie_word_embeddings: must be False: the embedding and the head are separate weights.
        attention_form: "parallel", "chunked", "recurrent", or "auto", which chooses the cheapest.
        chunk_size: the number of tokens in a chunk of the chunked form.
        decay: the half-life of the state, in tokens: a token's contribution to the state halves each time that many
            further tokens are read. A single number is the half-life of the first head, and each further head has
            twice that of the one before. A list gives each head its own, or None for a head that never forgets. With
            None, the default, no head forgets, as in the paper.
        train_block_size: the number of tokens in the blocks that the model was trained on, if known. Longer texts are
            still allowed.

    Raises:
        ValueError: sizes do not divide evenly, a value is out of range, a field and its alias have different values,
            or a name looks like a misspelt field. The message states the values. Names that resemble no field are
            kept as attributes, as in every transformers configuration.
    """

    model_type = "bdh"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (transformers adds lists to it)
    attribute_map = dict(ALIASES)  # noqa: RUF012 (transformers declares it as a class variable)

    def __post_init__(self, **kwargs):
        known = type(self).__dataclass_fields__
        given = {name: value for name, each in known.items() if (value := getattr(self, name)) != each.default}
        others = {
            name: value for name, value in kwargs.items() if name in ALIASES or not hasattr(PreTrainedConfig, name)
        }
        faults = name_faults(given, others, known)
        super().__post_init__(**kwargs)  # resolves the aliases
        faults += self.value_faults()
        if faults:
            raise ValueError("; ".join(faults))
        self.auto_map = dict(_AUTO_MAP)

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes ``config.json``, and a stub module that tells users without this package to install it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / STUB).write_text(_STUB_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing. transformers calls it for models loaded by the stub, and would save copies of our modules."""


AutoConfig.register("bdh", BDHConfig, exist_ok=True)
