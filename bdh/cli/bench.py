"""bdh bench: measures speed, next to baselines."""

import sys
from dataclasses import dataclass
from typing import Any, Literal

from bdh.cli.settings import parse_settings
from bdh.validation import Faults


@dataclass(kw_only=True)
class BenchSettings:
    what: Literal["decode", "prefill", "engine"]
    """decode: one token after the other; prefill: reading prompts; engine: many requests at once."""
    model: str | None = None
    """Folder of a model, a run, or a hub id. None makes weights of which as many neurons fire as in trained models."""
    n_embd: int = 256
    """Without model: D."""
    n_head: int = 4
    """Without model: H."""
    n_layer: int = 6
    """Without model: L."""
    mlp_internal_dim_multiplier: int = 128
    """Without model: neurons of all heads, in multiples of D."""
    vocab_size: int = 256
    """Without model: V."""
    threads: int | None = None
    """Of torch and the kernels. None for torch's own choice."""
    agreement_tokens: int = 2000
    """decode, prefill: tokens over which the forms are compared before they are timed."""
    seed: int = 0
    """Of weights and tokens."""
    quick: bool = False
    """A few seconds on a small model and few tokens: whether it runs, not how fast it is."""
    json: str | None = None
    """Write the figures to this file too; - for standard output instead of the table."""

    def collect_faults(self, faults: Faults) -> None:
        sizes = ("n_embd", "n_head", "n_layer", "mlp_internal_dim_multiplier", "vocab_size", "agreement_tokens")
        for name in sizes:
            faults.require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        faults.require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or null")
        # The engine reads texts of the byte tokenizer.
        is_right = self.what != "engine" or self.model is not None or self.vocab_size == 256
        faults.require(is_right, "vocab_size", self.vocab_size, "256 for the engine without a model: bytes")


def run(argv: list[str]) -> int:
    settings = parse_settings(
        BenchSettings,
        argv,
        prog="bdh bench",
        description="Measure how fast a model writes (decode), reads (prefill), or serves many requests (engine), after "
        "checking that all forms of it agree.",
        positionals=("what",),
    )
    import torch

    from bdh.bench.decode import DisagreementError
    from bdh.bench.report import Report
    from bdh.bench.timing import machine

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model, tokenizer = _model(settings)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    tokens = torch.randint(model.config.vocab_size, (10_000,), generator=generator).tolist()
    report = Report(settings.what, {"machine": machine(), "model": _described(model, tokens)})
    try:
        _measure(settings, model, tokenizer, tokens, report)
    except DisagreementError as error:
        report.print()
        print(f"error: {error}", file=sys.stderr)
        return 1
    if settings.json != "-":
        report.print()
    if settings.json is not None:
        report.write_json(settings.json)
    return 0


def _measure(settings: BenchSettings, model: Any, tokenizer: Any, tokens: list[int], report: Any) -> None:
    if settings.what == "decode":
        from bdh.bench.decode import DecodeSizes, bench_decode

        decode = DecodeSizes(agreement_tokens=settings.agreement_tokens)
        if settings.quick:
            decode = DecodeSizes(agreement_tokens=100, context=80, rounds=2, calls=2, flat_tokens=20)
        bench_decode(model, tokens, report, decode)
    elif settings.what == "prefill":
        from bdh.bench.prefill import PrefillSizes, bench_prefill

        prefill = PrefillSizes(agreement_tokens=settings.agreement_tokens)
        if settings.quick:
            prefill = PrefillSizes(lengths=(64, 128, 256), naive_tokens=128, agreement_tokens=100)
        bench_prefill(model, tokens, report, prefill)
    else:
        from bdh.bench.engine import EngineSizes, bench_engine

        engine = EngineSizes()
        if settings.quick:
            engine = EngineSizes(steps=5, long_prompt=500, shared_prefix=300, agreement_requests=4)
        bench_engine(model, tokenizer, tokens, report, engine)


def _model(settings: BenchSettings) -> tuple[Any, Any]:
    if settings.model is not None:
        from bdh.train.models import load_model

        return load_model(settings.model, device="cpu")
    from bdh.bench.weights import sparse_model
    from bdh.model import BDHConfig
    from bdh.tokenizer import byte_tokenizer

    sizes: dict[str, Any] = (
        {"n_embd": 32, "n_head": 2, "n_layer": 2, "mlp_internal_dim_multiplier": 16} if settings.quick else {}
    )
    for name in ("n_embd", "n_head", "n_layer", "mlp_internal_dim_multiplier"):
        sizes.setdefault(name, getattr(settings, name))
    config = BDHConfig(**sizes, vocab_size=settings.vocab_size, dropout=0.0)
    return sparse_model(config, settings.seed), byte_tokenizer()


def _described(model: Any, tokens: list[int]) -> str:
    import torch

    from bdh.bench.weights import densities

    config = model.config
    found = densities(model, torch.tensor(tokens[:256]))
    x, pairs, xy = (sum(getattr(each, name) for each in found) / len(found) for name in ("x", "pairs", "xy"))
    by_pass = ", ".join(f"{each.x:.1%}" for each in found)
    return (
        f"{model.num_parameters() / 1e6:.1f}M parameters, D {config.n_embd}, H {config.n_head}, "
        f"N {config.neurons_per_head}, L {config.n_layer}, V {config.vocab_size}; x fires {x:.1%} ({by_pass}), "
        f"pairs {pairs:.1%}, x * y {xy:.1%}"
    )
