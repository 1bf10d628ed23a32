"""bdh average: averages the weights of several models of one shape."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bdh.cli.settings import parse_settings
from bdh.storage import check_free
from bdh.train.places import find_model, lock_run_around
from bdh.validation import Faults, PathText, Settings


@dataclass(kw_only=True)
class AverageSettings(Settings):
    models: list[PathText] = field(default_factory=list)
    """Exported folders, runs, checkpoints of a run (runs/a/checkpoints/step-0001000), or hub ids."""
    out: PathText
    """Folder to write."""
    weights: list[float] | None = None
    """A share for each model, such as [1, 1, 2]; equal ones by default."""

    def collect_faults(self, faults: Faults) -> None:
        number = len(self.models)
        faults.require(number >= 1, "models", self.models, "at least one folder or hub id")
        if self.weights is not None:
            faults.require(len(self.weights) == number, "weights", self.weights, f"one for each of {number} models")
            is_right = all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
            faults.require(is_right, "weights", self.weights, "0 or above, with a sum above 0")

    def check_available(self) -> None:
        check_free(Path(self.out), "choose another --out")
        for name in self.models:
            find_model(name)


def run(argv: list[str]) -> int:
    settings = parse_settings(
        AverageSettings,
        argv,
        prog="bdh average",
        description="Average the weights of models of one shape, such as the last checkpoints of a run.",
        positionals=("models",),
    )
    import torch

    from bdh.model.conversion import average_weights
    from bdh.model.fingerprint import identity
    from bdh.tokenizer import TextEncoder
    from bdh.train.export import export_model
    from bdh.train.models import load_model

    out = Path(settings.out)
    first, tokenizer = load_model(settings.models[0], device="cpu")
    tokenizer_hash = TextEncoder(tokenizer).hash
    ours = identity(first).configuration
    for fact in ("train_data", "merged_adapters"):  # of the first alone
        first.config.__dict__.pop(fact, None)

    def state_dicts() -> Iterator[dict[str, torch.Tensor]]:
        for name in settings.models:
            model, its_tokenizer = load_model(name, device="cpu")
            if TextEncoder(its_tokenizer).hash != tokenizer_hash:
                raise ValueError(
                    f"{name} has another tokenizer than {settings.models[0]}: their tokens differ in meaning"
                )
            theirs = identity(model).configuration
            if differing := [
                f"{key} is {theirs[key]}, not {value}" for key, value in ours.items() if theirs[key] != value
            ]:
                raise ValueError(
                    f"{name} has another configuration than {settings.models[0]}, so they cannot be averaged: "
                    f"{', '.join(differing)}"
                )
            yield model.state_dict()

    first.load_state_dict(average_weights(state_dicts(), settings.weights))
    with lock_run_around(out):
        export_model(first, tokenizer, out, _card(settings))
    print(f"{out}: the average of {len(settings.models)} models")
    return 0


def _card(settings: AverageSettings) -> str:
    shares = settings.weights or [1.0] * len(settings.models)
    rows = [f"| `{name}` | {share / sum(shares):.4g} |" for name, share in zip(settings.models, shares, strict=True)]
    return "\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [bdh, dragon-hatchling]\n---\n",
            "# A BDH language model, averaged\n",
            "The mean of the weights of these models (architecture: Dragon Hatchling, arXiv 2509.26507):\n",
            "| model | share |\n| --- | --- |",
            *rows,
            "",
        ]
    )
