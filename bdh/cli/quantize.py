"""bdh quantize: writes a model with weights in 8 or 4 bits, and reports the effect."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.models import ModelSettings
from bdh.cli.output import stage_bars, stage_progress, table_lines
from bdh.cli.run_data import data_of_run
from bdh.cli.settings import command
from bdh.data.config import DataConfig
from bdh.ops import QuantizedWeights, RoundingMethod, StateFormat
from bdh.storage import check_free
from bdh.train.places import lock_run_around
from bdh.validation import Faults, NonNegativeInt, PathText, PositiveInt
from bdh.words import counted

if TYPE_CHECKING:
    import torch

    from bdh.data.batches import Batch
    from bdh.train.models import OpenedModel

REPORT_FILE = "quantization.json"
_UNKNOWN_BLOCK_SIZE = 512
_CALIBRATION_TOKENS = 32_768
_logger = logging.getLogger(__name__)


@dataclass
class HeldOutText(DataConfig):
    source: PathText | list[PathText] | None = None  # type: ignore[assignment]  # not a built-in text
    """Text, as for bdh train. None: the text of the model's run; if the model is not from a run, nothing is measured."""

    @property
    def is_given(self) -> bool:
        return self.source is not None or self.mix is not None

    def check_available(self) -> None:
        if self.is_given:
            super().check_available()


@dataclass(kw_only=True)
class QuantizeSettings(ModelSettings):
    out: PathText
    """Folder to write."""
    weights: QuantizedWeights = "int8"
    """int8: a quarter of the size; int4: a seventh; mixed: the encoder in int8, the rest of the layer in int4."""
    embeddings: bool = False
    """Also store the embedding and the head in int8, for large vocabularies."""
    method: RoundingMethod = "rtn"
    """rtn: round each weight to the nearest value. gptq: read a text, and round so that the layer's outputs on it
    change least."""
    calibration_tokens: PositiveInt | None = None
    """gptq: tokens of the training part to read, at most all that it has. None: 32,768."""
    state: StateFormat | None = None
    """State format to recommend, which config.json stores: commands use it with this model unless they are given
    another. None: no recommendation."""
    data: HeldOutText = field(default_factory=HeldOutText)
    block_size: PositiveInt | None = None
    """Tokens in a sequence of the text. None: the length that the model was trained on, or 512 if it is unknown."""
    held_out_tokens: NonNegativeInt = 32_768
    """Tokens of the held-out part to measure both models on; 0: measure nothing."""
    batch_size: PositiveInt = 16
    """Sequences in one forward pass."""
    json: bool = False
    """Print the report as one JSON object."""

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)
        reads_text = self.method != "rtn"
        if reads_text and not self.data.is_given:
            faults.add(f"method is {self.method!r}: needs text to calibrate on, as data.source")
        is_right = reads_text or self.calibration_tokens is None
        faults.require(is_right, "calibration_tokens", self.calibration_tokens, f"left out with method {self.method}")

    def check_available(self) -> None:
        check_free(Path(self.out))
        super().check_available()


@command("model", "out", base=data_of_run)
def run_quantize(settings: QuantizeSettings) -> int:
    """Quantize the weights of a model to 8 or 4 bits, and report what this changes: the size, the error of each matrix,
    and, on held-out text, perplexity, the distribution of the next token, and which neurons fire.
    """
    from bdh.quantize.rounding import check_quantizable, quantize
    from bdh.tokenizer import load_tokenizer
    from bdh.train.config import TrainSettings
    from bdh.train.export import ready_for_users, train_data, write_model
    from bdh.train.models import open_model
    from bdh.train.runtime import choose_runtime

    out = Path(settings.out)
    device = choose_runtime(TrainSettings(device=settings.device)).device
    opened = open_model(settings.model, checkpoint=settings.checkpoint, base=settings.base)
    model: Any = opened.merged().to(device)  # type: ignore[arg-type]
    check_quantizable(model, settings.model, embeddings=settings.embeddings)
    tokenizer = load_tokenizer(opened.tokenizer_path)
    text = _Text(settings, model, tokenizer)
    held_out, sequences = text.held_out(), text.calibration()
    if opened.checkpoint is not None:
        model.config.train_data = train_data(opened.checkpoint)
    if opened.checkpoint is not None or opened.tuner is not None:
        tokenizer = ready_for_users(model, tokenizer)
    with stage_bars() as progress:
        quantized = quantize(
            model,
            settings.weights,
            method=settings.method,
            embeddings=settings.embeddings,
            state=settings.state,
            sequences=sequences,
            progress=progress,
        )
        facts = _facts(settings, model, quantized, text, held_out, sequences, progress)
    texts = {REPORT_FILE: json.dumps(facts, indent=2) + "\n", "README.md": _card(settings, facts, model, opened)}
    with lock_run_around(out):
        check_free(out)
        write_model(out, quantized, tokenizer, texts)
    print(json.dumps(facts) if settings.json else "\n".join(_lines(settings, facts)))
    return 0


class _Text:
    """The text of the settings, in sequences of the length that the model was trained on."""

    def __init__(self, settings: QuantizeSettings, model: Any, tokenizer: Any):
        from bdh.data import prepare_corpus

        self._settings, self._tokenizer = settings, tokenizer
        self.block_size = settings.block_size or model.config.train_block_size or _UNKNOWN_BLOCK_SIZE
        self.corpus = None
        if settings.data.is_given and (settings.held_out_tokens or settings.method != "rtn"):
            with stage_progress("bytes") as progress:
                self.corpus = prepare_corpus(settings.data, tokenizer, self.block_size, progress=progress)

    def held_out(self) -> "list[Batch]":
        """Returns evenly spaced sequences of the validation part; none without text."""
        from bdh.tokenizer.plain import document_end_id

        if self.corpus is None or not self._settings.held_out_tokens:
            return []
        end = document_end_id(self._tokenizer) if self._settings.data.pack == "documents" else None
        number = -(-self._settings.held_out_tokens // self.block_size)
        return [part.batch for part in self.corpus.validation_parts(number, end)]

    def calibration(self) -> "list[torch.Tensor] | None":
        """Returns random batches (B, T) of the training part; None if the method needs no text.

        Documents that training reads separately, such as conversations, are separate sequences here too, without
        padding.
        """
        if self.corpus is None or self._settings.method == "rtn":
            return None
        import torch

        batch_size, wanted = self._settings.batch_size, self._num_calibration_tokens()
        loader = self.corpus.train_loader(min(-(-wanted // self.block_size), batch_size), seed=0)
        texts: list[torch.Tensor] = []
        num_tokens = 0
        while num_tokens < wanted and (drawn := loader.next().documents()):
            for text in drawn:
                if num_tokens < wanted:
                    texts.append(text)
                    num_tokens += len(text)
        alike = (torch.stack(list(group)) for _, group in groupby(texts, len))
        return [batch for each in alike for batch in each.split(batch_size)]

    def _num_calibration_tokens(self) -> int:
        """Returns the number of tokens to read: that of the settings, but at most those of the training part."""
        assert self.corpus is not None
        asked, there = self._settings.calibration_tokens, self.corpus.facts["train_tokens"]
        if there is None:  # unknown for a stream
            return asked or _CALIBRATION_TOKENS
        if asked is not None and asked > there:
            _logger.warning(
                "calibration_tokens is %s, but the training part has only %s tokens: all of them are used",
                f"{asked:,}",
                f"{there:,}",
            )
        return min(asked or _CALIBRATION_TOKENS, there)


def _facts(
    settings: QuantizeSettings,
    model: Any,
    quantized: Any,
    text: _Text,
    held_out: "Sequence[Batch]",
    sequences: "Sequence[torch.Tensor] | None",
    progress: Any,
) -> dict[str, Any]:
    """Returns the report as JSON types."""
    from bdh.model.fingerprint import fingerprint
    from bdh.quantize.report import compare, matrix_errors

    facts: dict[str, Any] = {
        "model": settings.model,
        "fingerprint": fingerprint(model),
        **{name: getattr(settings, name) for name in ("weights", "embeddings", "method", "state")},
        "calibration_tokens": sum(batch.numel() for batch in sequences) if sequences else None,
        "calibration_source": text.corpus.facts["source"] if text.corpus is not None and sequences else None,
        "bytes": {"before": _num_bytes(model), "after": _num_bytes(quantized)},
        "matrices": [asdict(each) for each in matrix_errors(model, quantized)],
        "text": None,
    }
    if held_out:
        assert text.corpus is not None
        found = compare(model, quantized, held_out, max_batch_size=settings.batch_size, progress=progress)
        facts["text"] = {"source": text.corpus.facts["source"], "block_size": text.block_size, **asdict(found)}
    return facts


def _num_bytes(model: Any) -> int:
    """Returns the size of the weights, which is nearly that of the safetensors file."""
    return sum(weight.nbytes for weight in model.state_dict().values())


def _rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the name of each figure, with its value before and after."""
    size, text = facts["bytes"], facts["text"]
    rows = [("size on disk", f"{size['before'] / 1e6:,.2f} MB", f"{size['after'] / 1e6:,.2f} MB")]
    if text is None:
        return rows
    before, after = text["before"], text["after"]
    for name, value, form in (
        ("perplexity", lambda each: each["perplexity"], ".4f"),
        ("loss, nats per token", lambda each: each["loss"], ".5f"),
        ("neurons of x that fire", lambda each: _mean(each["density"]["x"]), ".2%"),
        ("neurons of y that fire", lambda each: _mean(each["density"]["y"]), ".2%"),
    ):
        rows.append((name, format(value(before), form), format(value(after), form)))
    return rows


def _sentences(facts: dict[str, Any]) -> list[str]:
    size, text = facts["bytes"], facts["text"]
    found = [f"The weights take {size['after'] / size['before']:.3f} of the bytes."]
    if text is None:
        return [*found, "Nothing was measured on text: --data.source says on which."]
    change = text["after"]["perplexity"] / text["before"]["perplexity"] - 1
    still = {kind: _mean(text["still_fire"][kind]) for kind in ("x", "y")}
    return [
        *found,
        f"Perplexity changes by {change:+.2%}, on {counted(text['tokens'], 'held-out token')} of {text['source']} in sequences of "
        f"{text['block_size']:,}.",
        f"The distribution of the next token diverges by {text['kl']:.2e} nats (KL); {text['same_prediction']:.2%} of the likeliest tokens "
        "are the same.",
        f"Of the neurons that fire, {still['x']:.2%} of x and {still['y']:.2%} of y still fire, in the mean over the layer steps.",
    ]


def _how(facts: dict[str, Any]) -> str:
    """Returns the method, and the text that it has read."""
    if (tokens := facts["calibration_tokens"]) is None:
        return str(facts["method"])
    return f"{facts['method']}, on {counted(tokens, 'token')} of {facts['calibration_source']}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _matrix_rows(facts: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (each["module"], each["format"], f"{each['relative_error']:.3%}", f"{each['saturated']:.3%}")
        for each in facts["matrices"]
    ]


_MATRIX_COLUMNS = ("matrix", "format", "error", "saturated")


def _lines(settings: QuantizeSettings, facts: dict[str, Any]) -> list[str]:
    return [
        *table_lines([_MATRIX_COLUMNS, *_matrix_rows(facts)], num_names=2),
        "",
        *table_lines([("", "before", "after"), *_rows(facts)], num_names=1),
        "",
        *_sentences(facts),
        f"{settings.out}: {settings.model} in {settings.weights} ({_how(facts)}); {REPORT_FILE} has these figures",
    ]


def _card(settings: QuantizeSettings, facts: dict[str, Any], model: Any, opened: "OpenedModel") -> str:
    """Returns the README: a description of the quantization, and the content of the original model's card."""
    from bdh.train.export import card

    about = {
        "int8": "Each neuron's row of weights is in 8 bits, with a scale of its own.",
        "int4": "Each 32 weights of a neuron's row are in 4 bits, with a scale of their own.",
        "mixed": "The encoder has each neuron's row in 8 bits with a scale of its own; Ev and Dec have 32 weights each in 4 bits.",
    }[settings.weights]
    embeddings = " Embedding and head are in 8 bits too." * settings.embeddings
    state = f" States in {settings.state} are recommended." if settings.state else ""
    text = f"""\
The weights of `{settings.model}`, rounded ({_how(facts)}) by `bdh quantize`. {about}{embeddings}{state}

## Quantization

{_markdown(("", "before", "after"), _rows(facts))}

{" ".join(_sentences(facts))}

The error of a matrix is the root mean square of the changes over that of its weights; saturated are codes at an end of their
range.

{_markdown(_MATRIX_COLUMNS, _matrix_rows(facts))}

## Use

```python
import bdh
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
print(model.generate_text(tokenizer, "The ", max_new_tokens=80, temperature=0.8, top_k=50))
```
{_body_of(opened, model)}"""
    return card(f"A BDH language model of {model.num_parameters():,} parameters, in {settings.weights}", text.rstrip())


def _body_of(opened: "OpenedModel", model: Any) -> str:
    """Returns the original model's card without its title and its example program."""
    from bdh.train.export import model_card

    if opened.checkpoint is not None:
        own = model_card(model, opened.checkpoint)
    elif opened.tuner is None and (path := Path(opened.place.name) / "README.md").is_file():
        own = path.read_text(encoding="utf-8")
    else:
        return ""
    own = re.sub(r"\A---\n.*?\n---\n", "", own, flags=re.DOTALL)
    own = re.sub(r"^## Use\n.*?^```python\n.*?^```\n", "", own, count=1, flags=re.DOTALL | re.MULTILINE)
    own = re.sub(r"^# .*\n", "", own.strip() + "\n", count=1)
    own = re.sub(r"^(#+) ", r"#\1 ", own, flags=re.MULTILINE)
    return f"\n## The model before\n\n{own.strip()}\n" if own.strip() else ""


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(columns), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
