"""The shape of a model, as transformers stores it in ``config.json``."""

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from bdh.model.config_fields import ALIASES, ConfigFields, name_faults

# Without `import bdh`, transformers looks into a model's folder for the code that it needs, and finds this.
STUB = "bdh_auto.py"
_STUB_TEXT = '''\
"""This model is run by the package bdh: pip install bdh. After `import bdh` nothing here is needed, nor trust_remote_code."""

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
    """Configuration of a BDH model.

    The names are those of the published reference code; the usual transformers names (``hidden_size``,
    ``num_attention_heads``, ``num_hidden_layers``) are aliases.

    Args:
        vocab_size: V, entries of the vocabulary.
        n_embd: D, the width of the residual stream.
        n_head: H, heads.
        n_layer: L, how often the one shared layer is applied.
        mlp_internal_dim_multiplier: neurons of all heads together, in multiples of D.
        dropout: share of the neurons' outputs x * y that training drops.
        rope_theta: base of the rotary frequencies.
        layer_norm_eps: added to the variance in every layer norm.
        initializer_range: standard deviation of fresh weights.
        tie_word_embeddings: only False: the two are separate weights.
        attention_form: "parallel", "chunked", "recurrent", or "auto", which takes the cheapest.
        chunk_size: tokens in a chunk of the chunked form.
        decay: half-life of the state, in tokens: what a head keeps of a token halves with every so many that follow.
            One number is that of the first head, and doubles from head to head; a list has one for each head, None
            for a head that never forgets. None for no head that does, as in the paper.
        train_block_size: tokens in the blocks that the model was trained on, where that is known. It limits nothing.

    Raises:
        ValueError: sizes that do not divide, a value out of range, a name given beside its alias with another
            value, or a misspelt name; the message has the numbers. Names that are like none of these are kept
            as attributes, as in all of transformers.
    """

    model_type = "bdh"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers adds lists to it)
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
        """Writes ``config.json``, and beside it the stub by which transformers says that it needs this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / STUB).write_text(_STUB_TEXT, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers, which calls it where the stub was used, would put copies of our modules beside models."""


AutoConfig.register("bdh", BDHConfig, exist_ok=True)
