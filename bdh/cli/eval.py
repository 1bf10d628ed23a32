"""bdh eval: measures a model on a text."""

import json
from dataclasses import dataclass, field
from typing import Literal

from bdh.cli.settings import parse_settings
from bdh.data.config import DataConfig
from bdh.validation import Faults


@dataclass(kw_only=True)
class EvalSettings:
    model: str
    """Folder of an exported model or of a run, or a hub id."""
    data: DataConfig = field(default_factory=DataConfig)
    part: Literal["validation", "train", "all"] = "validation"
    """Part of the data: what training would validate on, what it would train on, or both."""
    block_size: int = 512
    """Tokens that a window reads. The length that the model was trained at fits best."""
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
        faults.require(self.block_size >= 1, "block_size", self.block_size, "at least 1")
        faults.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        faults.require(
            self.stride is None or 1 <= self.stride <= self.block_size,
            "stride",
            self.stride,
            f"within 1 and block_size, {self.block_size}",
        )
        faults.require(
            not self.carry_state or self.stride in (None, self.block_size),
            "stride",
            self.stride,
            "left out with carry_state, which reads every token once",
        )


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

    from bdh.cli.models import load_model
    from bdh.cli.progress import stage_progress, token_progress
    from bdh.data import prepare_corpus
    from bdh.evaluate.loss import evaluate_text

    model, tokenizer = load_model(settings.model, checkpoint=settings.checkpoint, device=settings.device)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, the model {model.config.vocab_size}")
    console = Console(stderr=True, highlight=False)
    with stage_progress(console, "bytes") as progress:
        corpus = prepare_corpus(settings.data, tokenizer, block_size=1, progress=progress)
    parts = {"validation": [corpus.validation_tokens], "train": [corpus.train_tokens]}
    parts["all"] = [corpus.train_tokens, corpus.validation_tokens]
    tokens = np.concatenate([read() for read in parts[settings.part]])
    with token_progress(console, len(tokens) - 1) as advance:
        metrics = evaluate_text(
            model,
            tokens,
            bytes_per_token=corpus.val_bytes_per_token,
            block_size=settings.block_size,
            stride=settings.stride,
            carry_state=settings.carry_state,
            max_batch_size=settings.batch_size,
            progress=advance,
        )
    if settings.json:
        print(json.dumps({**metrics.as_dict(), "nats_per_byte": metrics.nats_per_byte, "tokens": metrics.num_tokens}))
        return 0
    print(f"tokens         {metrics.num_tokens:,} of {corpus.facts['source']} ({settings.part})")
    print(f"loss           {metrics.loss:.4f} nats per token, {metrics.nats_per_byte:.4f} nats per byte")
    print(f"perplexity     {metrics.perplexity:.4f}")
    print(f"bits per byte  {metrics.bits_per_byte:.4f}")
    print(f"accuracy       {metrics.accuracy:.2%}")
    return 0
