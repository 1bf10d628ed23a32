"""/v1/completions and /v1/chat/completions: from a request to its answer, whole or in pieces."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh.generate.grammar import GRAMMAR_FAULT
from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput, TextDecoder
from bdh.generate.snapshot import Snapshot
from bdh.serve.answers import ChatAnswer, ChatWriter, CompletionAnswer, CompletionWriter, Writer
from bdh.serve.errors import ApiError, bad_request, internal_error
from bdh.serve.middleware import EventStream, unless_gone
from bdh.serve.monitoring import log
from bdh.serve.schemas import ChatRequest, CompletionRequest, Extras, Json
from bdh.serve.service import CutOff, Generation, Loaded, PromptRequest, Service
from bdh.serve.text import prompt_tokens
from bdh.storage import DiskFullError

COMPLETION_TOKENS = 16  # where the request does not say, as in OpenAI's API
STREAMS: dict[int | str, Json] = {200: {"content": {"text/event-stream": {}}}}


def add_completions(app: FastAPI, service: Service, errors: dict[int | str, Json]) -> None:
    """
    Args:
        errors: the descriptions of errors, for the API's description.
    """
    responses = {**errors, **STREAMS}

    @app.post("/v1/completions", response_model=CompletionAnswer, responses=responses, tags=["texts"])
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await (await _completion(service, body, request)).respond()

    @app.post("/v1/chat/completions", response_model=ChatAnswer, responses=responses, tags=["texts"])
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await (await _chat(service, body, request)).respond()


def begin(service: Service, body: Any, request: Request) -> str:
    """Counts a request for texts; the name of its model. Errors are those of :meth:`Service.begin`."""
    model = service.begin(body, request)
    request.state.facts["stream"] = bool(body.stream)
    return model


async def _completion(service: Service, body: CompletionRequest, request: Request) -> "TextGeneration":
    model = begin(service, body, request)
    loaded, extras = service.ready(), body.extras
    params = replace(
        body.params(service.max_tokens(body.max_tokens, COMPLETION_TOKENS)),
        n=max(body.best_of or 1, body.n or 1),
        echo=bool(body.echo),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    if params.n > (body.n or 1) and params.logprobs is None:
        params.logprobs = 0  # to choose by
    service.check_texts(params.n, "n" if params.n == body.n else "best_of")
    snapshot = await saved_snapshot(loaded, extras, request)
    texts = body.texts
    if snapshot is not None and (len(texts) > 1 or body.echo):
        name = "prompt" if len(texts) > 1 else "echo"
        raise bad_request(f"{name}: with bdh.from_state only one prompt, and no echo", name)
    await compile_grammar(loaded, params, "response_format")
    params.validated()  # what pydantic does not know
    prompts = []
    for number, text in enumerate(texts):
        param = "prompt" if text is body.prompt else f"prompt.{number}"
        tokens = await loaded.in_text_thread(
            prompt_tokens, loaded.tokenizer, loaded.vocab_size, text, param, snapshot is not None
        )
        prompt = PromptRequest(
            tokens, replace(params), snapshot, bool(extras.save_state), extras.activations, param=param
        )
        prompt.notes = {"kind": "text"}
        prompts.append(prompt)
    options = body.stream_options
    writer = CompletionWriter(prompts, loaded.names, model, body.logprobs, body.n or 1, options=options)
    return TextGeneration(service, prompts, request, writer, is_stream=bool(body.stream), extras=extras)


async def _chat(service: Service, body: ChatRequest, request: Request) -> "TextGeneration":
    model = begin(service, body, request)
    loaded, extras = service.ready(), body.extras
    messages = [message.plain() for message in body.messages]
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = service.max_tokens(getattr(body, name), service.settings.limits.chat_tokens, name)
    params = body.params(max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
    if body.logprobs:
        params.logprobs = body.top_logprobs or 0
    service.check_texts(params.n, "n")
    await compile_grammar(loaded, params, "response_format")
    snapshot = await saved_snapshot(loaded, extras, request)
    before: list[dict[str, str]] = []
    if snapshot is None:
        tokens = await loaded.in_text_thread(loaded.chat.encode, messages)
    else:
        if snapshot.notes.get("kind") != "chat":
            message = "that state is not of a conversation: continue it with /v1/completions"
            raise bad_request(message, "bdh.from_state")
        before = snapshot.notes["messages"]
        tokens = await loaded.in_text_thread(loaded.chat.further, before, messages, snapshot.notes.get("stopped_by"))
    prompt = PromptRequest(tokens, params, snapshot, bool(extras.save_state), extras.activations, param="messages")
    prompt.notes = {"kind": "chat", "messages": [*before, *messages]}
    num_top = params.logprobs if body.logprobs else None
    options = body.stream_options
    writer = ChatWriter([prompt], loaded.names, model, num_top, params.n, reply=loaded.chat.reply, options=options)
    return TextGeneration(service, [prompt], request, writer, is_stream=bool(body.stream), extras=extras)


async def compile_grammar(loaded: Loaded, params: SamplingParams, param: str) -> None:
    """Makes the text's grammar ready, which takes a second at worst, where it holds up nobody.

    Raises:
        ApiError: 400, it cannot be held.
    """
    if params.grammar is None:
        return
    try:
        await asyncio.to_thread(loaded.engine.engine.grammars.compile, params.grammar)
    except (ValueError, ImportError) as error:
        raise bad_request(f"{param}: {error}", param) from error


async def saved_snapshot(loaded: Loaded, extras: Extras, request: Request) -> Snapshot | None:
    if extras.from_state is None:
        return None
    try:
        return await asyncio.to_thread(loaded.states.snapshot, extras.from_state, request.state.caller.id)
    except KeyError:
        raise no_state(extras.from_state, "bdh.from_state") from None
    except ValueError as error:
        raise bad_request(str(error), "bdh.from_state") from error


class TextGeneration(Generation):
    """The texts of one request, and how they become its answer.

    Args:
        format_param: what the request calls the form that its texts must have.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[PromptRequest],
        request: Request,
        writer: Writer,
        *,
        is_stream: bool,
        extras: Extras | None = None,
        format_param: str = "response_format",
    ):
        super().__init__(service, prompts, request)
        self.writer, self._is_stream = writer, is_stream
        self._saves_state = extras is not None and bool(extras.save_state)
        self._format_param = format_param
        if service.settings.log_prompts:
            names = service.ready().names
            log("prompts", prompts=[names.text(prompt.prompt) for prompt in prompts])

    async def respond(self) -> Response:
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
        """Notes what has come, and keeps its state; the events that tell it."""
        completion = output.completion
        if completion is not None:
            if completion.finish_reason == "error":
                raise self._failure(completion.error or "")
            if completion.finish_reason == "abort":
                await self._keep_unfinished(place, output.index, completion)
                self.writer.take(place, output)
                return []
            if self._saves_state:
                state_id = await self._save_state(place, completion)
                self.writer.texts[place][output.index].extras["state_id"] = state_id
        pieces = self.writer.pieces(place, output)
        if completion is not None:
            await self.finished(completion)
        return pieces

    async def finished(self, completion: Completion) -> None:
        """A text has come to its own end."""

    def _failure(self, reason: str) -> ApiError:
        if reason.startswith(GRAMMAR_FAULT):
            return bad_request(f"{self._format_param}: {reason}", self._format_param)
        log("a text failed", level=logging.ERROR, reason=reason)
        return internal_error()

    async def _save_state(self, place: int, completion: Completion) -> str:
        if completion.snapshot is None:
            raise _no_room(completion.snapshot_error)
        notes = dict(self.prompts[place].notes)
        if notes["kind"] == "chat":
            notes["messages"] = [*notes["messages"], {"role": "assistant", "content": completion.text}]
            notes["stopped_by"] = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        try:
            saved = await self._put(replace(completion.snapshot, notes=notes))
        except (ValueError, DiskFullError) as error:
            raise _no_room(error) from error
        return str(saved.id)

    async def _put(self, snapshot: Snapshot, **facts: Any) -> Any:
        loaded = self.service.loaded
        assert loaded is not None
        owner, model = self.caller.id, self.writer.model
        return await asyncio.to_thread(loaded.states.put, snapshot, owner=owner, model=model, **facts)

    async def _keep_unfinished(self, place: int, index: int, completion: Completion) -> None:
        prompt, snapshot, loaded = self.prompts[place], completion.snapshot, self.service.loaded
        assert loaded is not None
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
            saved = await self._put(replace(snapshot, notes=prompt.notes), unfinished=asdict(params), text=text)
        except Exception as error:  # the others of the request are kept nevertheless
            log("a text that was cut off cannot be kept", level=logging.ERROR, error=error)
            return
        self.writer.texts[place][index].extras["state_id"] = saved.id

    def _cut_off_error(self) -> ApiError:
        kept = [text.extras["state_id"] for text in self.writer.all_texts if "state_id" in text.extras]
        return ApiError(
            503,
            "the server has ended before the text did" + ("; it finishes it when it is back" if kept else ""),
            code="draining",
            retry_after=5,
            facts={"state_ids": kept} if kept else None,
        )

    def _finish(self) -> None:
        self.close()
        num_prompt = sum(len(prompt.prompt) for prompt in self.prompts)
        self.service.rates.charge(self.caller, num_prompt + self.num_generated)
        self.facts.update(prompt_tokens=num_prompt, completion_tokens=self.num_generated)
        if self.service.settings.log_prompts:
            self.facts["texts"] = ["".join(text.parts) for text in self.writer.all_texts]


async def finish_unfinished(loaded: Loaded) -> None:
    """Finishes the texts that an earlier process could not; they stay as saved states, with their text."""
    for saved in loaded.states.unfinished():
        try:
            snapshot = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
            params = SamplingParams(**saved.unfinished or {})
            params.logit_bias = {int(token): bias for token, bias in params.logit_bias.items()}
            (completion,) = await loaded.engine.generate(None, params, snapshot=snapshot, keep_snapshot=True)
            if completion.snapshot is None:
                raise RuntimeError(completion.error or completion.snapshot_error)
            text = (saved.text or "") + completion.text
            notes = dict(snapshot.notes)
            if notes["kind"] == "chat":
                text = loaded.chat.reply(text)
                notes["messages"] = [*notes["messages"], {"role": "assistant", "content": text}]
            await asyncio.to_thread(
                loaded.states.put,
                replace(completion.snapshot, notes=notes),
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
    return ApiError(404, f"there is no state {state_id!r} of yours here", param=param, code="state_not_found")
