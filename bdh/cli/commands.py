"""The short commands: export, average, convert, tokenizer, runs and plot."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bdh.cli.settings import command, takes
from bdh.data.config import DataConfig
from bdh.storage import check_file, check_free, is_taken, recover_dir
from bdh.tokenizer.config import TokenizerConfig
from bdh.train.places import ADAPTER_CONFIG, check_peft, find_checkpoint, find_model, lock_run_around
from bdh.validation import Faults, PathText, Settings
from bdh.words import counted

if TYPE_CHECKING:
    import torch

    from bdh.monitor.history import RunSummary

_LEAST_SIMILARITY = 0.5
"""The cosine similarity of weights below which averaging causes a warning. Checkpoints of one training have 0.96 or
more. Models of two seeds have -0.02 to 0.06, and the loss of their average was higher than that of either."""


@dataclass
class ExportSettings(Settings):
    run: PathText
    """Folder of the run, or of adapters, which are merged into the model that they were trained on."""
    out: PathText
    """Folder to write: config.json, model.safetensors, tokenizer files, generation_config.json, README.md."""
    checkpoint: str = "last"
    """Which weights to export: last, best (of checkpoint.best_metric), or a step."""
    ema: bool = False
    """For a run with train.ema_decay: export the moving average of the weights."""
    merge: bool | None = None
    """For a run with train.lora: true merges the adapters into the weights, false writes the adapters alone. By default
    as train.lora.merge says."""
    base: PathText | None = None
    """For adapters: the model that they were trained on, if it has moved since."""

    @property
    def is_of_adapters(self) -> bool:
        return (Path(self.run) / ADAPTER_CONFIG).is_file()

    def collect_faults(self, faults: Faults) -> None:
        recover_dir(Path(self.run))
        if self.is_of_adapters:
            faults.require(self.checkpoint == "last", "checkpoint", self.checkpoint, "left out with adapters")
            faults.require(not self.ema, "ema", self.ema, "left out with adapters")
            faults.require(self.merge in (None, True), "merge", self.merge, "left out with adapters, or true")
        else:
            faults.require(self.base is None, "base", self.base, "left out with a run, which holds its base's weights")

    def check_available(self) -> None:
        check_free(Path(self.out))
        if self.is_of_adapters:
            check_peft()
        else:
            find_checkpoint(Path(self.run), self.checkpoint)


@command("run", "out")
def run_export(settings: ExportSettings) -> int:
    """Export the weights of a run, or adapters merged into their base model, to a folder that from_pretrained loads,
    with a model card.
    """
    from bdh.train.export import export_merged, export_run

    run, out = Path(settings.run), Path(settings.out)
    with lock_run_around(out):
        if settings.is_of_adapters:
            base = export_merged(run, out, base=settings.base)
            print(f"{settings.out}: the adapters of {settings.run} merged into {base.describe()}")
            return 0
        step = export_run(run, out, which=settings.checkpoint, ema=settings.ema, merge=settings.merge)
    what = "adapters" if (out / ADAPTER_CONFIG).is_file() else "weights"
    print(f"{settings.out}: the {'averaged ' if settings.ema else ''}{what} of step {step}")
    return 0


@dataclass(kw_only=True)
class AverageSettings(Settings):
    models: list[PathText] = field(default_factory=list)
    """Exported folders, runs, checkpoints of a run (runs/a/checkpoints/step-0001000), or hub ids."""
    out: PathText
    """Folder to write."""
    weights: list[float] | None = None
    """Share of each model, such as [1, 1, 2]. By default all shares are equal."""

    def collect_faults(self, faults: Faults) -> None:
        number = len(self.models)
        faults.require(number >= 1, "models", self.models, "at least one folder or hub id")
        if self.weights is not None:
            faults.require(
                len(self.weights) == number, "weights", self.weights, f"one for each of {counted(number, 'model')}"
            )
            is_right = all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
            faults.require(is_right, "weights", self.weights, "0 or above, with a sum above 0")

    def check_available(self) -> None:
        check_free(Path(self.out), "choose another --out")
        for name in self.models:
            find_model(name)


@command("models")
def run_average(settings: AverageSettings) -> int:
    """Average the weights of models with the same configuration, such as the last checkpoints of a run."""
    from bdh.cli.output import error_console
    from bdh.model.conversion import average_weights, cosine_similarity
    from bdh.model.fingerprint import identity
    from bdh.model.quantization import check_not_quantized
    from bdh.tokenizer import TextEncoder
    from bdh.train.export import card, export_model
    from bdh.train.models import load_model

    out, first_name = Path(settings.out), settings.models[0]
    first, tokenizer = load_model(first_name, device="cpu")
    tokenizer_hash, ours = TextEncoder(tokenizer).hash, identity(first).configuration
    for fact in ("train_data", "merged_adapters"):  # they are only true of the first model
        first.config.__dict__.pop(fact, None)

    started = first.state_dict()

    def state_dicts() -> "Iterator[dict[str, torch.Tensor]]":
        for name in settings.models:
            model, its_tokenizer = load_model(name, device="cpu")
            reason = "average the unquantized models, and quantize the average"
            check_not_quantized(model, name, reason)
            if TextEncoder(its_tokenizer).hash != tokenizer_hash:
                raise ValueError(f"{name} and {first_name} have different tokenizers: models to average must share one")
            theirs = identity(model).configuration
            differing = [f"{key} is {theirs[key]}, not {value}" for key, value in ours.items() if theirs[key] != value]
            if differing:
                raise ValueError(
                    f"{name} and {first_name} have different configurations, so they cannot be averaged: "
                    f"{', '.join(differing)}"
                )
            weights = model.state_dict()
            if (similarity := cosine_similarity(started, weights)) < _LEAST_SIMILARITY:
                error_console().print(
                    f"warning: the weights of {name} and {first_name} have a cosine similarity of {similarity:.2f} (1: one "
                    "direction, 0: unrelated): averaging models that were trained independently does not give a good "
                    "model",
                    style="yellow",
                    markup=False,
                )
            yield weights

    first.load_state_dict(average_weights(state_dicts(), settings.weights))
    shares = settings.weights or [1.0] * len(settings.models)
    rows = [f"| `{name}` | {share / sum(shares):.4g} |" for name, share in zip(settings.models, shares, strict=True)]
    about = "The mean of the weights of these models (architecture: Dragon Hatchling, arXiv 2509.26507):\n"
    text = "\n".join([about, "| model | share |\n| --- | --- |", *rows])
    with lock_run_around(out):
        export_model(first, tokenizer, out, card("A BDH language model, averaged", text))
    print(f"{out}: the average of {counted(len(settings.models), 'model')}")
    return 0


@dataclass
class ConvertSettings(Settings):
    source: PathText
    """Checkpoint of the reference code (.pt); with --to-reference, a model folder, a run, or a hub id."""
    out: PathText
    """Folder to write; with --to-reference, the .pt file to write."""
    to_reference: bool = False
    """Convert back: write a model as a checkpoint of the reference code."""
    tokenizer: PathText = "byte"
    """Tokenizer to store with the model: byte, a tokenizer.json file, a folder, or a hub id."""
    pad_and_eos: bool = True
    """byte only: use the bytes 255 and 254, which never appear in UTF-8, as <pad> and <eos>, for padded batches."""
    n_layer: int | None = None
    """Number of layer steps, for checkpoints without a configuration: the weights do not show it."""

    def check_available(self) -> None:
        if is_taken(out := Path(self.out)):
            raise FileExistsError(f"{out} exists already: choose another name")
        if self.to_reference:
            find_model(self.source)
        else:
            check_file(Path(self.source), "checkpoint file")
            TokenizerConfig(path=self.tokenizer).check_available()


@command("source", "out")
def run_convert(settings: ConvertSettings) -> int:
    """Convert a checkpoint of the published reference code into a model folder, or back."""
    return (_to_reference if settings.to_reference else _from_reference)(settings, Path(settings.out))


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
    from bdh.train.export import card, export_model

    num_parameters = sum(p.numel() for p in model.parameters())
    text = (
        f"Converted from the checkpoint `{Path(settings.source).name}` of the published reference code (arXiv 2509.26507). "
        "The checkpoint does not say what it was trained on."
    )
    about = card(f"A BDH language model of {num_parameters:,} parameters", text)
    with lock_run_around(out):
        export_model(model, tokenizer, out, about, pad_and_eos=settings.pad_and_eos)
    print(
        f"{out}: {num_parameters:,} parameters, {counted(model.config.n_layer, 'layer step')}, vocabulary {model.config.vocab_size:,}"
    )
    return 0


def _to_reference(settings: ConvertSettings, out: Path) -> int:
    import torch

    from bdh.model.conversion import reference_config
    from bdh.storage import atomic_file
    from bdh.train.models import load_model

    model, _ = load_model(settings.source)
    with atomic_file(out) as path:
        torch.save({"model": model.to_reference(), "config": reference_config(model.config)}, path)
    print(f"{out}: model and config, for the reference code")
    return 0


@dataclass(kw_only=True)
class TokenizerTrainSettings(Settings):
    data: DataConfig = field(default_factory=DataConfig)
    kind: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """bpe and unigram restore every text exactly; wordpiece loses white space and rare characters."""
    vocab_size: int = 8192
    """Size of the vocabulary, including special tokens."""
    out: PathText
    """Folder to write."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.vocab_size >= 1, "vocab_size", self.vocab_size, "at least 1")

    def check_available(self) -> None:
        super().check_available()
        check_free(Path(self.out), "choose another --out")


@takes(
    TokenizerTrainSettings,
    prog="bdh tokenizer train",
    description="Train a tokenizer on any data source, and measure its compression on held-out text.",
)
def run_tokenizer(argv: list[str]) -> int:
    if not argv or argv[0] != "train":
        wrong = f"{argv[0]!r} is unknown" if argv and argv[0] not in ("-h", "--help") else ""
        usage = "bdh tokenizer train --data.source SOURCE --kind bpe --vocab_size 8192 --out DIR"
        if wrong or not argv:
            raise ValueError(f"{wrong or 'no command is given'}: use {usage}")
        print(f"usage: {usage}\n\n`bdh tokenizer train --help` lists the settings.")
        return 0
    settings = run_tokenizer.parse(argv[1:])
    from bdh.cli.output import stage_progress
    from bdh.data import training_texts, validation_texts
    from bdh.storage import atomic_dir
    from bdh.tokenizer import compression_ratio, train_tokenizer

    with stage_progress("bytes") as progress:
        tokenizer = train_tokenizer(
            training_texts(settings.data), settings.kind, settings.vocab_size, progress=progress
        )
    held_out = compression_ratio(tokenizer, validation_texts(settings.data))
    with atomic_dir(Path(settings.out)) as folder:
        tokenizer.save_pretrained(folder)
    about = f"{settings.kind}, {len(tokenizer):,} entries, {held_out:.3f} bytes per token on held-out text"
    print(f"{Path(settings.out)}: {about}")
    return 0


@dataclass
class RunsSettings(Settings):
    folder: PathText = "runs"
    """Folder that contains runs, at any depth, or a run."""
    json: bool = False
    """Print one JSON object for each run instead of a table."""


@command("folder")
def run_runs(settings: RunsSettings) -> int:
    """List runs with their progress, losses and speed, and the settings in which they differ."""
    from bdh.cli.output import indented, table_lines
    from bdh.monitor.history import summarize_runs

    folder = Path(settings.folder)
    summaries = summarize_runs(folder)
    if settings.json:
        for summary in summaries:
            print(json.dumps({**asdict(summary), "folder": str(summary.folder)}))
        return 0
    rows = [("run", "state", "step", "loss", "best val", "tokens/s", "logged"), *(_row(folder, s) for s in summaries)]
    header, *lines = table_lines(rows, num_names=2)
    print(header)
    for line, summary in zip(lines, summaries, strict=True):
        print(line)
        others = (f"{name}={'-' if value is None else value}" for name, value in summary.differences.items())
        if about := summary.fault or ", ".join(others):
            print(indented(about))
    return 0


def _row(folder: Path, summary: "RunSummary") -> tuple[str, ...]:
    run = summary.folder
    return (
        run.relative_to(folder).as_posix() if run != folder else run.name,
        summary.state,
        f"{summary.step:,}" + (f"/{summary.max_steps:,}" if summary.max_steps is not None else ""),
        _number(summary.train_loss, ".4f"),
        _number(summary.best_val_loss, ".4f"),
        _number(summary.tokens_per_second, ",.0f"),
        _ago(summary.seconds_since_logged),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    unit, length = next((each for each in units if seconds >= each[1]), units[-1])
    return f"{seconds // length if length > 1 else seconds:.0f} {unit} ago"


@dataclass
class PlotSettings(Settings):
    runs: list[PathText] = field(default_factory=list)
    """Folders of the runs, drawn in one figure."""
    keys: list[str] = field(default_factory=lambda: ["train/loss", "val/loss"])
    """Metrics to draw, by their names in metrics.jsonl, with commas or as a list. Each metric that is not a loss has
    its own panel."""
    output: PathText | None = None
    """PNG file to write. By default loss.png, or metrics.png for other metrics, in the folder of the first run."""


@command("runs")
def run_plot(settings: PlotSettings) -> int:
    """Draw the training and validation loss of runs over their steps, or other metrics."""
    from bdh.monitor.history import LOSS_KEYS, plot_metrics

    if not settings.runs:
        raise ValueError("no run is given: name the folder of at least one run")
    keys = list(dict.fromkeys(key.strip() for item in settings.keys for key in item.split(",") if key.strip()))
    if not keys:
        raise ValueError("keys is empty: name at least one metric")
    name = "loss.png" if set(keys) <= set(LOSS_KEYS) else "metrics.png"
    output = Path(settings.output or Path(settings.runs[0]) / name)
    plot_metrics([Path(run) for run in settings.runs], output, keys)
    print(f"The picture is in {output}")
    return 0
