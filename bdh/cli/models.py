"""The settings of commands that read a model, and loading it."""

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdh.hub import model_folder
from bdh.train.places import find_checkpoint, find_model
from bdh.validation import DeviceName, PathText, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from bdh.model.modeling import BDHForCausalLM
    from bdh.model.network import ModelParts
    from bdh.tokenizer.plain import PlainTokenizer


class ReadsModel(Settings):
    """Settings with a field ``model``, the name of a model or None."""

    model: str | None
    checkpoint: str | None = None
    base: str | None = None
    device: DeviceName = "auto"

    def check_available(self) -> None:
        super().check_available()
        if self.model is not None:
            find_model(self.model, checkpoint=self.checkpoint, base=self.base)

    def load_with_transformers(self, device: str | None = None) -> "tuple[BDHForCausalLM, PreTrainedTokenizerFast]":
        """Returns the model as a class for transformers, and its tokenizer.

        Exceptions are those of :func:`bdh.train.models.load_model`.
        """
        from bdh.train.models import load_model

        assert self.model is not None  # only called if there is one
        return load_model(self.model, checkpoint=self.checkpoint, base=self.base, device=device or self.device)


@dataclass(kw_only=True)
class ModelSettings(ReadsModel):
    """The settings of commands that require a model."""

    model: PathText
    """Folder of an exported model or a run, or a hub id."""
    checkpoint: str | None = None
    """For a run: which checkpoint: last (the default), best, or a step."""
    base: PathText | None = None
    """For adapters: the model that they were trained on, if it has moved since."""
    device: DeviceName = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def load_for_generation(settings: ReadsModel) -> "tuple[ModelParts, PlainTokenizer]":
    """Returns the model that settings name, in evaluation mode, and its tokenizer.

    transformers takes seconds to import, so it is used only if it is required: for adapters, models that another
    library quantized, runs that train for quantized weights, and tokenizers of its own classes.

    Raises:
        FileNotFoundError, ValueError: as :func:`bdh.train.models.load_model`.
    """
    from bdh.model.network import ModelConfig, Network, QuantizedWeightsError, choose_device
    from bdh.tokenizer.plain import PlainTokenizer

    assert settings.model is not None  # only called if there is one
    device = choose_device(settings.device)
    place = find_model(settings.model, checkpoint=settings.checkpoint, base=settings.base)
    folder = model_folder(settings.model) if place.kind == "hub" else place.path
    network: Network | None = None
    if place.kind in ("export", "hub"):
        with suppress(QuantizedWeightsError):
            network = Network.load(folder, device)
            network.config.name_or_path = settings.model
    elif place.kind == "run":
        from bdh.train.checkpoint import Checkpointer

        which = find_checkpoint(place.path, place.checkpoint or "last")
        checkpoint, folder = Checkpointer(place.path).load(which), place.path / "tokenizer"
        trained = checkpoint.training["settings"]["train"]
        if not (trained.get("lora") or {}).get("r") and not trained.get("quantize"):
            config = ModelConfig.from_facts(checkpoint.training["model_config"])
            network = Network(config, checkpoint.tensors("weights"), name=settings.model).to(device)
    if network is None:
        model, its_tokenizer = settings.load_with_transformers()
        return model, PlainTokenizer.of(its_tokenizer)
    tokenizer = PlainTokenizer.load(folder)
    if tokenizer is None:
        from bdh.tokenizer import load_tokenizer

        tokenizer = PlainTokenizer.of(load_tokenizer(folder))
    return network, tokenizer
