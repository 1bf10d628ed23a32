"""Converts the engine's output to the answers and stream events of OpenAI's API."""

import codecs
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from bdh.generate.sequence import Completion, StepOutput, TokenLogprobs
from bdh.serve.middleware import ApiError, sent_event
from bdh.serve.schemas import Json, StreamOptions
from bdh.serve.service import PromptRequest
from bdh.serve.text import TokenNames

Entries = list[tuple[int, TokenLogprobs | None]]
"""Tokens with their log-probabilities. These are None for the first token of a prompt, which nothing predicts."""


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    bdh: Json | None = None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None = None


class ChatChoice(_Choice):
    message: Json
    logprobs: Json | None = None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class CompletionAnswer(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatAnswer(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(BaseModel):
    """A response, as returned and stored. Fields with a constant value are there for clients that expect them."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    model: str
    output: list[Json] = []
    usage: ResponseUsage | None = None
    error: Json | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool
    metadata: dict[str, str] = {}
    max_output_tokens: int | None = None
    temperature: float
    top_p: float
    top_logprobs: int = 0
    text: Json = {"format": {"type": "text"}, "verbosity": "medium"}
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    tools: list[Any] = []
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    truncation: str = "disabled"
    background: bool = False
    service_tier: str = "default"
    user: str | None = None


@dataclass
class Text:
    """One text of an answer, as far as it is generated."""

    parts: list[str] = field(default_factory=list)
    entries: Entries = field(default_factory=list)
    num_generated: int = 0
    offset: int = 0
    """The number of characters in the tokens so far."""
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    completion: Completion | None = None
    extras: Json = field(default_factory=dict)

    @property
    def likelihood(self) -> float:
        """The mean log-probability of the generated tokens."""
        assert self.completion is not None
        found = [each.logprob for each in self.completion.logprobs or []]
        return sum(found) / len(found) if found else 0.0

    def __str__(self) -> str:
        return "".join(self.parts)


class Writer:
    """Builds an answer, or the events of a stream, from the texts of one request.

    Args:
        num_top: the number of likeliest tokens to list with log-probabilities; None for no log-probabilities.
        num_given: the number of texts to return for each prompt.
        options: whether and when a stream reports its usage.
    """

    prefix = object = chunk_object = ""

    def __init__(
        self,
        prompts: Sequence[PromptRequest],
        names: TokenNames,
        model: str,
        num_top: int | None,
        num_given: int = 1,
        *,
        options: StreamOptions | None = None,
    ):
        self.id, self.model = f"{self.prefix}-{uuid.uuid4().hex}", model
        self._created = int(time.time())
        self._prompts, self._names, self._num_top = prompts, names, num_top
        self._num_given, self._options = num_given, options or StreamOptions()
        self.texts = [[Text() for _ in range(prompt.params.n)] for prompt in prompts]

    @property
    def all_texts(self) -> list[Text]:
        return [text for texts in self.texts for text in texts]

    def take(self, place: int, output: StepOutput) -> Json | None:
        """Adds an output. Returns the choice for its chunk, or None if there is nothing to send."""
        text = self.texts[place][output.index]
        entries: Entries = []
        if self._num_top is not None:
            entries += zip(self._prompts[place].prompt, output.prompt_logprobs or (), strict=False)
            entries += [(each.token, each) for each in output.logprobs or ()]
        shown = self._shown(text, output.text)
        text.parts.append(shown)
        text.num_generated += len(output.token_ids)
        text.entries += entries
        text.completion = output.completion
        extras = {}
        if output.activity is not None:
            token = self._names.name(output.token_ids[-1]) if output.token_ids else None
            extras["activations"] = [{"token": token, "passes": [asdict(each) for each in output.activity]}]
        if not (shown or entries or extras or output.completion):
            return None
        logprobs = self._logprobs(text, entries) if entries else None
        reason = None if output.completion is None else output.completion.finish_reason
        choice = self._choice(place * self._num_given + output.index, shown, logprobs, reason, is_chunk=True)
        if extras or text.extras:
            choice["bdh"] = {**extras, **text.extras}
        return choice

    def opening(self) -> list[bytes]:
        """Returns the first events of a stream, before anything is generated."""
        return []

    def pieces(self, place: int, output: StepOutput) -> list[bytes]:
        """Adds an output, and returns its events."""
        choice = self.take(place, output)
        return [] if choice is None else [self._chunk(choice)]

    def closing(self) -> list[bytes]:
        """Returns the last events of a stream, after all outputs."""
        usage = [self._chunk(usage=self.usage())] if self._options.include_usage else []
        return [*usage, b"data: [DONE]\n\n"]

    def failure(self, error: ApiError) -> bytes:
        """Returns the event that ends a stream with an error."""
        return sent_event(error.body())

    def answer(self) -> Json:
        given = []
        for texts in self.texts:
            if len(texts) > self._num_given:
                texts = sorted(texts, key=lambda text: text.likelihood, reverse=True)
            given += texts[: self._num_given]
        choices = []
        for index, text in enumerate(given):
            assert text.completion is not None
            logprobs = None if self._num_top is None else self._logprobs(Text(), text.entries)
            choice = self._choice(index, str(text), logprobs, text.completion.finish_reason, is_chunk=False)
            choices.append({**choice, "bdh": text.extras} if text.extras else choice)
        return {**self._head(self.object), "choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Returns the usage so far."""
        firsts = [texts[0].completion for texts in self.texts]
        prompt = sum(len(each.prompt) for each in self._prompts)
        generated = sum(
            text.num_generated if text.completion is None else len(text.completion.token_ids) for text in self.all_texts
        )
        counts = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
        cached = sum(each.num_cached_tokens for each in firsts if each)
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    def _chunk(self, *choices: Json, usage: Json | None = None) -> bytes:
        found = {**self._head(self.chunk_object), "choices": choices}
        if self._options.are_needed:
            found["usage"] = self.usage() if self._options.continuous_usage_stats else usage
        return sent_event(found)

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model}

    def _shown(self, text: Text, piece: str) -> str:
        """Returns the next piece of a text as the client gets it."""
        return piece

    def _logprobs(self, text: Text, entries: Entries) -> Json:
        raise NotImplementedError

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None, *, is_chunk: bool) -> Json:
        raise NotImplementedError


class CompletionWriter(Writer):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None, *, is_chunk: bool) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, text: Text, entries: Entries) -> Json:
        offsets = []
        for token, _ in entries:
            offsets.append(text.offset)
            text.offset += len(text.decoder.decode(self._names.bytes_of(token)))
        return {
            "tokens": [self._names.name(token) for token, _ in entries],
            "token_logprobs": [None if entry is None else entry.logprob for _, entry in entries],
            "top_logprobs": [self._top(entry) for _, entry in entries] if self._num_top else None,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        """Returns log-probabilities by token name, the likeliest first. The token itself is always included."""
        if entry is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self._names.name(token), logprob)
        return found


class ChatWriter(Writer):
    """Builds the answer of a chat.

    Args:
        reply: turns the generated text into a message, by removing white space at its beginning.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *arguments: Any, reply: Callable[[str], str], **options: Any):
        super().__init__(*arguments, **options)
        self._reply = reply

    def _shown(self, text: Text, piece: str) -> str:
        return piece if any(text.parts) else self._reply(piece)

    def opening(self) -> list[bytes]:
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk({"index": index, **choice}) for index in range(self._num_given)]

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None, *, is_chunk: bool) -> Json:
        if is_chunk:
            shown: Json = {"delta": {"content": text} if text else {}}
        else:
            shown = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **shown, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, text: Text, entries: Entries) -> Json:
        content = [
            {
                **self._of_token(entry.token, entry.logprob),
                "top_logprobs": [self._of_token(*each) for each in entry.top],
            }
            for _, entry in entries
            if entry is not None  # only prompt tokens have none, and chats do not request these
        ]
        return {"content": content, "refusal": None}

    def _of_token(self, token: int, logprob: float) -> Json:
        return {"token": self._names.name(token), "logprob": logprob, "bytes": list(self._names.bytes_of(token))}


class ResponseWriter(ChatWriter):
    """Builds a response, or the events of its stream, from its only text.

    Args:
        answer: the response before any text is generated.
    """

    def __init__(self, prompt: PromptRequest, names: TokenNames, answer: ResponseAnswer, reply: Callable[[str], str]):
        super().__init__([prompt], names, answer.model, prompt.params.logprobs, reply=reply)
        self.id, self.response = answer.id, answer
        ((self._text,),) = self.texts
        self._number = 0  # sequence number of the next event
        self._place = {"item_id": item_id(answer.id), "output_index": 0, "content_index": 0}

    def opening(self) -> list[bytes]:
        return [
            self._event("created", response=self.facts()),
            self._event("in_progress", response=self.facts()),
            self._event("output_item.added", output_index=0, item=self._item("in_progress")),
            self._event("content_part.added", **self._place, part=_part("", [])),
        ]

    def pieces(self, place: int, output: StepOutput) -> list[bytes]:
        choice = self.take(place, output)
        if choice is None or not (choice["text"] or choice["logprobs"]):
            return []
        return [self._event("output_text.delta", **self._place, delta=choice["text"], logprobs=choice["logprobs"])]

    def closing(self) -> list[bytes]:
        facts = self.answer()
        (item,) = facts["output"]
        (part,) = item["content"]
        return [
            self._event("output_text.done", **self._place, text=part["text"], logprobs=part["logprobs"]),
            self._event("content_part.done", **self._place, part=part),
            self._event("output_item.done", output_index=0, item=item),
            self._event(facts["status"], response=facts),
        ]

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"  # the API has no other codes for this
        self.response.status = "failed"
        self.response.error = {"code": code, "message": error.message, **error.facts}
        return self._event("failed", response=self.facts())

    def answer(self) -> Json:
        completion, response = self._text.completion, self.response
        assert completion is not None
        is_cut = completion.finish_reason == "length"
        response.status = "incomplete" if is_cut else "completed"
        response.incomplete_details = {"reason": "max_output_tokens"} if is_cut else None
        response.completed_at = response.completed_at or int(time.time())
        logprobs = [] if self._num_top is None else self._logprobs(self._text, self._text.entries)["content"]
        response.output = [self._item(response.status, _part(str(self._text), logprobs))]
        # All tokens that the state has read count as input, and those from before this request as cached.
        snapshot = self._prompts[0].snapshot
        known = completion.num_cached_tokens if snapshot is None else snapshot.state.position
        num_input, num_output = completion.num_prompt_tokens, len(completion.token_ids)
        response.usage = ResponseUsage(
            input_tokens=num_input,
            input_tokens_details={"cached_tokens": known, "cache_write_tokens": 0},
            output_tokens=num_output,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=num_input + num_output,
        )
        return self.facts()

    def facts(self) -> Json:
        return self.response.model_dump(mode="json")

    def _item(self, status: str, *content: Json) -> Json:
        item = {"id": self._place["item_id"], "type": "message", "status": status, "role": "assistant"}
        return {**item, "content": list(content)}

    def _event(self, name: str, **facts: Any) -> bytes:
        self._number += 1
        name = f"response.{name}"
        return sent_event({"type": name, "sequence_number": self._number - 1, **facts}, name)

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None, *, is_chunk: bool) -> Json:
        return {"text": text, "logprobs": [] if logprobs is None else logprobs["content"]}


def item_id(response_id: str) -> str:
    """Returns the id of a response's message."""
    return response_id.replace("resp_", "msg_")


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
