"""bdh eval: measures a model on a text."""

import json
import math
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
    streams: int = 1
    """With carry_state: stretches of equal length that the text is cut into, each read from nothing, side by side."""
    blocks: int | None = None
    """With carry_state: read the text in stretches of so many blocks, each from nothing, and show the loss of each block."""
    batch_size: int = 16
    """Windows, or stretches, in one forward pass."""
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
        faults.require(self.streams >= 1, "streams", self.streams, "at least 1")
        faults.require(self.streams == 1 or self.carry_state, "streams", self.streams, "given with carry_state")
        faults.require(self.blocks is None or self.blocks >= 1, "blocks", self.blocks, "at least 1")
        faults.require(
            self.blocks is None or (self.carry_state and self.streams == 1),
            "blocks",
            self.blocks,
            "given with carry_state, and without streams, whose number follows from it",
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
    with stage_progress(console, "bytes") as progress:
        corpus = prepare_corpus(settings.data, tokenizer, block_size=0, progress=progress)
    parts = []
    if settings.part in ("train", "all"):
        parts.append((corpus.train_tokens(), corpus.facts["train_bytes"]))
    if settings.part in ("validation", "all"):
        parts.append((corpus.validation_tokens(), corpus.facts["val_bytes"]))
    tokens = np.concatenate([part for part, _ in parts])
    if len(tokens) < 2:
        source = f"data.source {settings.data.source!r}, part {settings.part}"
        raise ValueError(f"{source}, has {len(tokens)} tokens: at least 2 are needed to predict one")
    num_bytes = sum(number for _, number in parts)
    with token_progress(console, len(tokens) - 1) as advance:
        metrics = evaluate_text(
            model,
            tokens,
            bytes_per_token=num_bytes / len(tokens),
            block_size=block_size,
            stride=settings.stride,
            carry_state=settings.carry_state,
            stretch_tokens=_stretch_tokens(settings, block_size, len(tokens) - 1),
            document_end=tokenizer.eos_token_id if settings.data.pack == "documents" else None,
            max_batch_size=settings.batch_size,
            progress=advance,
        )
    by_block = metrics.loss_by_block(block_size) if settings.blocks else ()
    if settings.json:
        figures: dict[str, Any] = {**metrics.as_dict(), "nats_per_byte": metrics.nats_per_byte}
        if settings.blocks:
            figures |= {"loss_by_block": by_block, **metrics.loss_at()}
        print(json.dumps({**figures, "tokens": metrics.num_tokens, "block_size": block_size}))
        return 0
    print(f"tokens         {metrics.num_tokens:,} of {corpus.facts['source']} ({settings.part})")
    print(f"windows        {block_size:,} tokens, {_describe(settings)}")
    print(f"loss           {metrics.loss:.4f} nats per token, {metrics.nats_per_byte:.4f} nats per byte")
    print(f"perplexity     {metrics.perplexity:.4f}")
    print(f"bits per byte  {metrics.bits_per_byte:.4f}")
    print(f"accuracy       {metrics.accuracy:.2%}")
    for number, loss in enumerate(by_block, start=1):
        print(f"block {number:<8} {loss:.4f} nats per token")
    return 0


def _stretch_tokens(settings: EvalSettings, block_size: int, num_predicted: int) -> int | None:
    if settings.blocks is not None:
        return settings.blocks * block_size
    return math.ceil(num_predicted / settings.streams) if settings.streams > 1 else None


def _describe(settings: EvalSettings) -> str:
    if settings.blocks is not None:
        return f"the state carried on through stretches of {settings.blocks}"
    if settings.streams > 1:
        return f"the state carried on through {settings.streams} streams"
    if settings.carry_state:
        return "the state carried on"
    return f"one every {settings.stride}" if settings.stride else "each read from nothing"
