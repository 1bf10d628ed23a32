"""bdh eval: measures a model on a text, on tasks of the LM Evaluation Harness, or by the facts that it recalls."""

import importlib.util
import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from bdh.cli.models import ModelSettings
from bdh.cli.output import count_progress, error_console, stage_progress, table_lines
from bdh.cli.run_data import data_of_run
from bdh.cli.settings import command
from bdh.data.config import DataConfig
from bdh.evaluate import check_task_files
from bdh.extras import install_command
from bdh.validation import Faults, NonNegativeInt, PathText, PositiveInt
from bdh.words import counted

_UNKNOWN_BLOCK_SIZE = 512


@dataclass(kw_only=True)
class EvalSettings(ModelSettings):
    data: DataConfig = field(default_factory=DataConfig)
    part: Literal["validation", "train", "all"] = "validation"
    """Part of the data to measure: validation (what training would hold out), train, or all."""
    block_size: PositiveInt | None = None
    """Tokens in a window. None: the length that the model was trained on, or 512 if it is unknown."""
    stride: int | None = None
    """Tokens between the starts of two windows. Less than block_size gives predictions more context, and takes longer."""
    carry_state: bool = False
    """Read the text once, and pass the state from window to window. With tasks: read all of each context."""
    streams: PositiveInt = 1
    """With carry_state: cut the text into this many equal stretches, each read from an empty state, in parallel."""
    blocks: PositiveInt | None = None
    """With carry_state: read stretches of this many blocks, each from an empty state, and print the loss of each block."""
    window: PositiveInt | None = None
    """With carry_state: attend only to this many last tokens, including the newest. None: to all of the text."""
    batch_size: PositiveInt = 16
    """Windows, stretches or texts in one forward pass."""
    tasks: list[PathText] = field(default_factory=list)
    """Tasks of the LM Evaluation Harness to run: names, YAML files or folders of them, with commas or as a list."""
    include_path: PathText | None = None
    """Tasks: folder with further tasks."""
    num_fewshot: NonNegativeInt | None = None
    """Tasks: number of solved examples before each question. None: what the task says."""
    limit: PositiveInt | None = None
    """Tasks: number of documents of each. None: all."""
    needle: bool = False
    """Insert a fact into the text, and ask for it at growing distances."""
    needle_distances: list[int] = field(default_factory=lambda: [64, 128, 256, 512, 1024, 2048, 4096, 8192])
    """Needle: tokens between the fact and the question."""
    needle_trials: PositiveInt = 16
    """Needle: number of facts to insert."""
    seed: int = 0
    """Needle: seed of the facts and the places."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)

        def require(name: str, is_right: bool, allowed: str) -> None:
            value = getattr(self, name)
            faults.require(value is None or is_right, name, value, allowed)

        distances = self.needle_distances
        require("needle_distances", bool(distances) and min(distances) >= 1, "a list of numbers of at least 1")
        require("needle", not (self.needle and self.tasks), "left out with tasks")
        self.collect_stride_faults(self.block_size, faults)
        is_right = not self.carry_state or self.stride == self.block_size
        require("stride", is_right, "left out with carry_state, which reads every token once")
        require("streams", self.streams == 1 or self.carry_state, "given with carry_state")
        is_right = self.carry_state and self.streams == 1
        require("blocks", is_right, "given with carry_state, and without streams, whose number follows from it")
        reads_on = self.carry_state and not self.tasks and not self.needle
        require("window", reads_on, "given with carry_state, and without tasks or needle")

    def check_available(self) -> None:
        super().check_available()
        if self.tasks:
            if importlib.util.find_spec("lm_eval") is None:
                raise ImportError(
                    f"tasks need the LM Evaluation Harness, which is not installed: {install_command('eval')}"
                )
            check_task_files(self.task_names(), self.include_path)

    def task_names(self) -> list[str]:
        """Returns the names of the tasks, including those separated by commas."""
        return [name.strip() for item in self.tasks for name in item.split(",") if name.strip()]

    def collect_stride_faults(self, block_size: int | None, faults: Faults) -> None:
        is_right = self.stride is None or 1 <= self.stride <= (block_size or self.stride)
        limit = "at least 1" if block_size is None else f"within 1 and block_size, {block_size}"
        faults.require(is_right, "stride", self.stride, limit)


@command("model", base=data_of_run)
def run_eval(settings: EvalSettings) -> int:
    """Measure loss, perplexity, bits per byte and accuracy on a text. With --tasks, run tasks of the LM Evaluation
    Harness. With --needle, measure how long the model remembers an inserted fact.
    """
    from bdh.tokenizer.plain import vocabulary_size

    model, tokenizer = settings.load_with_transformers()
    if vocabulary_size(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {counted(vocabulary_size(tokenizer), 'entry', 'entries')}, the model {model.config.vocab_size}"
        )
    settings = replace(settings, block_size=settings.block_size or model.config.train_block_size or _UNKNOWN_BLOCK_SIZE)
    run = _run_tasks if settings.tasks else _run_needle if settings.needle else _run_text
    run(settings, model, tokenizer)
    return 0


def _run_text(settings: EvalSettings, model: Any, tokenizer: Any) -> None:
    from bdh.data.chat import holds_chat
    from bdh.evaluate.loss import evaluate_text
    from bdh.tokenizer.plain import document_end_id

    block_size = settings.block_size
    assert block_size is not None
    faults = Faults()
    settings.collect_stride_faults(block_size, faults)
    faults.raise_if_any()
    if settings.data.mix is None and holds_chat(settings.data):
        _measure_answers(settings, model, tokenizer, block_size)
        return
    tokens, num_bytes, source = _text(settings, tokenizer)
    stretch_tokens = math.ceil((len(tokens) - 1) / settings.streams) if settings.streams > 1 else None
    with count_progress("evaluating", "tokens", len(tokens) - 1) as advance:
        metrics = evaluate_text(
            model,
            tokens,
            bytes_per_token=num_bytes / len(tokens),
            block_size=block_size,
            stride=settings.stride,
            carry_state=settings.carry_state,
            stretch_tokens=settings.blocks * block_size if settings.blocks else stretch_tokens,
            window=settings.window,
            document_end=document_end_id(tokenizer) if settings.data.pack == "documents" else None,
            max_batch_size=settings.batch_size,
            progress=advance,
            announce=lambda path: print(f"reading by {path}", file=sys.stderr),
        )
    windows = f"windows        {counted(block_size, 'token')}, {_describe(settings)}"
    _print_metrics(settings, metrics, source, block_size, windows)


def _measure_answers(settings: EvalSettings, model: Any, tokenizer: Any, block_size: int) -> None:
    """Measures the loss of the assistant's tokens in conversations.

    Each conversation is read with an empty state. Longer ones are cut into pieces that fit into ``block_size`` tokens.
    """
    from bdh.data import prepare_corpus
    from bdh.evaluate.loss import evaluate_parts

    for name, right, on in (
        ("part", ("validation",), "their validation part, or data.val_source"),
        ("stride", (None, block_size), "windows without overlap"),
        ("carry_state", (False,), "one conversation at a time"),
    ):
        if (value := getattr(settings, name)) not in right:
            raise ValueError(f"{name} is {value!r}: conversations are measured on {on}")
    corpus = prepare_corpus(settings.data, tokenizer, block_size)
    (part,) = corpus.validation_parts(sys.maxsize)
    metrics, _ = evaluate_parts(model, [part], max_batch_size=settings.batch_size)
    rows = f"conversations  {len(part.batch.tokens):,}, each read from nothing; only answers count"
    _print_metrics(settings, metrics, corpus.facts["source"], block_size, rows)


def _print_metrics(settings: EvalSettings, metrics: Any, source: Any, block_size: int, windows: str) -> None:
    by_block = metrics.loss_by_block(block_size) if settings.blocks else ()
    if settings.json:
        figures: dict[str, Any] = {**metrics.as_dict(), "nats_per_byte": metrics.nats_per_byte}
        if settings.blocks:
            figures |= {"loss_by_block": by_block, **metrics.loss_at()}
        print(json.dumps({**figures, "tokens": metrics.num_tokens, "block_size": block_size}))
        return
    print(f"tokens         {metrics.num_tokens:,} of {source} ({settings.part})")
    print(windows)
    print(f"loss           {metrics.loss:.4f} nats per token, {metrics.nats_per_byte:.4f} nats per byte")
    print(f"perplexity     {metrics.perplexity:.4f}")
    print(f"bits per byte  {metrics.bits_per_byte:.4f}")
    print(f"accuracy       {metrics.accuracy:.2%}")
    for number, loss in enumerate(by_block, start=1):
        print(f"block {number:<8} {loss:.4f} nats per token")


def _run_tasks(settings: EvalSettings, model: Any, tokenizer: Any) -> None:
    from bdh.evaluate.harness import HarnessModel, evaluate_tasks

    max_length = None if settings.carry_state else settings.block_size
    lm = HarnessModel(model, tokenizer, max_length=max_length, batch_size=settings.batch_size)
    scores = evaluate_tasks(
        lm,
        settings.task_names(),
        include_path=settings.include_path,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )
    if lm.num_cut:
        error_console().print(
            f"warning: {counted(lm.num_cut, 'text was', 'texts were')} longer than {max_length:,} tokens: "
            f"each prediction uses only the last {max_length:,}; --block_size sets how many, --carry_state uses all",
            style="yellow",
            markup=False,
        )
    if settings.json:
        figures = [asdict(score) for score in scores]
        print(json.dumps({"scores": figures, "max_length": max_length, "cut_contexts": lm.num_cut}))
        return
    rows = [("task", "metric", "value", "± error", "documents")]
    for score in scores:
        error = "-" if score.stderr is None else f"{score.stderr:.4f}"
        documents = "-" if score.num_samples is None else f"{score.num_samples:,}"
        rows.append((score.task, score.metric, f"{score.value:.4f}", error, documents))
    print("\n".join(table_lines(rows, num_names=2)))


def _run_needle(settings: EvalSettings, model: Any, tokenizer: Any) -> None:
    from bdh.evaluate.probes import ModelReader, measure_recall, tokens_to_read

    filler, _, source = _text(settings, tokenizer)
    reader, distances, trials = ModelReader(model), settings.needle_distances, settings.needle_trials
    with count_progress("evaluating", "tokens", tokens_to_read(distances, trials)) as advance:
        recalls = measure_recall(
            reader,
            tokenizer,
            filler,
            distances=distances,
            trials=trials,
            texts_at_once=reader.texts_that_fit(settings.batch_size),
            seed=settings.seed,
            progress=advance,
        )
    if settings.json:
        print(json.dumps({"filler": source, "seed": settings.seed, "recall": [asdict(each) for each in recalls]}))
        return
    rows = [("distance", "recalled", "guessed", "log-probability", "without the fact", "difference")]
    for each in recalls:
        with_fact, without = each.log_probability, each.control_log_probability
        shares = (f"{each.distance:,}", f"{each.accuracy:.1%}", f"{each.control_accuracy:.1%}")
        rows.append((*shares, f"{with_fact:.3f}", f"{without:.3f}", f"{with_fact - without:+.3f}"))
    print("\n".join(table_lines(rows, num_names=0)))
    print(f"{counted(trials, 'fact')} in {source}; log-probability in nats per token of the planted value")


def _text(settings: EvalSettings, tokenizer: Any) -> tuple[Any, int, str]:
    """Returns the tokens of the requested part, the size of their text in bytes, and the source's name."""
    import numpy as np

    from bdh.data import prepare_corpus

    with stage_progress("bytes") as progress:
        corpus = prepare_corpus(settings.data, tokenizer, block_size=0, progress=progress)
    parts = []
    if settings.part in ("train", "all"):
        parts.append((corpus.train_tokens(), corpus.facts["train_bytes"]))
    if settings.part in ("validation", "all"):
        parts.append((corpus.validation_tokens(), corpus.facts["val_bytes"]))
    tokens = np.concatenate([part for part, _ in parts])
    if len(tokens) < 2:
        source = f"data.source {settings.data.source!r}, part {settings.part}"
        raise ValueError(f"{source}, has {counted(len(tokens), 'token')}: at least 2 are needed to predict one")
    return tokens, sum(number for _, number in parts), corpus.facts["source"]


def _describe(settings: EvalSettings) -> str:
    """Returns how windows are read: separately, overlapping, or with a carried state."""
    if settings.window is not None:
        return f"{_describe(replace(settings, window=None))}, attending to the last {settings.window:,}"
    if settings.blocks is not None:
        return f"the state carried on through stretches of {settings.blocks}"
    if settings.streams > 1:
        return f"the state carried on through {settings.streams} streams"
    if settings.carry_state:
        return "the state carried on"
    return f"one every {settings.stride}" if settings.stride else "each read from nothing"
