"""bdh bench: how fast a model goes on, reads, serves several requests, and is trained on this machine."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdh.bench.config import QUICK_SIZES, BenchOptions
from bdh.cli.settings import parse_settings
from bdh.validation import Faults

if TYPE_CHECKING:
    from bdh.bench.report import Report
    from bdh.model.modeling import BDHForCausalLM

_SIZES = {
    "n_embd": 256,
    "n_head": 4,
    "n_layer": 6,
    "mlp_internal_dim_multiplier": 128,
    "vocab_size": 256,
}
# The `small` configuration, that of a training step.
_TRAIN_SIZES = {"n_embd": 128, "n_head": 4, "n_layer": 4, "mlp_internal_dim_multiplier": 32, "vocab_size": 256}
_TRAIN_STEP = {"batch_size": 16, "block_size": [128], "dropout": 0.1}
_QUICK_STEP = {"batch_size": 2, "block_size": [32], "dropout": 0.1}


@dataclass(kw_only=True)
class BenchSettings:
    benchmark: Literal["decode", "prefill", "engine", "train"]
    """decode: a token at a time, compared with other forms. prefill: prompts by their length. engine: several requests. train: a training step, compared with other forms; --config FILE takes its sizes from a configuration of bdh train."""
    model: str | None = None
    """Folder of an exported model or of a run, or a hub id. None makes one whose neurons fire as sparsely as trained ones."""
    n_embd: int | None = None
    """Of the model that is made: D. None for 256; 128 for train, and 64 with quick."""
    n_head: int | None = None
    """H. None for 4, and 2 with quick."""
    n_layer: int | None = None
    """L. None for 6; 4 for train, and 3 with quick."""
    mlp_internal_dim_multiplier: int | None = None
    """Neurons of all heads, in multiples of D. None for 128; 32 for train and with quick."""
    vocab_size: int | None = None
    """V. None for 256."""
    agreement_tokens: int = 2000
    """decode: tokens over which all forms must agree before any is timed; at most 100 with quick."""
    batch_size: int | None = None
    """train: sequences of a step. None for 16, and 2 with quick."""
    block_size: list[int] = field(default_factory=list)
    """train: tokens of a sequence; several are timed one after the other. None given: 128, and 32 with quick."""
    dropout: float | None = None
    """train: share of the neurons' outputs that is dropped. None for 0.1."""
    density: float | None = None
    """train: share of x that is to fire, such as 0.2, of the model that is made. None leaves its weights untrained."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """train: auto takes a GPU, where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """train: of the matrix products; the weights are float32."""
    layer_path: Literal["auto", "plain", "torch", "kernels"] = "auto"
    """train: as train.layer_path of bdh train."""
    baselines: list[Literal["naive", "compiled", "gpt2"]] = field(default_factory=lambda: ["naive", "compiled", "gpt2"])
    """train: what it is timed beside: ops/naive.py with autograd, that under torch.compile, a GPT-2 of as many parameters."""
    one_step: bool = False
    """train: only the memory and the time of one optimizer step, in a process of its own."""
    rounds: int = 5
    """train: in which the forms take turns."""
    threads: int | None = None
    """Of the kernels and of torch. None for what torch takes."""
    seed: int = 0
    """Of the weights that are made, and of the text."""
    quick: bool = False
    """Everything small, in seconds: to see that it runs. Its figures say little."""
    json: str | None = None
    """File for the figures as one JSON object, which replaces it; - prints that instead of the tables."""
    checkpoint: str | None = None
    """For a run: last (the default), best, or a step."""

    def collect_faults(self, faults: Faults) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            faults.require(value is None or self.model is None, name, value, "left out with model, which has its own")
        if self.model is None:
            from bdh.model.configuration import shape_faults

            for fault in shape_faults(*self.sizes().values()):
                faults.add(fault)
            is_right = self.benchmark != "engine" or self.sizes()["vocab_size"] == 256
            faults.require(is_right, "vocab_size", self.vocab_size, "256 for engine: the made model reads bytes")
        faults.require(self.model is not None or not self.checkpoint, "checkpoint", self.checkpoint, "given with model")
        faults.require(self.agreement_tokens >= 1, "agreement_tokens", self.agreement_tokens, "at least 1")
        self._collect_train_faults(faults)
        faults.require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        faults.require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        if self.json not in (None, "-"):
            parent = Path(self.json).expanduser().parent
            faults.require(parent.is_dir(), "json", self.json, "a file in a folder that exists, or -")

    def _collect_train_faults(self, faults: Faults) -> None:
        defaults = type(self)(benchmark=self.benchmark)
        if self.benchmark != "train":
            names = (
                "batch_size",
                "block_size",
                "dropout",
                "density",
                "device",
                "dtype",
                "layer_path",
                "one_step",
                "rounds",
            )
            for name in names:
                value = getattr(self, name)
                faults.require(value == getattr(defaults, name), name, value, "left out: it is for bdh bench train")
            return
        given = self.agreement_tokens
        faults.require(
            given == defaults.agreement_tokens, "agreement_tokens", given, "left out: it is for bdh bench decode"
        )
        faults.require(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        faults.require(all(size >= 1 for size in self.block_size), "block_size", self.block_size, "at least 1 each")
        faults.require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        is_share = self.density is None or 0.01 <= self.density <= 0.6
        faults.require(is_share, "density", self.density, "from 0.01 to 0.6, or null")
        is_made = self.density is None or self.model is None
        faults.require(is_made, "density", self.density, "left out with model, whose neurons fire as they do")
        faults.require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        is_one = not self.one_step or len(self.block_size) <= 1
        faults.require(is_one, "block_size", self.block_size, "one with one_step")

    def step(self, name: str) -> Any:
        """How a training step is: batch_size, block_size or dropout."""
        value = getattr(self, name)
        return value if value not in (None, []) else (_QUICK_STEP if self.quick else _TRAIN_STEP)[name]

    def sizes(self) -> dict[str, int]:
        """Of the model that is made."""
        defaults = QUICK_SIZES if self.quick else _TRAIN_SIZES if self.benchmark == "train" else _SIZES
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def options(self) -> BenchOptions:
        options = BenchOptions(seed=self.seed, agreement_tokens=self.agreement_tokens)
        return options.quick() if self.quick else options


def run(argv: list[str]) -> int:
    files, argv = _training_files(argv)
    settings = parse_settings(
        BenchSettings,
        argv,
        prog="bdh bench",
        description="Time a model on this machine's processor, with the sparse kernels. What is compared must agree "
        "first; if it does not, nothing is timed, and the status is 1.",
        positionals=("benchmark",),
        base=_settings_of(files),
    )
    import torch

    before = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        report = _measured(settings)
    finally:
        torch.set_num_threads(before)
    if settings.json == "-":
        print(report.json(), end="")
    else:
        print(report.text(), end="")
        if settings.json is not None:
            Path(settings.json).expanduser().write_text(report.json(), encoding="utf-8")
    return 1 if report.failed else 0


def _measured(settings: BenchSettings) -> "Report":
    from bdh.bench.decode import bench_decode
    from bdh.bench.engine import bench_engine
    from bdh.bench.prefill import bench_prefill
    from bdh.tokenizer import byte_tokenizer

    if settings.benchmark == "train":
        return _trained(settings)
    if settings.model is None:
        model, tokenizer = _made(settings), byte_tokenizer()
    else:
        from bdh.train.models import load_model

        model, tokenizer = load_model(settings.model, checkpoint=settings.checkpoint, device="cpu")
        model = model.float()  # what it is compared with computes in float32
    if settings.benchmark == "engine":
        return bench_engine(model, tokenizer, settings.options(), _tell)
    benchmark = bench_decode if settings.benchmark == "decode" else bench_prefill
    return benchmark(model, settings.options(), _tell)


def _trained(settings: BenchSettings) -> "Report":
    import torch

    from bdh.bench.train import bench_one_step, bench_train
    from bdh.bench.training import TrainCase
    from bdh.model.configuration import BDHConfig
    from bdh.ops.layer.plan import LayerOptions

    device = "cuda" if settings.device == "auto" and torch.cuda.is_available() else settings.device
    device = "cpu" if device == "auto" else device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda: this machine and PyTorch build have cpu")
    config, weights = BDHConfig(**settings.sizes(), dropout=settings.step("dropout")), None  # type: ignore[arg-type]
    if settings.model is not None:
        from bdh.train.models import load_model

        model, _ = load_model(settings.model, checkpoint=settings.checkpoint, device="cpu")
        config, weights = model.config, model.float().state_dict()
        if settings.dropout is not None:
            config.dropout = settings.dropout
    cases = [
        TrainCase(
            config,
            settings.step("batch_size"),
            size,
            device=device,
            dtype=settings.dtype,
            density=settings.density,
            seed=settings.seed,
            threads=settings.threads,
            options=LayerOptions(path=settings.layer_path),
            weights=weights,
        )
        for size in settings.step("block_size")
    ]
    if settings.one_step:
        return bench_one_step(cases[0], _tell)
    rounds = 2 if settings.quick else settings.rounds
    return bench_train(cases, baselines=settings.baselines, rounds=rounds, progress=_tell)


def _training_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files behind ``--config`` for a training step, which are configurations of ``bdh train``, and the rest."""
    if "train" not in argv:
        return [], list(argv)
    files, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return files, rest


def _settings_of(files: Sequence[str]) -> dict[str, Any] | None:
    """What configurations of ``bdh train`` say about the model and its step."""
    if not files:
        return None
    from bdh.train.config import RunSettings

    flags = [word for file in files for word in ("--config", file)]
    run = parse_settings(RunSettings, flags, prog="bdh bench train", description="A configuration of bdh train.")
    model, train = run.model, run.train
    found = {name: getattr(model, name) for name in _SIZES if name != "vocab_size"} | {"dropout": model.dropout}
    if model.vocab_size is None and run.tokenizer.path != "byte":
        from bdh.tokenizer import load_tokenizer

        found["vocab_size"] = len(load_tokenizer(run.tokenizer))
    else:
        found["vocab_size"] = model.vocab_size or 256
    return found | {"batch_size": train.batch_size, "block_size": [train.block_size]}


def _made(settings: BenchSettings) -> "BDHForCausalLM":
    from bdh.bench.weights import sparse_model
    from bdh.model.configuration import BDHConfig

    _tell("making a model whose neurons fire sparsely")
    return sparse_model(BDHConfig(**settings.sizes()), settings.seed)  # type: ignore[arg-type]  # sizes are its only keys


def _tell(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)
