"""bdh bench: how fast a model goes on, reads, and serves several requests on this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


@dataclass(kw_only=True)
class BenchSettings:
    benchmark: Literal["decode", "prefill", "engine"]
    """decode: a token at a time, compared with other forms. prefill: prompts by their length. engine: several requests."""
    model: str | None = None
    """Folder of an exported model or of a run, or a hub id. None makes one whose neurons fire as sparsely as trained ones."""
    n_embd: int | None = None
    """Of the model that is made: D. None for 256, and 64 with quick."""
    n_head: int | None = None
    """H. None for 4, and 2 with quick."""
    n_layer: int | None = None
    """L. None for 6, and 3 with quick."""
    mlp_internal_dim_multiplier: int | None = None
    """Neurons of all heads, in multiples of D. None for 128, and 32 with quick."""
    vocab_size: int | None = None
    """V. None for 256."""
    agreement_tokens: int = 2000
    """decode: tokens over which all forms must agree before any is timed; at most 100 with quick."""
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
        faults.require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        faults.require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")
        if self.json not in (None, "-"):
            parent = Path(self.json).expanduser().parent
            faults.require(parent.is_dir(), "json", self.json, "a file in a folder that exists, or -")

    def sizes(self) -> dict[str, int]:
        """Of the model that is made."""
        defaults = QUICK_SIZES if self.quick else _SIZES
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def options(self) -> BenchOptions:
        options = BenchOptions(seed=self.seed, agreement_tokens=self.agreement_tokens)
        return options.quick() if self.quick else options


def run(argv: list[str]) -> int:
    settings = parse_settings(
        BenchSettings,
        argv,
        prog="bdh bench",
        description="Time a model on this machine's processor, with the sparse kernels. What is compared must agree "
        "first; if it does not, nothing is timed, and the status is 1.",
        positionals=("benchmark",),
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


def _made(settings: BenchSettings) -> "BDHForCausalLM":
    from bdh.bench.weights import sparse_model
    from bdh.model.configuration import BDHConfig

    _tell("making a model whose neurons fire sparsely")
    return sparse_model(BDHConfig(**settings.sizes()), settings.seed)  # type: ignore[arg-type]  # sizes are its only keys


def _tell(stage: str) -> None:
    print(f"{stage} ...", file=sys.stderr, flush=True)
