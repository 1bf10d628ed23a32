"""From what the engine generates to what OpenAI's API says: whole answers, and the chunks of streams."""

import codecs
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bdh.generate.sampler import TokenLogprobs
from bdh.generate.sequence import Completion, StepOutput
from bdh.serve.errors import ApiError
from bdh.serve.events import DONE, event
from bdh.serve.schemas import StreamOptions
from bdh.serve.service import Event, Job
from bdh.serve.tokens import TokenNames

Json = dict[str, Any]


@dataclass
class Text:
    """One text of an answer, as far as it has come."""

    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Those of ``logprobs``, which are not there for a prompt's first token."""
    num_generated: int = 0
    offset: int = 0
    """Characters of the tokens so far."""
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    completion: Completion | None = None
    extras: Json = field(default_factory=dict)


class Writer:
    """Puts the texts of one request into an answer, or into chunks.

    Args:
        num_top: of the likeliest tokens, with log-probabilities; None for none.
        num_given: texts given of each job.
        options: of a stream: what it says of its usage.
    """

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(
        self,
        jobs: Sequence[Job],
        names: TokenNames,
        model: str,
        num_top: int | None,
        num_given: int = 1,
        *,
        options: StreamOptions | None = None,
    ):
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._jobs, self._names, self._model, self._num_top = jobs, names, model, num_top
        self._num_given, self._options = num_given, options or StreamOptions()
        self._texts: dict[tuple[int, int], Text] = {
            (place, index): Text() for place, job in enumerate(jobs) for index in range(job.params.n)
        }

    @property
    def texts(self) -> list[Text]:
        return list(self._texts.values())

    def text(self, come: Event) -> Text:
        return self._texts[come.job, come.output.index]

    def index(self, come: Event) -> int:
        """Of the choice."""
        return come.job * self._num_given + come.output.index

    def first_choices(self) -> list[Json]:
        """What chunks begin with, before anything has been generated."""
        return []

    def take(self, come: Event) -> Json | None:
        """Notes what has come. Returns a chunk's choice, or None where there is nothing to say."""
        output, text = come.output, self.text(come)
        entries: list[tuple[int, TokenLogprobs | None]] = []
        if self._num_top is not None:
            if output.prompt_logprobs is not None:
                prompt = self._jobs[come.job].tokens
                entries += zip(prompt, output.prompt_logprobs, strict=False)
            entries += [(each.token, each) for each in output.logprobs or []]
        said = self._logprobs(text, entries) if self._num_top is not None else None
        shown = self._shown(text, output.text)
        text.parts.append(shown)
        text.num_generated += len(output.token_ids)
        text.tokens += [token for token, _ in entries]
        text.logprobs += [each for _, each in entries]
        text.completion = output.completion
        extras = self._extras(output)
        if not (shown or entries or extras or output.completion):
            return None
        choice = self._chunk_choice(self.index(come), shown, said if entries else None, output.completion)
        if extras or text.extras:
            choice["bdh"] = {**extras, **text.extras}
        return choice

    def opening(self) -> list[bytes]:
        """The events that a stream begins with."""
        return [self._chunk([choice]) for choice in self.first_choices()]

    def pieces(self, come: Event) -> list[bytes]:
        """Notes what has come. Returns the events that tell it."""
        choice = self.take(come)
        return [] if choice is None else [self._chunk([choice])]

    def closing(self) -> list[bytes]:
        """The events that a stream ends with, once everything has come."""
        return [*([self._chunk([], usage=self.usage())] if self._options.include_usage else []), DONE]

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream early."""
        return event(error.body())

    def _chunk(self, choices: list[Json], *, usage: Json | None = None) -> bytes:
        found = {**self._head(self.chunk_object), "choices": choices}
        if self._options.continuous_usage_stats:
            usage = self.usage()
        return event({**found, "usage": usage} if self._options.are_needed else found)

    def answer(self) -> Json:
        choices = []
        for place, job in enumerate(self._jobs):
            texts = [self._texts[place, index] for index in range(job.params.n)]
            if job.params.n > self._num_given:
                texts.sort(key=_likelihood, reverse=True)
            choices += texts[: self._num_given]
        return {
            **self._head(self.object),
            "choices": [self._whole_choice(index, text) for index, text in enumerate(choices)],
            "usage": self.usage(),
        }

    def usage(self) -> Json:
        """What has been read and generated so far."""
        prompt = cached = 0
        for place, job in enumerate(self._jobs):
            completion = self._texts[place, 0].completion
            prompt += len(job.tokens)
            cached += completion.num_cached_tokens if completion is not None else 0
        generated = sum(
            text.num_generated if text.completion is None else len(text.completion.token_ids) for text in self.texts
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _extras(self, output: StepOutput) -> Json:
        if output.activity is None:
            return {}
        token = self._names.name(output.token_ids[-1]) if output.token_ids else None
        return {"activations": [{"token": token, "passes": [asdict(each) for each in output.activity]}]}

    def _whole_choice(self, index: int, text: Text) -> Json:
        assert text.completion is not None
        logprobs = None
        if self._num_top is not None:
            logprobs = self._logprobs(Text(), list(zip(text.tokens, text.logprobs, strict=True)))
        choice = self._answer_choice(index, "".join(text.parts), logprobs, text.completion)
        return {**choice, "bdh": text.extras} if text.extras else choice

    def _shown(self, text: Text, piece: str) -> str:
        """What of a text's next piece is given."""
        return piece

    def _logprobs(self, text: Text, entries: Sequence[tuple[int, TokenLogprobs | None]]) -> Json:
        raise NotImplementedError

    def _chunk_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion | None) -> Json:
        raise NotImplementedError

    def _answer_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion) -> Json:
        raise NotImplementedError


class CompletionWriter(Writer):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _chunk_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion | None) -> Json:
        reason = None if completion is None else completion.finish_reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    _answer_choice = _chunk_choice

    def _logprobs(self, text: Text, entries: Sequence[tuple[int, TokenLogprobs | None]]) -> Json:
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [] if self._num_top else None}
        offsets = []
        for token, entry in entries:
            offsets.append(text.offset)
            text.offset += len(text.decoder.decode(self._names.bytes_of(token)))
            found["tokens"].append(self._names.name(token))
            found["token_logprobs"].append(None if entry is None else entry.logprob)
            if self._num_top:
                found["top_logprobs"].append(None if entry is None else self._top(entry))
        return {**found, "text_offset": offsets}

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """By name, the likeliest first; the token itself is always among them."""
        found: dict[str, float] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self._names.name(token), logprob)
        return found


class ChatWriter(Writer):
    """
    Args:
        reply: makes a message of what the model has written, by taking from its beginning.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        jobs: Sequence[Job],
        names: TokenNames,
        model: str,
        num_top: int | None,
        num_given: int,
        reply: Callable[[str], str],
        options: StreamOptions | None = None,
    ):
        super().__init__(jobs, names, model, num_top, num_given, options=options)
        self._reply = reply

    def _shown(self, text: Text, piece: str) -> str:
        return piece if any(text.parts) else self._reply(piece)

    def first_choices(self) -> list[Json]:
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(self._num_given)
        ]

    def _chunk_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion | None) -> Json:
        reason = None if completion is None else completion.finish_reason
        return {
            "index": index,
            "delta": {"content": text} if text else {},
            "logprobs": logprobs,
            "finish_reason": reason,
        }

    def _answer_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason}

    def _logprobs(self, text: Text, entries: Sequence[tuple[int, TokenLogprobs | None]]) -> Json:
        content = []
        for token, entry in entries:
            assert entry is not None  # a prompt's are never asked for here
            top = [self._of_token(other, logprob) for other, logprob in entry.top]
            content.append({**self._of_token(token, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _of_token(self, token: int, logprob: float) -> Json:
        return {"token": self._names.name(token), "logprob": logprob, "bytes": list(self._names.bytes_of(token))}


def _likelihood(text: Text) -> float:
    """The mean log-probability of its tokens."""
    assert text.completion is not None
    found = [each.logprob for each in text.completion.logprobs or []]
    return sum(found) / len(found) if found else 0.0
