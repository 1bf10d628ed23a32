"""bdh bench: times how a model continues texts, reads prompts, serves several requests and is trained, on this machine."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, Lt

from bdh.bench import QUICK_SIZES, BenchOptions
from bdh.cli.models import ReadsModel
from bdh.cli.settings import given_settings, parse_settings, takes
from bdh.model.config_fields import shape_faults
from bdh.ops import LayerPath
from bdh.storage import check_file, write_text
from bdh.text_files import read_text
from bdh.validation import Faults, Fraction, PathText, PositiveFloat, PositiveInt
from bdh.words import counted

if TYPE_CHECKING:
    from bdh.bench.common import Report
    from bdh.model import BDHForCausalLM
    from bdh.train.config import RunSettings

Baseline = Literal["naive", "compiled", "gpt2"]
_BASELINES: tuple[Baseline, ...] = ("naive", "compiled", "gpt2")
_SIZES = {"n_embd": 256, "n_head": 4, "n_layer": 6, "mlp_internal_dim_multiplier": 128, "vocab_size": 256}
# The sizes of the configuration `small`, for a training step.
_TRAIN_SIZES = {"n_embd": 128, "n_head": 4, "n_layer": 4, "mlp_internal_dim_multiplier": 32, "vocab_size": 256}
_TRAIN_STEP = {"batch_size": 16, "block_size": 128, "dropout": 0.1, "rounds": 5}
_QUICK_STEP = {"batch_size": 2, "block_size": 32, "dropout": 0.1, "rounds": 2}
_TAKEN_OVER = ("dtype", "layer_path", "recompute", "memory_budget_gb", "rows_per_block", "tokens_per_block")
_STEP = ("batch_size", "block_size", "dropout", "density", "device")
_ONLY_TRAIN = (*_STEP, *_TAKEN_OVER, "baselines", "one_step", "rounds")
_FLAGS = {"path": "layer_path", "memory_budget": "memory_budget_gb"}  # layer options whose flags have other names
_FROM_UNROUNDED = "give the unquantized model, since the timings start from plain weights"
# With more than a few threads per core, threads only wait for each other, and with millions OpenMP ends the process.
_THREADS_A_CORE = 4


@dataclass(kw_only=True)
class BenchSettings(ReadsModel):
    benchmark: Literal["decode", "context", "prefill", "engine", "quantize", "train"]
    """decode: a token at a time, compared with other implementations. context: a token after texts of several lengths,
    and the memory that holds them, compared with a GPT-2. prefill: reading prompts of several lengths. engine: several
    requests at once. quantize: formats of weights and states, including those of other libraries. train: a training
    step, compared with other implementations."""
    model: PathText | None = None
    """Folder of an exported model or a run, or a hub id. By default a synthetic model whose neurons fire as sparsely as
    those of a trained one; for train, a model with initial weights."""
    n_embd: int | None = None
    """D of the synthetic model. By default 256; for train 128; with --quick 64."""
    n_head: int | None = None
    """H of the synthetic model. By default 4; with --quick 2."""
    n_layer: int | None = None
    """L of the synthetic model. By default 6; for train 4; with --quick 3."""
    mlp_internal_dim_multiplier: int | None = None
    """Number of neurons of all heads, in multiples of D. By default 128; for train and with --quick 32."""
    vocab_size: int | None = None
    """V of the synthetic model, at least 2. By default 256."""
    agreement_tokens: PositiveInt = 2000
    """decode, context, quantize: number of tokens on which all implementations must agree before any is timed; at most 100 with
    --quick."""
    text: PathText | None = None
    """quantize: file of held-out text. The perplexity of model in each format is measured on its first agreement_tokens
    tokens."""
    contexts: int | list[int] | None = None
    """context: number of tokens read before those that are timed; several values in ascending order, at least 96 apart.
    By default 128, 512, 2048, 8192 and 16384; with --quick 32, 64, 128 and 256."""
    image: PathText | None = None
    """context: file for a picture of times and memory, as .svg or .png."""
    busy: int = 0
    """decode: number of busy programs to start, at most 4 for each core. A token and a prompt are then timed with and
    without them, with one thread and with all, instead of the other implementations."""
    batch_size: PositiveInt | None = None
    """train: sequences in a step. By default 16; with --quick 2."""
    block_size: int | list[int] | None = None
    """train: tokens in a sequence; several values are timed one after the other. By default 128; with --quick 32."""
    dropout: Fraction | None = None
    """train: share of the neurons' outputs that is dropped. By default 0.1."""
    density: Annotated[float, Ge(0.01), Le(0.6)] | None = None
    """train: share of x that fires in the synthetic model, such as 0.2. By default its weights are initial ones."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """train: device. auto: a GPU, if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """train: dtype of the matrix products; the weights are float32. auto: as train.dtype of bdh train."""
    layer_path: LayerPath = "auto"
    """train: as train.layer_path of bdh train."""
    recompute: Literal["none", "pass", "auto"] = "auto"
    """train: as train.recompute of bdh train."""
    memory_budget_gb: PositiveFloat | None = None
    """train: as train.memory_budget_gb of bdh train."""
    rows_per_block: int | None = None
    """train: sequences in a block of the layer, at most batch_size. null: chosen for the device and the memory budget."""
    tokens_per_block: int | None = None
    """train: tokens of each sequence in a block of the layer, at most block_size. null: the cheapest number."""
    baselines: Baseline | list[Baseline] | None = None
    """train: what to compare with: naive (ops/naive.py with autograd), compiled (the same under torch.compile), gpt2 (a
    GPT-2 of the same size). By default all three; [] for none."""
    one_step: bool = False
    """train: measure only the memory and the time of one optimizer step, in a separate process."""
    rounds: PositiveInt | None = None
    """train: number of rounds, in which the implementations take turns. By default 5; with --quick 2."""
    threads: int | None = None
    """Threads of the kernels and of torch, at most 4 for each core of the machine. By default as many as torch uses."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the synthetic weights and of the text."""
    quick: bool = False
    """Use small sizes, to check within seconds that it runs. The figures mean little."""
    json: PathText | None = None
    """File for the figures as one JSON object; an existing file is replaced. - prints the object instead of the tables."""
    checkpoint: str | None = None
    """For a run: which checkpoint: last (the default), best, or a step."""

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)
        for name in _SIZES:
            value = getattr(self, name)
            faults.require(value is None or self.model is None, name, value, "left out with model, which has its own")
        if self.model is None:
            for fault in shape_faults(*self.sizes().values()):
                faults.add(fault)
            vocab_size = self.sizes()["vocab_size"]
            faults.require(
                vocab_size != 1, "vocab_size", vocab_size, "at least 2: with one token there is nothing to predict"
            )
            is_right = self.benchmark != "engine" or vocab_size == 256
            faults.require(is_right, "vocab_size", self.vocab_size, "256 for engine: the model made for it reads bytes")
        faults.require(self.model is not None or not self.checkpoint, "checkpoint", self.checkpoint, "given with model")
        if self.benchmark == "train":
            self._collect_train_faults(faults)
        else:
            self._refuse(_ONLY_TRAIN, faults, "left out: it is for bdh bench train")
        most = _THREADS_A_CORE * (os.cpu_count() or 1)
        if self.benchmark in ("context", "prefill", "engine", "quantize"):
            self._refuse(("busy",), faults, "left out: it is for bdh bench decode")
        if self.benchmark == "context":
            self._collect_context_faults(faults)
        else:
            self._refuse(("contexts", "image"), faults, "left out: it is for bdh bench context")
        if self.benchmark != "quantize":
            self._refuse(("text",), faults, "left out: it is for bdh bench quantize")
        if self.text is not None:
            faults.require(
                self.model is not None,
                "text",
                self.text,
                "given with model: a model made for the benchmark has learned no text",
            )
        faults.require(0 <= self.busy <= most, "busy", self.busy, f"from 0 to {most}, {_THREADS_A_CORE} for each core")
        is_right = self.threads is None or 1 <= self.threads <= most
        faults.require(is_right, "threads", self.threads, f"from 1 to {most}, {_THREADS_A_CORE} for each core")
        if self.json is not None and self.json != "-":
            wanted = _wanted_of_file(self.json)
            faults.require(wanted is None, "json", self.json, f"{wanted}, or - for the standard output")

    def check_available(self) -> None:
        super().check_available()
        if self.image is not None:
            from bdh.monitor.history import check_matplotlib

            check_matplotlib()
        if self.text is not None:
            check_file(Path(self.text).expanduser(), "text file")

    def _collect_context_faults(self, faults: Faults) -> None:
        options = self.options()
        steps = [after - before for before, after in pairwise((0, *options.contexts))]
        is_right = bool(steps) and min(steps) >= options.reads
        apart = f"ascending, the first at least {options.reads}, and each so much more than the one before"
        faults.require(is_right, "contexts", self.contexts, apart)
        if self.image is not None:
            wanted = _wanted_of_file(self.image)
            faults.require(wanted is None, "image", self.image, wanted or "")
            faults.require(Path(self.image).suffix in (".svg", ".png"), "image", self.image, "named *.svg or *.png")

    def _collect_train_faults(self, faults: Faults) -> None:
        self._refuse(("agreement_tokens", "busy"), faults, "left out: it is for bdh bench decode")
        if self.one_step:
            self._refuse(("rounds", "baselines"), faults, "left out with one_step, which is one step of bdh alone")
        sizes, batch_size = self.block_sizes(), self.step("batch_size")
        is_right = bool(sizes) and min(sizes) >= 1 and len(set(sizes)) == len(sizes)
        faults.require(is_right, "block_size", self.block_size, "at least 1 each, and no two the same")
        faults.require(len(sizes) <= 1 or not self.one_step, "block_size", self.block_size, "one with one_step")
        is_made = self.density is None or self.model is None
        faults.require(is_made, "density", self.density, "left out with model, whose neurons fire as they do")
        limits = {"rows": ("batch_size", batch_size), "tokens": ("block_size", min(sizes, default=1))}
        for of, (whole, most) in limits.items():
            value = getattr(self, name := f"{of}_per_block")
            is_right = value is None or 1 <= value <= max(1, most)
            faults.require(is_right, name, value, f"from 1 to {whole}, {most}, or null")

    def _refuse(self, names: Sequence[str], faults: Faults, allowed: str) -> None:
        """Records a fault for each of these settings that does not have its default value."""
        for name in names:
            value = getattr(self, name)
            faults.require(value == getattr(type(self), name), name, value, allowed)

    def step(self, name: str) -> Any:
        """Returns a setting of the training step, or its default: batch_size, block_size, dropout or rounds."""
        value = getattr(self, name)
        return (_QUICK_STEP if self.quick else _TRAIN_STEP)[name] if value is None else value

    def block_sizes(self) -> list[int]:
        sizes = self.step("block_size")
        return sizes if isinstance(sizes, list) else [sizes]

    def chosen_baselines(self) -> Sequence[str]:
        if self.baselines is None:
            return _BASELINES
        return self.baselines if isinstance(self.baselines, list) else [self.baselines]

    def sizes(self) -> dict[str, int]:
        """Returns the sizes of the synthetic model, by the names of configuration fields."""
        defaults = QUICK_SIZES if self.quick else _TRAIN_SIZES if self.benchmark == "train" else _SIZES
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        return defaults | given

    def options(self) -> BenchOptions:
        options = BenchOptions(seed=self.seed, agreement_tokens=self.agreement_tokens, busy=self.busy)
        options = options.quick() if self.quick else options
        if self.contexts is None:
            return options
        return replace(options, contexts=tuple(self.contexts) if isinstance(self.contexts, list) else (self.contexts,))


@takes(
    BenchSettings,
    "benchmark",
    description="Time a model on this machine. decode, context, prefill, engine and quantize run on the CPU, with the sparse "
    "kernels; train times a training step on the CPU, or on a GPU with --device. Implementations must agree before they are "
    "timed; if they do not, nothing is timed, and the exit status is 1. For train, --config FILE is a configuration of bdh "
    "train: its model section, batch_size, block_size, device, dtype and settings of the layer are used, and flags override "
    "them. For train, the output of --print_config is only to be read, and cannot be given as --config.",
)
def run_bench(argv: list[str]) -> int:
    files, argv = _training_files(argv)
    training = _training_settings(files, argv)
    base = None
    if training is not None:
        given, base = given_settings(BenchSettings, argv), _base(training, files)
        # Reports faults before a tokenizer is loaded. Without --print_config, which would print and exit here.
        run_bench.parse([argument for argument in argv if argument != "--print_config"], base=base)
        if "vocab_size" not in given:
            base["vocab_size"] = training.model.vocab_size or _entries(training)
    settings = run_bench.parse(argv, base=base)
    import torch

    before = torch.get_num_threads()
    try:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        report = measured(settings, training)
    finally:
        torch.set_num_threads(before)
    if settings.json == "-":
        print(report.json(), end="")
    else:
        print(report.text(), end="")
        if settings.json is not None:
            write_text(_resolved(settings.json), report.json())
    return 1 if report.failed else 0


def measured(settings: BenchSettings, training: "RunSettings | None") -> "Report":
    """Runs the benchmark and returns its report.

    Raises:
        ValueError: a device, path or size is not available on this machine.
    """
    from bdh.bench.decode import bench_decode, bench_prefill
    from bdh.bench.engine import bench_engine
    from bdh.model.quantization import check_not_quantized
    from bdh.tokenizer import byte_tokenizer

    if settings.benchmark == "train":
        return _trained(settings, training)
    if settings.model is None:
        from bdh.bench.common import sparse_model
        from bdh.model.configuration import BDHConfig

        _tell("making a model whose neurons fire sparsely")
        config = BDHConfig(**settings.sizes())  # type: ignore[arg-type]  # the keys are only sizes
        model, tokenizer = sparse_model(config, settings.seed), byte_tokenizer()
    else:
        model, tokenizer = settings.load_with_transformers("cpu")
        check_not_quantized(model, settings.model, _FROM_UNROUNDED)
        model = model.float()  # the implementations that it is compared with compute in float32
    if settings.benchmark == "engine":
        return bench_engine(model, tokenizer, settings.options(), _tell)
    if settings.benchmark == "quantize":
        from bdh.bench.quantize import bench_quantize

        text = None if settings.text is None else _tokens_of(settings.text, tokenizer)
        return bench_quantize(model, settings.options(), _tell, text=text)
    if settings.benchmark == "context":
        return _by_context(model, settings)
    benchmark = bench_decode if settings.benchmark == "decode" else bench_prefill
    return benchmark(model, settings.options(), _tell)


def _by_context(model: "BDHForCausalLM", settings: BenchSettings) -> "Report":
    from bdh.bench.context import bench_context, draw

    report = bench_context(model, settings.options(), _tell)
    if settings.image is not None and not report.failed:
        draw(report.figures["contexts"], _resolved(settings.image))
    return report


def _tokens_of(name: str, tokenizer: Any) -> list[int]:
    text = read_text(Path(name).expanduser())
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) < 2:
        raise ValueError(f"text is {name!r}, of {counted(len(tokens), 'token')}: must have at least 2")
    return tokens


def _trained(settings: BenchSettings, training: "RunSettings | None") -> "Report":
    import torch

    from bdh.bench.steps import TrainCase
    from bdh.bench.train import bench_one_step, bench_train
    from bdh.model.configuration import BDHConfig
    from bdh.model.quantization import check_not_quantized
    from bdh.ops.blocks.plan import LayerOptionError
    from bdh.train.config import TrainSettings
    from bdh.train.runtime import choose_runtime, layer_options

    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise ValueError("device is cuda: this machine and PyTorch build have cpu")
    device = "cuda" if settings.device != "cpu" and has_gpu else "cpu"
    if settings.model is None:
        section = {} if training is None else asdict(training.model)
        config = BDHConfig(**(section | settings.sizes() | {"dropout": settings.step("dropout")}))
        weights = None
    else:
        model, _ = settings.load_with_transformers("cpu")
        check_not_quantized(model, settings.model, _FROM_UNROUNDED)
        config, weights = model.config, model.float().state_dict()
        if settings.dropout is not None:
            config.dropout = settings.dropout
    train = TrainSettings(device=device, **{name: getattr(settings, name) for name in _TAKEN_OVER})
    cases = [
        TrainCase(
            config,
            settings.step("batch_size"),
            size,
            device=device,
            dtype=str(choose_runtime(train).dtype).removeprefix("torch."),
            density=settings.density,
            seed=settings.seed,
            threads=settings.threads,
            options=layer_options(train),
            weights=weights,
        )
        for size in settings.block_sizes()
    ]
    try:
        if settings.one_step:
            return bench_one_step(cases[0], _tell)
        baselines, rounds = settings.chosen_baselines(), settings.step("rounds")
        return bench_train(cases, baselines=baselines, rounds=rounds, progress=_tell)
    except LayerOptionError as error:
        raise ValueError(f"{_FLAGS.get(error.option, error.option)} {error.fault}") from error


def _training_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments of ``bdh bench train`` into the files of ``--config`` and the rest.

    The files are configurations of ``bdh train``. For other benchmarks, no files are split off.
    """
    words, files, rest = list(argv), list[str](), list[str]()
    if not words or (words[0] != "train" and not (words[0].startswith("--") and "train" in words)):
        return [], words
    while words:
        word = words.pop(0)
        if word == "--config" and words and not words[0].startswith("--"):
            files.append(words.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    return files, rest


def _training_settings(files: Sequence[str], argv: Sequence[str]) -> "RunSettings | None":
    """Returns the settings of ``bdh train`` in these files; None if there are no files, or only help is requested."""
    if not files or {"-h", "--help"} & set(argv):
        return None
    if given_settings(BenchSettings, argv).get("model") is not None:
        raise ValueError("--config and --model are given together: each says what model is timed, so give one of them")
    from bdh.train.config import RunSettings

    prog, description = "bdh bench train", "A configuration of bdh train."
    training = parse_settings(
        RunSettings, [f"--config={file}" for file in files], prog=prog, description=description, check_available=False
    )
    train, default = training.train, RunSettings().train
    if train.init_from is not None:
        raise ValueError(
            f"train.init_from is {train.init_from!r} in {', '.join(files)}: bdh bench train makes the model that a "
            f"configuration describes; leave --config out, and give --model {shlex.quote(train.init_from)}"
        )
    others = ("carry_state", "gradient_accumulation_steps", "compile", "optimizer")
    ignored = [f"train.{name}" for name in others if getattr(train, name) != getattr(default, name)]
    if training.data.pack != RunSettings().data.pack:
        ignored.append("data.pack")
    if ignored:
        left_out = "left out of the configuration, since a single step of random tokens is timed"
        print(f"{left_out}: {', '.join(ignored)}", file=sys.stderr)
    return training


def _base(training: "RunSettings", files: Sequence[str]) -> dict[str, Any]:
    """Converts settings of ``bdh train`` to those of ``bdh bench train``, except for the vocabulary size."""
    model, train = training.model, training.train
    found = {name: getattr(model, name) for name in ("n_embd", "n_head", "n_layer", "mlp_internal_dim_multiplier")}
    found |= {"dropout": model.dropout, "batch_size": train.batch_size, "block_size": train.block_size}
    found |= {name: getattr(train, name) for name in _TAKEN_OVER}
    # Not the default of bdh train, auto: it would use a GPU, while bdh bench runs on the CPU by default.
    if "train.device" in given_settings(type(training), [f"--config={file}" for file in files]):
        found["device"] = train.device
    return found


def _entries(training: "RunSettings") -> int:
    """Returns the vocabulary size of a run with these settings."""
    training.tokenizer.check_available()
    from bdh.data.chat import holds_chat
    from bdh.tokenizer import load_tokenizer, with_chat_template
    from bdh.tokenizer.plain import vocabulary_size

    tokenizer = load_tokenizer(training.tokenizer)
    template = training.tokenizer.chat_template
    return vocabulary_size(with_chat_template(tokenizer, template, needs_one=holds_chat(training.data)))


def _wanted_of_file(name: str) -> str | None:
    """Returns what the name of a file to write must be, if the file cannot be written; None if it can."""
    path = _resolved(name)
    # The file is written to the same folder under another name, and then renamed.
    is_writable = os.access(path.parent, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.W_OK))
    wanted = {
        "the name of a file": bool(name),
        "a file, not a folder": not path.is_dir(),
        "a file, not a device": path.is_file() or not path.exists(),
        "a file in a folder that exists": path.parent.is_dir(),
        "a file that may be written, in a folder that may be": is_writable,
    }
    return next((words for words, is_so in wanted.items() if not is_so), None)


def _resolved(name: str) -> Path:
    """Resolves links, so that their target is replaced and not the link."""
    return Path(name).expanduser().resolve()


def _tell(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)
