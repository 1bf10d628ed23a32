"""bdh generate: continues prompts."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bdh.cli.models import ModelSettings, load_for_generation
from bdh.cli.output import count_progress
from bdh.cli.settings import command, verbatim
from bdh.generate.grammar import check_grammar_library, collect_grammar_faults
from bdh.generate.params import EngineConfig, LogprobCount, SamplingParams, TextSettings, collect_text_faults
from bdh.generate.prompts_file import Job, num_done, read_jobs, result_lines
from bdh.storage import check_folder_of, naming_full_disk
from bdh.text_files import read_text
from bdh.validation import Faults, PathText
from bdh.words import counted

_BEAM_PROMPTS = 16  # prompts in one beam search


@dataclass(kw_only=True)
class GenerateSettings(ModelSettings, TextSettings):
    prompt: str | None = verbatim(None)
    """Text to continue. For several, use --prompts_file."""
    prompts_file: PathText | None = None
    """File of prompts, instead of --prompt: a text file with a prompt in each line, or a .jsonl file of objects with a
    prompt (or messages) and their own settings, such as max_tokens or seed; other keys are copied to the results."""
    chat: bool = False
    """Treat each prompt as a message of the user that the model answers, with the tokenizer's chat template."""
    output: PathText | None = None
    """File for the results, one JSON object in each line, in the order of the prompts. By default they are printed."""
    resume: bool = False
    """Continue an interrupted output: its contents are checked and kept."""
    max_new_tokens: int = SamplingParams.max_tokens
    """Largest number of generated tokens."""
    num_beams: int = 1
    """Number of beams of a beam search; 1: no beam search."""
    num_return_sequences: int = 1
    """Number of continuations of each prompt."""
    logprobs: LogprobCount | None = None
    """With output: write the log-probability of each token and of this many likeliest ones; 0: of the tokens alone."""
    prompt_logprobs: LogprobCount | None = None
    """With output: the same for the tokens of the prompt."""
    echo: bool = False
    """With output: put the prompt in front of the text."""
    json_schema: PathText | None = None
    """File with a JSON schema that the text must follow. If max_new_tokens cuts the text off, the JSON is incomplete."""
    regex: str | None = verbatim(None)
    """Regular expression that the text must match, from its first character to its last."""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def collect_faults(self, faults: Faults) -> None:
        super().collect_faults(faults)
        names = ("max_new_tokens", "num_return_sequences", "num_beams")
        collect_text_faults(self, faults, **{name: getattr(self, name) for name in names})
        is_right = 0 <= self.min_tokens <= max(0, self.max_new_tokens)
        faults.require(is_right, "min_tokens", self.min_tokens, "within 0 and max_new_tokens")
        if (self.prompt is None) == (self.prompts_file is None):
            faults.add("give either --prompt or --prompts_file")
        for name in ("logprobs", "prompt_logprobs", "echo"):
            value = getattr(self, name)
            faults.require(value in (None, False) or self.output is not None, name, value, "given with output")
        faults.require(not self.resume or self.output is not None, "resume", self.resume, "given with output")
        both = self.regex is not None and self.json_schema is not None
        faults.require(not both, "regex", self.regex, "left out with json_schema")
        for name in ("json_schema", "regex"):
            value = getattr(self, name)
            faults.require(self.num_beams == 1 or value is None, name, value, "left out with num_beams above 1")
        if self.regex is not None:
            faults.found += collect_grammar_faults({"regex": self.regex})

    def check_available(self) -> None:
        super().check_available()
        if self.output is not None:
            check_folder_of(Path(self.output), "output")
        if self.regex is not None or self.json_schema is not None:
            check_grammar_library()

    def params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            n=self.num_return_sequences,
            grammar=None if self.regex is None else {"regex": self.regex},
            **{each.name: getattr(self, each.name) for each in fields(TextSettings)},
        )


@command("model")
def run_generate(settings: GenerateSettings) -> int:
    """Continue a prompt and print the text while it is generated, or continue all prompts in a file."""
    params = settings.params()
    if settings.json_schema is not None:
        params = replace(params, grammar={"json_schema": _read_schema(Path(settings.json_schema))}).validated()
    jobs = [Job(settings.prompt, params)] if settings.prompt is not None else []
    if settings.prompts_file is not None:
        jobs = read_jobs(Path(settings.prompts_file), params)
        own = next((job for job in jobs if job.params != params), None)
        if own is not None and settings.num_beams > 1:
            raise ValueError(
                f"the prompt {own.prompt!r} has settings of its own: leave them out with num_beams above 1"
            )
    done = _prepare_output(settings, jobs)

    if settings.num_beams > 1:
        model, tokenizer = settings.load_with_transformers()
        asked = [_asked(tokenizer, job, settings.chat) for job in jobs]
        results = _beams(model, tokenizer, jobs[done:], asked[done:], settings)
    else:
        from bdh.generate.engine import Engine

        network, plain = load_for_generation(settings)
        asked = [_asked(plain, job, settings.chat) for job in jobs]
        engine = Engine(network, plain, config=settings.engine)
        print(f"steps by {engine.advancer.description}", file=sys.stderr)
        if settings.output is None and len(jobs) == 1 and jobs[0].params.n == 1:
            return _print_stream("" if settings.chat else settings.prompt or "", engine, asked[0], jobs[0].params)
        results = _by_engine(engine, jobs[done:], asked[done:])
    if settings.output is None:
        return _print_texts(jobs, results, settings.chat)
    return _write(Path(settings.output), jobs, done, results)


def _read_schema(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"json_schema is {str(path)!r}: there is no such file")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"json_schema is {str(path)!r}, which is not JSON: {error}") from error


def _prepare_output(settings: GenerateSettings, jobs: list[Job]) -> int:
    """Returns how many jobs are complete in the output file. An incomplete result at its end is removed."""
    if settings.output is None or not Path(settings.output).exists():
        return 0
    path = Path(settings.output)
    if not settings.resume:
        raise FileExistsError(f"{path} exists already: choose another --output, or continue it with --resume")
    done, end = num_done(path, jobs)
    if (cut := path.stat().st_size - end) > 0:
        os.truncate(path, end)
        print(f"{path}: {counted(cut, 'byte')} of an unfinished result cut off", file=sys.stderr)
    print(f"{path}: {done:,} of {len(jobs):,} prompts are done", file=sys.stderr)
    return done


def _asked(tokenizer, job: Job, chat: bool) -> str | list[int]:
    """Returns what the model reads: the prompt, or the token ids of a conversation."""
    from bdh.tokenizer.chat import ChatEncoder, question

    if isinstance(job.prompt, list):
        return ChatEncoder(tokenizer).prompt(job.prompt)
    return question(tokenizer, job.prompt) if chat else job.prompt


def _by_engine(engine: Any, jobs: list[Job], asked: list) -> Iterator[list[Any]]:
    encoded = [
        engine.encode(each) for each in asked
    ]  # all before anything is generated, so that faults are reported at once
    for job in jobs:
        engine.check(job.params)
    yield from engine.map(zip(encoded, (job.params for job in jobs), strict=True))


def _beams(model: Any, tokenizer: Any, jobs: list[Job], asked: list, settings: GenerateSettings) -> Iterator[list[Any]]:
    from bdh.generate.sequence import Completion
    from bdh.generate.texts import generate_texts

    params, num_beams = settings.params(), settings.num_beams
    for start in range(0, len(jobs), _BEAM_PROMPTS):
        prompts = asked[start : start + _BEAM_PROMPTS]
        for texts in generate_texts(model, tokenizer, prompts, params, num_beams=num_beams):
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            yield [Completion(text, tokens, "length") for text, tokens in zip(texts, ids, strict=True)]


def _print_stream(prompt: str, engine: Any, asked: str | list[int], params: SamplingParams) -> int:
    engine.add_request(asked, params)
    begin = prompt  # printed with the first text, since a message about compiling kernels may come before it
    while engine.has_work:
        for output in engine.step():
            sys.stdout.write(begin + output.text)
            sys.stdout.flush()
            begin = ""
            if output.completion is not None and output.completion.error is not None:
                raise ValueError(output.completion.error)
    sys.stdout.write(f"{begin}\n")
    return 0


def _print_texts(jobs: list[Job], results: Iterable[list[Any]], chat: bool) -> int:
    status = 0
    for job, completions in zip(jobs, results, strict=True):
        for completion in completions:
            said = job.prompt if isinstance(job.prompt, str) and not chat else ""
            print(f"{said}{completion.text}\n", flush=True)
            if completion.error is not None:
                print(f"error: {job.prompt!r}: {completion.error}", file=sys.stderr)
                status = 1
    return status


def _write(path: Path, jobs: list[Job], done: int, results: Iterable[list[Any]]) -> int:
    failed = 0
    try:
        with (
            naming_full_disk(path),
            path.open("a" if done or path.exists() else "x", encoding="utf-8") as file,
            count_progress("continuing", "prompts", len(jobs), done) as advance,
        ):
            for job, completions in zip(jobs[done:], results, strict=True):
                file.writelines(result_lines(job, completions))
                file.flush()
                failed += any(completion.error is not None for completion in completions)
                done += 1
                advance(done)
    except KeyboardInterrupt:
        print(
            f"{done:,} of {len(jobs):,} prompts are in {path}; the same command with --resume continues",
            file=sys.stderr,
        )
        raise
    print(f"{counted(len(jobs), 'prompt')} continued, in {path}", file=sys.stderr)
    if failed:
        print(f"{failed} of them failed: their lines have an error", file=sys.stderr)
    return 1 if failed else 0
