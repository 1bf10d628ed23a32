"""Files of prompts, and files of results, which an interrupted run can continue."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from bdh.generate.params import ALIASES, SamplingParams, by_own_names, params_from
from bdh.text_files import read_text
from bdh.validation import Faults
from bdh.words import counted, nearest

RESULT_KEYS = ("text", "index", "finish_reason", "num_tokens", "logprobs", "prompt_logprobs", "error")
_MOST_FAULTS = 10
_FLAGS = {
    "num_beams": "it applies to all prompts, so give --num_beams",
    "json_schema": 'write it as {"grammar": {"json_schema": SCHEMA}}',
    "regex": 'write it as {"grammar": {"regex": PATTERN}}',
}


@dataclass
class Job:
    """A prompt of a file."""

    prompt: str | list[dict[str, str]]
    """A string, or the messages of a conversation."""
    params: SamplingParams
    passed_on: dict[str, Any] = field(default_factory=dict)
    """The other fields of its line, which are copied to the results."""

    @property
    def facts(self) -> dict[str, Any]:
        """The fields with which its lines of results begin."""
        name = "prompt" if isinstance(self.prompt, str) else "messages"
        return {**self.passed_on, name: self.prompt}


def read_jobs(path: Path, params: SamplingParams) -> list[Job]:
    """Reads the prompts of a file.

    Each line of a ``.jsonl`` file is a JSON object, and each line of any other file is a prompt. Empty lines are
    skipped.

    An object has a ``prompt``, or the ``messages`` of a conversation, and can override any
    setting of ``params``. Other fields are copied to the results, unless their name looks like a misspelt setting.

    Args:
        path: the file.
        params: the sampling settings of all prompts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8, contains no prompts, or has invalid lines, which the message lists.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}")
    # Not splitlines, which also splits at characters that do not end a line of a file.
    lines = read_text(path).split("\n")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        jobs = [Job(line, params) for line in lines if line]
    else:
        jobs, faults = [], Faults()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    jobs.append(_job(line, params))
                except ValueError as error:
                    faults.add(f"{path}, line {number}: {' '.join(str(error).split())}")
        if len(faults.found) > _MOST_FAULTS:
            faults.found[_MOST_FAULTS:] = [f"... and {counted(len(faults.found) - _MOST_FAULTS, 'further line')}"]
        faults.raise_if_any()
    if not jobs:
        raise ValueError(f"{path} holds no prompts: it needs one a line")
    return jobs


def _job(line: str, params: SamplingParams) -> Job:
    try:
        facts = json.loads(line, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"it is {type(facts).__name__}, not an object")
    if ("prompt" in facts) == ("messages" in facts):
        raise ValueError("it must have either a prompt or messages")
    prompt = facts.pop("prompt", None)
    if prompt is None:
        prompt = facts.pop("messages")
        if not (isinstance(prompt, list) and prompt and all(isinstance(each, dict) for each in prompt)):
            raise ValueError(f"messages is {prompt!r}: must be a list of objects with role and content")
    elif not isinstance(prompt, str):
        raise ValueError(f"prompt is {prompt!r}: must be a string")
    known = SamplingParams.__dataclass_fields__
    facts = by_own_names(facts)
    settings = {name: facts.pop(name) for name in list(facts) if name in known}
    for name in facts:
        near = nearest(name.lower(), [*known, *ALIASES], 0.88)
        if hint := _FLAGS.get(name) or (near and f"did you mean {near}? Give your own data another name"):
            raise ValueError(f"{name} is not a setting of a prompt: {hint}")
    if taken := [name for name in facts if name in RESULT_KEYS]:
        raise ValueError(f"{', '.join(taken)} is reserved for results: give it another name")
    own = params_from(settings)
    return Job(prompt, replace(params, **{name: getattr(own, name) for name in settings}).validated(), facts)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice: give it once")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number: give a finite one, or null")


def result_lines(job: Job, completions: list[Any]) -> Iterator[str]:
    """Yields the results of a prompt: a line of JSON for each of its completions."""
    for index, completion in enumerate(completions):
        facts: dict[str, Any] = {**job.facts, "text": completion.text}
        if job.params.n > 1:
            facts["index"] = index
        facts["finish_reason"] = completion.finish_reason
        facts["num_tokens"] = len(completion.token_ids)
        for name in ("logprobs", "prompt_logprobs"):
            if (entries := getattr(completion, name)) is not None:
                facts[name] = [None if entry is None else asdict(entry) for entry in entries]
        if completion.error is not None:
            facts["error"] = completion.error
        yield json.dumps(facts, ensure_ascii=False) + "\n"


def num_done(path: Path, jobs: list[Job]) -> tuple[int, int]:
    """Returns how many jobs are complete in a file of results, and the offset at which their lines end.

    Anything after the offset is a truncated line, or belongs to an incomplete job, and should be removed.

    Raises:
        ValueError: the file does not contain results of these jobs in this order.
    """
    with path.open("rb") as file:
        lines = [line for line in file if line.endswith(b"\n")]
    expected = [job for job in jobs for _ in range(job.params.n)]
    for number, (line, job) in enumerate(zip(lines, expected, strict=False), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or any(found.get(name) != value for name, value in job.facts.items()):
            raise ValueError(
                f"{path}, line {number}, is not a result of the prompt expected there, {job.prompt!r}: give the "
                "prompts that the file was written from, or another --output"
            )
    if len(lines) > len(expected):
        raise ValueError(
            f"{path} has {counted(len(lines), 'line')}, more than the {counted(len(expected), 'result')} of all "
            "prompts: give the prompts that the file was written from, or another --output"
        )
    ends = [0, *accumulate(job.params.n for job in jobs)]
    done = bisect_right(ends, len(lines)) - 1
    return done, sum(map(len, lines[: ends[done]]))
