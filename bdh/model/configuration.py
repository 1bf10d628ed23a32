"""The shape of a model, as transformers stores it in ``config.json``."""

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from bdh.model.network import ALIASES, config_faults, misspelt
from bdh.model.shape import DerivedSizes

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
class BDHConfig(PreTrainedConfig, DerivedSizes):
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

    vocab_size: int = 256
    n_embd: int = 256
    n_head: int = 4
    n_layer: int = 6
    mlp_internal_dim_multiplier: int = 128
    dropout: float | int = 0.1
    rope_theta: float | int = 65536.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    attention_form: str = "auto"
    chunk_size: int = 128
    decay: list[float | int | None] | float | int | None = None
    train_block_size: int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        faults = self._name_faults(kwargs)
        super().__post_init__(**kwargs)  # resolves the aliases
        faults += config_faults(self)
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

    def _name_faults(self, extra: dict[str, Any]) -> list[str]:
        """What is wrong with the names given beside the fields."""
        fields = type(self).__dataclass_fields__
        faults = []
        for name, value in extra.items():
            if name in self.attribute_map:
                field = self.attribute_map[name]
                given = getattr(self, field)
                if given not in (value, fields[field].default):
                    faults.append(f"{name} is {value} and {field} is {given}: they are the same, give one of them")
            elif not hasattr(PreTrainedConfig, name):
                faults += misspelt(name, fields)
        return faults


AutoConfig.register("bdh", BDHConfig, exist_ok=True)
