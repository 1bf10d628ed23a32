"""bdh generate: continues prompts."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

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
    streams = len(prompts) == 1 and options.num_return_sequences == 1 and options.num_beams == 1
    if streams and settings.output is None:
        stream = model.stream_text(tokenizer, prompts[0], options)
        _print_stream(prompts[0], stream)
        return 0

    results = _results(model, tokenizer, prompts, options, settings.batch_size)
    if settings.output is None:
        for prompt, texts in results:
            for text in texts:
                print(f"{prompt}{text}\n", flush=True)
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


def _results(model, tokenizer, prompts: list[str], options: SamplingOptions, batch_size: int):
    """Pairs of a prompt and its continuations, in order."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield from zip(batch, model.generate_texts(tokenizer, batch, options), strict=True)


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
