"""bdh eval: measures a model on a text."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from bdh.cli.settings import parse_settings
from bdh.data.config import DataConfig
from bdh.validation import Faults

_UNKNOWN_BLOCK_SIZE = 512


@dataclass(kw_only=True)
class EvalSettings:
    model: str
    """Folder of an exported model or of a run, or a hub id."""
    data: DataConfig = field(default_factory=DataConfig)
    part: Literal["validation", "train", "all"] = "validation"
    """Part of the data: what training would validate on, what it would train on, or both."""
    block_size: int | None = None
    """Tokens that a window reads. None takes the length that the model was trained at, or 512 if it is unknown."""
    stride: int | None = None
    """Tokens between the starts of two windows; less than block_size gives more context, at more work."""
    carry_state: bool = False
    """Read the text once, with the state handed from window to window."""
    batch_size: int = 16
    """Windows in one forward pass."""
    checkpoint: str | None = None
    """For a run: last (the default), best, or a step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(self.block_size is None or self.block_size >= 1, "block_size", self.block_size, "at least 1")
        faults.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        self.collect_stride_faults(self.block_size, faults)
        faults.require(
            not self.carry_state or self.stride in (None, self.block_size),
            "stride",
            self.stride,
            "left out with carry_state, which reads every token once",
        )

    def collect_stride_faults(self, block_size: int | None, faults: Faults) -> None:
        is_right = self.stride is None or 1 <= self.stride <= (block_size or self.stride)
        limit = "at least 1" if block_size is None else f"within 1 and block_size, {block_size}"
        faults.require(is_right, "stride", self.stride, limit)


def run(argv: list[str]) -> int:
    settings = parse_settings(
        EvalSettings,
        argv,
        prog="bdh eval",
        description="Measure loss, perplexity, bits per byte and accuracy on a whole text.",
        positionals=("model",),
    )
    import numpy as np
    from rich.console import Console

    from bdh.cli.progress import stage_progress, token_progress
    from bdh.data import prepare_corpus
    from bdh.data.conversations import holds_chat
    from bdh.evaluate.loss import evaluate_text
    from bdh.train.models import load_model

    model, tokenizer = load_model(settings.model, checkpoint=settings.checkpoint, device=settings.device)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    block_size = settings.block_size or model.config.train_block_size or _UNKNOWN_BLOCK_SIZE
    faults = Faults()
    settings.collect_stride_faults(block_size, faults)
    faults.raise_if_any()
    console = Console(stderr=True, highlight=False)
    if settings.data.mix is None and holds_chat(settings.data):
        return _measure_answers(settings, model, tokenizer, block_size)
    with stage_progress(console, "bytes") as progress:
        corpus = prepare_corpus(settings.data, tokenizer, block_size=1, progress=progress)
    parts = []
    if settings.part in ("train", "all"):
        parts.append((corpus.train_tokens(), corpus.facts["train_bytes"]))
    if settings.part in ("validation", "all"):
        parts.append((corpus.validation_tokens(), corpus.facts["val_bytes"]))
    tokens = np.concatenate([part for part, _ in parts])
    num_bytes = sum(number for _, number in parts)
    with token_progress(console, len(tokens) - 1) as advance:
        metrics = evaluate_text(
            model,
            tokens,
            bytes_per_token=num_bytes / len(tokens),
            block_size=block_size,
            stride=settings.stride,
            carry_state=settings.carry_state,
            max_batch_size=settings.batch_size,
            progress=advance,
        )
    _print_metrics(
        settings,
        metrics,
        corpus.facts["source"],
        block_size,
        f"windows        {block_size:,} tokens, {_describe(settings)}",
    )
    return 0


def _measure_answers(settings: EvalSettings, model: Any, tokenizer: Any, block_size: int) -> int:
    """Of conversations: each read from nothing, in pieces of ``block_size``, and what the assistant writes is measured."""
    from bdh.data import prepare_corpus
    from bdh.evaluate.parts import evaluate_part

    wrong: list[tuple[str, Any, bool, str]] = []
    wrong += [("part", settings.part, settings.part != "validation", "their validation part, or data.val_source")]
    wrong += [("stride", settings.stride, settings.stride not in (None, block_size), "windows without overlap")]
    wrong += [("carry_state", True, settings.carry_state, "one conversation at a time")]
    for name, value, is_wrong, on in wrong:
        if is_wrong:
            raise ValueError(f"{name} is {value!r}: conversations are measured on {on}")
    corpus = prepare_corpus(settings.data, tokenizer, block_size)
    (part,) = corpus.validation_parts(sys.maxsize)
    metrics = evaluate_part(model, part, max_batch_size=settings.batch_size)
    rows = f"conversations  {len(part.batch.tokens):,}, each read from nothing; only answers count"
    _print_metrics(settings, metrics, corpus.facts["source"], block_size, rows)
    return 0


def _print_metrics(settings: EvalSettings, metrics: Any, source: Any, block_size: int, windows: str) -> None:
    if settings.json:
        figures = {**metrics.as_dict(), "nats_per_byte": metrics.nats_per_byte}
        print(json.dumps({**figures, "tokens": metrics.num_tokens, "block_size": block_size}))
        return
    print(f"tokens         {metrics.num_tokens:,} of {source} ({settings.part})")
    print(windows)
    print(f"loss           {metrics.loss:.4f} nats per token, {metrics.nats_per_byte:.4f} nats per byte")
    print(f"perplexity     {metrics.perplexity:.4f}")
    print(f"bits per byte  {metrics.bits_per_byte:.4f}")
    print(f"accuracy       {metrics.accuracy:.2%}")


def _describe(settings: EvalSettings) -> str:
    if settings.carry_state:
        return "the state carried on"
    return f"one every {settings.stride}" if settings.stride else "each read from nothing"
