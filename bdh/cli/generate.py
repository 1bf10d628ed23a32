"""bdh generate: continues prompts."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from bdh.cli.settings import parse_settings, verbatim
from bdh.model.sampling import SamplingOptions
from bdh.validation import Faults


@dataclass(kw_only=True)
class GenerateSettings(SamplingOptions):
    model: str
    """Folder of an exported model or of a run, or a hub id."""
    prompt: str | None = verbatim(None)
    """Text to continue."""
    prompts_file: str | None = None
    """File with one prompt a line (UTF-8), instead of --prompt."""
    chat: bool = False
    """Each prompt is a message of the user, which the model answers: put it into the tokenizer's chat template."""
    output: str | None = None
    """File to write results to, one JSON object a line with prompt and text; by default they are printed."""
    batch_size: int = 16
    """Prompts of a file that are continued together."""
    checkpoint: str | None = None
    """For a run: last (the default), best, or a step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)
        faults.require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        if (self.prompt is None) == (self.prompts_file is None):
            faults.add("give either --prompt or --prompts_file")

    def sampling(self) -> SamplingOptions:
        return SamplingOptions(**{f.name: getattr(self, f.name) for f in fields(SamplingOptions)})


def run(argv: list[str]) -> int:
    settings = parse_settings(
        GenerateSettings,
        argv,
        prog="bdh generate",
        description="Continue a prompt, printing the text as it comes, or all prompts of a file.",
        positionals=("model",),
    )
    prompts = [settings.prompt] if settings.prompt is not None else _read_prompts(Path(settings.prompts_file or ""))
    if settings.output is not None and Path(settings.output).exists():
        raise FileExistsError(f"{settings.output} exists already: choose another --output")

    from bdh.train.models import load_model

    model, tokenizer = load_model(settings.model, checkpoint=settings.checkpoint, device=settings.device)
    options = settings.sampling()
    asked = _asked(tokenizer, prompts, settings.chat)
    streams = len(prompts) == 1 and options.num_return_sequences == 1 and options.num_beams == 1
    if streams and settings.output is None:
        _print_stream("" if settings.chat else prompts[0], model.stream_text(tokenizer, asked[0], options))
        return 0

    results = _results(model, tokenizer, list(zip(prompts, asked, strict=True)), options, settings.batch_size)
    if settings.output is None:
        for prompt, texts in results:
            for text in texts:
                print(f"{'' if settings.chat else prompt}{text}\n", flush=True)
        return 0
    with Path(settings.output).open("x", encoding="utf-8") as file:
        _write_lines(file, results)
    print(f"{len(prompts)} prompts continued, in {settings.output}", file=sys.stderr)
    return 0


def _print_stream(prompt: str, stream: Iterator[str]) -> None:
    sys.stdout.write(prompt)
    for piece in stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _asked(tokenizer, prompts: list[str], chat: bool) -> list:
    """What the model reads: the prompts, or the ids of the conversations that begin with them."""
    if not chat:
        return prompts
    from bdh.tokenizer.chat import question

    return [question(tokenizer, prompt) for prompt in prompts]


def _results(model, tokenizer, prompts: list[tuple[str, Any]], options: SamplingOptions, batch_size: int):
    """Pairs of a prompt and its continuations, in order. Each prompt comes with what the model reads."""
    for start in range(0, len(prompts), batch_size):
        batch, asked = zip(*prompts[start : start + batch_size], strict=True)
        yield from zip(batch, model.generate_texts(tokenizer, asked, options), strict=True)


def _write_lines(file: TextIO, results) -> None:
    for prompt, texts in results:
        for text in texts:
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        file.flush()


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts: it needs one a line")
    return prompts
