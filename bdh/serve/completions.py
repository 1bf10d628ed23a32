"""The routes /v1/completions, /v1/chat/completions and /v1/embeddings."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh.generate.advance import Residuals
from bdh.generate.grammar import GRAMMAR_FAULT
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput, TextDecoder
from bdh.generate.snapshot import Snapshot
from bdh.serve.answers import ChatAnswer, ChatWriter, CompletionAnswer, CompletionWriter, Writer
from bdh.serve.middleware import (
    ApiError,
    EventStream,
    bad_request,
    errors_of,
    internal_error,
    log,
    unavailable,
    unless_gone,
)
from bdh.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    Extras,
    Json,
    Positive,
    Prompt,
    RequestModel,
    Sampling,
    optional,
    texts_of,
)
from bdh.serve.service import CutOff, Generation, Loaded, PromptRequest, Service
from bdh.storage import DiskFullError
from bdh.words import counted

COMPLETION_TOKENS = 16  # the default, as in OpenAI's API
STREAMS: dict[int | str, Json] = {200: {"content": {"text/event-stream": {}}}}
_AT_ONCE = 8  # texts of an embeddings request that are read at once, so that other prompts do not wait for all of them
_QUEUE_SECONDS = 0.1


class EmbeddingOptions(RequestModel):
    pooling: Literal["mean", "last"] | None = optional(
        "The mean over the residuals of all tokens (the default), or the residual of the last token."
    )
    normalize: bool | None = optional("Scale vectors to length 1, like OpenAI's. Defaults to true.")


class EmbeddingRequest(RequestModel):
    input: Prompt = Field(description="A text, a list of texts, a list of token ids, or several such lists.")
    model: str | None = optional("One of the server's model names. null or empty means the first.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = optional("Only the width of the model's residual stream is allowed.")
    user: str | None = optional("Recorded in the log.")
    bdh: EmbeddingOptions | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or with base64 a text of little-endian float32 values.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_completions(app: FastAPI, service: Service) -> None:
    """Adds the routes of completions, chats and embeddings."""
    of_texts: Json = {"responses": {**errors_of(401, 404, 429, 503, 507), **STREAMS}, "tags": ["texts"]}
    of_embeddings: Json = {"responses": errors_of(401, 404, 429, 503), "tags": ["embeddings"]}

    @app.post("/v1/completions", response_model=CompletionAnswer, **of_texts)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continues prompts."""
        return await (await _completion(service, body, request)).respond()

    @app.post("/v1/chat/completions", response_model=ChatAnswer, **of_texts)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Replies to a conversation."""
        return await (await _chat(service, body, request)).respond()

    @app.post("/v1/embeddings", response_model=EmbeddingAnswer, **of_embeddings)
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        """Returns a vector for each text."""
        return JSONResponse((await _embed(service, body, request)).model_dump())


async def _completion(service: Service, body: CompletionRequest, request: Request) -> "TextGeneration":
    model = service.begin(body, request)
    loaded, extras = service.ready(), body.extras
    params = replace(
        body.params(service.max_tokens(body.max_tokens, COMPLETION_TOKENS)),
        n=max(body.best_of or 1, body.n or 1),
        echo=bool(body.echo),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    if params.n > (body.n or 1) and params.logprobs is None:
        params.logprobs = 0  # needed to choose the likeliest
    service.check_texts(params.n, "n" if params.n == body.n else "best_of")
    snapshot = await _saved_snapshot(loaded, extras, request)
    texts = texts_of(body.prompt)
    if snapshot is not None and (len(texts) > 1 or body.echo):
        name = "prompt" if len(texts) > 1 else "echo"
        raise bad_request(
            f"{name}: must be {'one prompt' if name == 'prompt' else 'left out'} with bdh.from_state", name
        )
    prompts = []
    for number, text in enumerate(texts):
        param = "prompt" if text is body.prompt else f"prompt.{number}"
        tokens = await loaded.prompt_tokens(text, param, continues=snapshot is not None)
        prompts.append(_prompt(tokens, replace(params), snapshot, extras, param, {"kind": "text"}))
    options = body.stream_options
    writer = CompletionWriter(prompts, loaded.names, model, body.logprobs, body.n or 1, options=options)
    return TextGeneration(service, prompts, request, writer, body)


async def _chat(service: Service, body: ChatRequest, request: Request) -> "TextGeneration":
    model = service.begin(body, request)
    loaded, extras = service.ready(), body.extras
    messages = [message.plain() for message in body.messages]
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = service.max_tokens(getattr(body, name), service.settings.limits.chat_tokens, name)
    params = body.params(max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
    if body.logprobs:
        params.logprobs = body.top_logprobs or 0
    service.check_texts(params.n, "n")
    snapshot = await _saved_snapshot(loaded, extras, request)
    before: list[dict[str, str]] = []
    if snapshot is None:
        tokens = await loaded.in_text_thread(loaded.chat.encode, messages)
    else:
        if snapshot.notes.get("kind") != "chat":
            message = "bdh.from_state is the state of a text, not of a conversation: continue it with /v1/completions"
            raise bad_request(message, "bdh.from_state")
        before = snapshot.notes["messages"]
        tokens = await loaded.in_text_thread(loaded.chat.further, before, messages, snapshot.notes.get("stopped_by"))
    notes = {"kind": "chat", "messages": [*before, *messages]}
    prompts = [_prompt(tokens, params, snapshot, extras, "messages", notes)]
    reply, options = loaded.chat.reply, body.stream_options
    writer = ChatWriter(prompts, loaded.names, model, params.logprobs, params.n, reply=reply, options=options)
    return TextGeneration(service, prompts, request, writer, body)


def _prompt(
    tokens: list[int], params: SamplingParams, snapshot: Snapshot | None, extras: Extras, param: str, notes: Json
) -> PromptRequest:
    return PromptRequest(
        tokens, params, snapshot, bool(extras.save_state), extras.activations, param=param, notes=notes
    )


async def _saved_snapshot(loaded: Loaded, extras: Extras, request: Request) -> Snapshot | None:
    if extras.from_state is None:
        return None
    try:
        return await asyncio.to_thread(loaded.states.snapshot, extras.from_state, request.state.caller.id)
    except KeyError:
        raise no_state(extras.from_state, "bdh.from_state") from None
    except ValueError as error:
        raise bad_request(str(error), "bdh.from_state") from error


class TextGeneration(Generation):
    """Generates the texts of one request, and answers it."""

    format_param = "response_format"
    """The request's field for the format of its texts."""
    names_states = True
    """Whether the answer contains the ids of the states that are saved after its texts."""

    def __init__(
        self, service: Service, prompts: Sequence[PromptRequest], request: Request, writer: Writer, body: Sampling
    ):
        super().__init__(service, prompts, request)
        self.writer, self._is_stream = writer, bool(body.stream)
        if service.settings.log_prompts:
            log("prompts", prompts=[self.loaded.names.text(prompt.prompt) for prompt in prompts])

    async def respond(self) -> Response:
        """Returns the answer, or starts its stream.

        Raises:
            ApiError: as :meth:`Generation.submit`; 400 if the format of the texts cannot be enforced.
        """
        if (grammar := self.prompts[0].params.grammar) is not None:
            try:  # takes up to a second: in a thread, so that no other request waits
                await asyncio.to_thread(self.loaded.engine.engine.grammars.compile, grammar)
            except (ValueError, ImportError) as error:
                raise bad_request(f"{self.format_param}: {error}", self.format_param) from error
        await self.submit()
        if self._is_stream:
            return EventStream(self._events(), self._finish)
        try:
            return JSONResponse(await unless_gone(self.request.receive, self._whole))
        finally:
            self._finish()

    async def _whole(self) -> Json:
        try:
            async for item in self.outputs():
                if item is not None:
                    await self._handle(*item)
        except CutOff:
            raise self._cut_off_error() from None
        return self.writer.answer()

    async def _events(self) -> AsyncIterator[bytes]:
        writer = self.writer
        try:
            for piece in writer.opening():
                yield piece
            async for item in self.outputs(self.service.silence_seconds):
                for piece in [b": ping\n\n"] if item is None else await self._handle(*item):
                    yield piece
            for piece in writer.closing():
                yield piece
        except CutOff:
            yield writer.failure(self._cut_off_error())
        except ApiError as error:
            self.facts["error"] = error.code
            yield writer.failure(error)
        except Exception as error:
            log("exception", level=logging.ERROR, error=error, request_id=self.request.state.request_id)
            yield writer.failure(internal_error())

    async def _handle(self, place: int, output: StepOutput) -> list[bytes]:
        """Adds an output, saves its state if requested, and returns its events."""
        completion = output.completion
        if completion is not None:
            if completion.finish_reason == "error":
                raise self._failure(completion.error or "")
            if completion.finish_reason == "abort":
                await self._keep_unfinished(place, output.index, completion)
                self.writer.take(place, output)
                return []
            if self.names_states and self.prompts[place].keep_snapshot:
                state_id = await self._save_state(place, completion)
                self.writer.texts[place][output.index].extras["state_id"] = state_id
        pieces = self.writer.pieces(place, output)
        if completion is not None:
            await self.finished(completion)
        return pieces

    async def finished(self, completion: Completion) -> None:
        """Called when a text has ended normally."""

    def _failure(self, reason: str) -> ApiError:
        if reason.startswith(GRAMMAR_FAULT):
            return bad_request(f"{self.format_param}: {reason}", self.format_param)
        log("a text failed", level=logging.ERROR, reason=reason)
        return internal_error()

    async def _save_state(self, place: int, completion: Completion) -> str:
        if completion.snapshot is None:
            raise _no_room(completion.snapshot_error)
        notes = notes_with_reply(self.prompts[place].notes, completion.text, completion)
        try:
            return await self._put(replace(completion.snapshot, notes=notes))
        except (ValueError, DiskFullError) as error:
            raise _no_room(error) from error

    async def _put(self, snapshot: Snapshot, **facts: Any) -> str:
        owner, model = self.caller.id, self.writer.model
        return (await asyncio.to_thread(self.loaded.states.put, snapshot, owner=owner, model=model, **facts)).id

    async def _keep_unfinished(self, place: int, index: int, completion: Completion) -> None:
        prompt, snapshot, loaded = self.prompts[place], completion.snapshot, self.loaded
        if snapshot is None:
            if completion.snapshot_error is not None:
                log("a text that was cut off cannot be kept", level=logging.ERROR, reason=completion.snapshot_error)
            return
        num_generated = len(completion.token_ids)
        params = replace(prompt.params, n=1, max_tokens=prompt.params.max_tokens - num_generated)
        params.seed = None  # the snapshot's generator continues
        params.echo, params.logprobs, params.prompt_logprobs = False, None, None
        if params.grammar is not None:
            params.grammar = {**params.grammar, "written": num_generated}
        held = await loaded.in_text_thread(
            lambda: TextDecoder.from_state(loaded.tokenizer, params.stop, snapshot.decoder).flush()
        )
        text = completion.text.removesuffix(held)
        try:
            state_id = await self._put(replace(snapshot, notes=prompt.notes), unfinished=asdict(params), text=text)
        except Exception as error:  # the other texts of the request are still kept
            log("a text that was cut off cannot be kept", level=logging.ERROR, error=error)
            return
        self.writer.texts[place][index].extras["state_id"] = state_id

    def _cut_off_error(self) -> ApiError:
        kept = [text.extras["state_id"] for text in self.writer.all_texts if "state_id" in text.extras]
        return ApiError(
            503,
            "the server was shut down before the text was finished"
            + ("; it finishes the text after a restart" if kept else ""),
            code="draining",
            retry_after=5,
            facts={"state_ids": kept} if kept else {},
        )

    def _finish(self) -> None:
        self.close()
        num_prompt = sum(len(prompt.prompt) for prompt in self.prompts)
        self.service.rates.charge(self.caller, num_prompt + self.num_generated)
        self.facts.update(prompt_tokens=num_prompt, completion_tokens=self.num_generated)
        if self.service.settings.log_prompts:
            self.facts["texts"] = [str(text) for text in self.writer.all_texts]


def notes_with_reply(notes: Json, reply: str, completion: Completion) -> Json:
    """Returns a prompt's notes for the snapshot after its text."""
    if notes["kind"] != "chat":
        return notes
    stopped_by = completion.stop_reason if isinstance(completion.stop_reason, str) else None
    messages = [*notes["messages"], {"role": "assistant", "content": reply}]
    return {**notes, "messages": messages, "stopped_by": stopped_by}


async def finish_unfinished(loaded: Loaded) -> None:
    """Finishes the texts that an earlier process cut off. They remain as saved states with their text."""
    for saved in loaded.states.unfinished():
        try:
            snapshot = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
            params = SamplingParams(**saved.unfinished or {})
            params.logit_bias = {int(token): bias for token, bias in params.logit_bias.items()}
            (completion,) = await loaded.engine.generate(None, params, snapshot=snapshot, keep_snapshot=True)
            if completion.snapshot is None:
                raise RuntimeError(completion.error or completion.snapshot_error)
            text = (saved.text or "") + completion.text
            if snapshot.notes["kind"] == "chat":
                text = loaded.chat.reply(text)
            await asyncio.to_thread(
                loaded.states.put,
                replace(completion.snapshot, notes=notes_with_reply(snapshot.notes, text, completion)),
                owner=saved.owner,
                model=saved.model,
                text=text,
                state_id=saved.id,
            )
            log("finished what had been cut off", state=saved.id, tokens=len(completion.token_ids))
        except Exception as error:
            log("could not finish what had been cut off", level=logging.ERROR, error=error, state=saved.id)


def _no_room(reason: object) -> ApiError:
    return ApiError(507, f"the state cannot be kept: {reason}", param="bdh.save_state", code="no_room")


def no_state(state_id: str, param: str | None = None) -> ApiError:
    return ApiError(404, f"you have no state {state_id!r} on this server", param=param, code="state_not_found")


async def _embed(service: Service, body: EmbeddingRequest, request: Request) -> EmbeddingAnswer:
    model = service.begin(body, request)
    loaded, most = service.ready(), service.settings.limits.embeddings
    width = loaded.model.config.n_embd
    if body.dimensions not in (None, width):
        raise bad_request(f"dimensions is {body.dimensions}: must be {width}, or left out", "dimensions")
    texts, options = texts_of(body.input), body.bdh or EmbeddingOptions()
    if len(texts) > most:
        raise bad_request(f"the request has {counted(len(texts), 'text')}: must be at most {most:,}", "input")
    prompts = []
    for number, text in enumerate(texts):
        param = "input" if text is body.input else f"input.{number}"
        tokens = await loaded.prompt_tokens(text, param)
        prompts.append(PromptRequest(tokens, SamplingParams(max_tokens=0), residuals=Residuals(), param=param))
    service.check_lengths(prompts)  # before the first one is read
    await unless_gone(request.receive, lambda: _read_embeddings(service, prompts, request))
    data = []
    for index, prompt in enumerate(prompts):
        vector = _vector(prompt.residuals, options)
        is_text = body.encoding_format == "base64"
        shown = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_text else vector.tolist()
        data.append(Embedding(index=index, embedding=shown))
    num_tokens = sum(len(prompt.prompt) for prompt in prompts)
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return EmbeddingAnswer(data=data, model=model, usage=usage)


async def _read_embeddings(service: Service, prompts: Sequence[PromptRequest], request: Request) -> None:
    """Reads all texts with the engine, a few at a time, like prompts.

    Raises:
        ApiError: as :meth:`Generation.submit`; 500 if the engine cannot read a text; 503 if it takes too long, or if the
            server shuts down.
    """
    size, num_tokens = min(_AT_ONCE, service.settings.limits.prompts), 0
    try:
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            with closing(await _admitted(service, group, request, is_first=first == 0)) as generation:
                num_tokens += sum(len(prompt.prompt) for prompt in group)
                async for item in generation.outputs():
                    completion = None if item is None else item[1].completion
                    if completion is not None and completion.finish_reason == "error":
                        log("a text could not be read", level=logging.ERROR, reason=completion.error)
                        raise internal_error()
    except CutOff:
        raise unavailable("the server was shut down before the texts were read", "draining") from None
    finally:
        service.rates.charge(request.state.caller, num_tokens)
        request.state.facts["prompt_tokens"] = num_tokens


async def _admitted(
    service: Service, prompts: Sequence[PromptRequest], request: Request, *, is_first: bool
) -> Generation:
    """Submits a group of texts. If the queue is full, later groups wait, because the first ones have been read."""
    arrived, seconds = request.state.arrived, service.settings.limits.request_timeout
    while (now := time.monotonic()) - arrived <= seconds:
        generation = Generation(service, prompts, request, arrived if is_first else now)
        try:
            await generation.submit()
            return generation
        except ApiError as error:
            if is_first or error.code != "queue_full":
                raise
        await asyncio.sleep(_QUEUE_SECONDS)
    message = f"the request has run for {now - arrived:.0f} seconds, which is the time limit: send fewer texts"
    raise unavailable(message, "request_timeout")


def _vector(residuals: Residuals | None, options: EmbeddingOptions) -> np.ndarray:
    """Returns the vector of a text, float32 (D,)."""
    assert residuals is not None
    vector = residuals.mean if options.pooling != "last" else residuals.last
    assert vector is not None
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if options.normalize is False or length == 0:
        return vector
    return (vector / length).astype(np.float32)
