"""Configuration, model, state and conversion. Importing it makes transformers' auto classes know "bdh"."""

from transformers import AutoConfig, AutoModelForCausalLM

from bdh.model.configuration import BDHConfig
from bdh.model.modeling import BDHForCausalLM
from bdh.model.state import SynapticState

AutoConfig.register("bdh", BDHConfig, exist_ok=True)
AutoModelForCausalLM.register(BDHConfig, BDHForCausalLM, exist_ok=True)

__all__ = ["BDHConfig", "BDHForCausalLM", "SynapticState"]
