"""bdh convert: between checkpoints of the published reference code and model folders."""

from dataclasses import dataclass
from pathlib import Path

from bdh.cli.settings import parse_settings
from bdh.storage import check_file, is_taken
from bdh.tokenizer.config import TokenizerConfig
from bdh.train.places import find_model, lock_run_around
from bdh.validation import PathText, Settings


@dataclass
class ConvertSettings(Settings):
    source: PathText
    """Checkpoint of the reference code (.pt); with --to-reference: a model folder, a run, or a hub id."""
    out: PathText
    """Folder to write; with --to-reference: the .pt file to write."""
    to_reference: bool = False
    """Convert back: write a model as a checkpoint of the reference code."""
    tokenizer: PathText = "byte"
    """Tokenizer to store with the model: byte, a tokenizer.json file, a folder, or a hub id."""
    pad_and_eos: bool = True
    """byte only: <pad> and <eos>, for padded batches, in the place of the bytes 255 and 254, which no UTF-8 text has."""
    n_layer: int | None = None
    """Passes, for checkpoints that carry no configuration (the weights do not show them)."""

    def check_available(self) -> None:
        if is_taken(out := Path(self.out)):
            raise FileExistsError(f"{out} exists already: choose another name")
        if self.to_reference:
            find_model(self.source)
        else:
            check_file(Path(self.source), "checkpoint file")
            TokenizerConfig(path=self.tokenizer).check_available()


def run(argv: list[str]) -> int:
    settings = parse_settings(
        ConvertSettings,
        argv,
        prog="bdh convert",
        description="Convert a checkpoint of the published reference code into a model folder, or back.",
        positionals=("source", "out"),
    )
    out = Path(settings.out)
    if settings.to_reference:
        return _to_reference(settings, out)
    return _from_reference(settings, out)


def _from_reference(settings: ConvertSettings, out: Path) -> int:
    from bdh.model import BDHForCausalLM
    from bdh.model.conversion import load_reference
    from bdh.tokenizer import load_tokenizer
    from bdh.tokenizer.plain import vocabulary_size

    state_dict, config = load_reference(settings.source)
    fields = {} if settings.n_layer is None else {"n_layer": settings.n_layer}
    if settings.n_layer is not None and config and config.get("n_layer", settings.n_layer) != settings.n_layer:
        raise ValueError(f"n_layer is {settings.n_layer}, but the checkpoint's configuration says {config['n_layer']}")
    model = BDHForCausalLM.from_reference(state_dict, {**(config or {}), **fields})
    tokenizer = load_tokenizer(TokenizerConfig(path=settings.tokenizer))
    if vocabulary_size(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {model.config.vocab_size}, the tokenizer {settings.tokenizer!r} of "
            f"{vocabulary_size(tokenizer)}: give the tokenizer that it was trained with, with --tokenizer"
        )
    from bdh.train.export import export_model

    num_parameters = sum(p.numel() for p in model.parameters())
    with lock_run_around(out):
        card = _card(Path(settings.source).name, num_parameters)
        export_model(model, tokenizer, out, card, pad_and_eos=settings.pad_and_eos)
    print(
        f"{out}: {num_parameters:,} parameters, {model.config.n_layer} passes, vocabulary {model.config.vocab_size:,}"
    )
    return 0


def _to_reference(settings: ConvertSettings, out: Path) -> int:
    import torch

    from bdh.model.conversion import reference_config
    from bdh.storage import atomic_file
    from bdh.train.models import load_model

    model, _ = load_model(settings.source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as path:
        torch.save({"model": model.to_reference(), "config": reference_config(model.config)}, path)
    print(f"{out}: model and config, for the reference code")
    return 0


def _card(name: str, num_parameters: int) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [bdh, dragon-hatchling]\n---\n\n"
        f"# A BDH language model of {num_parameters:,} parameters\n\n"
        f"Converted from the checkpoint `{name}` of the published reference code (arXiv 2509.26507). The checkpoint "
        "does not say what it was trained on.\n"
    )
