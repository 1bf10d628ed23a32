"""One request from its body to its answer, whole or in pieces."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh.generate.matcher import GRAMMAR_FAULT
from bdh.generate.params import SamplingParams
from bdh.generate.snapshot import Snapshot
from bdh.model.text import TextDecoder, encode_prompt
from bdh.serve.answers import ChatWriter, CompletionWriter, Json, Writer
from bdh.serve.errors import ApiError, bad_request, internal_error
from bdh.serve.events import PING, SILENCE_SECONDS, EventStream, unless_gone
from bdh.serve.keys import Caller, RateLimits
from bdh.serve.logs import log
from bdh.serve.schemas import ChatRequest, CompletionRequest, Extras, Sampling
from bdh.serve.service import CutOff, Event, Generation, Job, Loaded, Service
from bdh.storage import DiskFullError

_COMPLETION_TOKENS = 16  # of OpenAI's API


@dataclass
class Asked:
    """A request that has been understood."""

    jobs: list[Job]
    writer: Writer
    is_stream: bool
    extras: Extras
    model: str


class Handler:
    format_field = "response_format"
    """What requests call the form that their texts must have."""

    def __init__(self, service: Service, rates: RateLimits):
        self._service, self._rates = service, rates

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        model = self._begin(body, request)
        return await self._answer(await self._completion(body, model, caller_of(request)), request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        model = self._begin(body, request)
        return await self._answer(await self._chat(body, model, caller_of(request)), request)

    def _begin(self, body: Sampling, request: Request) -> str:
        """Counts the request; the name of its model."""
        model = self._service.check_model(body.model)
        self._rates.begin(caller_of(request))
        request.state.facts.update(user=body.user, stream=body.is_stream)
        return model

    async def _completion(self, body: CompletionRequest, model: str, caller: Caller) -> Asked:
        loaded, extras = self._service.ready(), body.extras
        max_tokens = self._max_tokens(body.max_tokens, _COMPLETION_TOKENS)
        params = replace(
            body.params(max_tokens=max_tokens, stops=[], stop_token_ids=[]),
            n=max(body.best_of or 1, body.n or 1),
            echo=bool(body.echo),
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        if params.n > (body.n or 1) and params.logprobs is None:
            params.logprobs = 0  # to choose by
        self._service.check_texts(params.n, "n" if params.n == body.n else "best_of")
        snapshot = await self._snapshot(extras, caller)
        if snapshot is not None and (len(body.prompts) > 1 or body.echo):
            name = "prompt" if len(body.prompts) > 1 else "echo"
            raise bad_request(f"{name}: with bdh.from_state only one prompt, and no echo", name)
        await self._compile(params)
        params.validated()  # what pydantic does not know
        jobs = []
        for number, prompt in enumerate(body.prompts):
            param = "prompt" if prompt is body.prompt else f"prompt.{number}"
            tokens = await loaded.in_text_thread(tokens_of, loaded, prompt, param, snapshot is not None)
            keep, watch = bool(extras.save_state), extras.activations
            jobs.append(Job(tokens, replace(params), snapshot, keep, watch, {"kind": "text"}, param))
        options = body.stream_options
        writer = CompletionWriter(jobs, loaded.names, model, body.logprobs, body.n or 1, options=options)
        return self._asked(body.is_stream, jobs, writer, model, extras)

    async def _chat(self, body: ChatRequest, model: str, caller: Caller) -> Asked:
        loaded, extras = self._service.ready(), body.extras
        messages = [message.plain() for message in body.messages]
        max_tokens = self._max_tokens(
            body.max_completion_tokens or body.max_tokens,
            self._service.settings.limits.chat_tokens,
            "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        )
        params = body.params(max_tokens=max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
        if body.logprobs:
            params.logprobs = body.top_logprobs or 0
        self._service.check_texts(params.n, "n")
        await self._compile(params)
        snapshot = await self._snapshot(extras, caller)
        if snapshot is None:
            before: list[dict[str, str]] = []
            tokens = await loaded.in_text_thread(loaded.chat.encode, messages)
        else:
            if snapshot.notes.get("kind") != "chat":
                raise bad_request(
                    "that state is not of a conversation: go on from it with /v1/completions", "bdh.from_state"
                )
            before = snapshot.notes["messages"]
            stopped_by = snapshot.notes.get("stopped_by")
            tokens = await loaded.in_text_thread(loaded.chat.further, before, messages, stopped_by)
        notes = {"kind": "chat", "messages": [*before, *messages]}
        jobs = [Job(tokens, params, snapshot, bool(extras.save_state), extras.activations, notes, "messages")]
        num_top = params.logprobs if body.logprobs else None
        writer = ChatWriter(jobs, loaded.names, model, num_top, params.n, loaded.chat.reply, body.stream_options)
        return self._asked(body.is_stream, jobs, writer, model, extras)

    async def _compile(self, params: SamplingParams) -> None:
        """Makes the text's grammar ready, which takes a second at worst, where it holds up nobody.

        Raises:
            ApiError: 400, it cannot be held.
        """
        if params.grammar is None:
            return
        try:
            await asyncio.to_thread(self._service.ready().front.engine.grammars.compile, params.grammar)
        except (ValueError, ImportError) as error:
            raise bad_request(f"{self.format_field}: {error}", self.format_field) from error

    def _asked(self, is_stream: bool, jobs: list[Job], writer: Writer, model: str, extras: Extras) -> Asked:
        if self._service.settings.log_prompts:
            names = self._service.ready().names
            log("prompts", prompts=[names.text(job.tokens) for job in jobs])
        return Asked(jobs, writer, is_stream, extras, model)

    def _max_tokens(self, given: int | None, default: int, param: str = "max_tokens") -> int:
        most = self._service.settings.limits.max_tokens
        if given is not None and given > most:
            raise bad_request(f"{param} is {given:,}: must be at most {most:,}", param)
        return min(default, most) if given is None else given

    async def _snapshot(self, extras: Extras, caller: Caller) -> Snapshot | None:
        if extras.from_state is None:
            return None
        states = self._service.ready().states
        try:
            return await asyncio.to_thread(states.snapshot, extras.from_state, caller.id)
        except KeyError:
            raise no_state(extras.from_state, "bdh.from_state") from None
        except ValueError as error:
            raise bad_request(str(error), "bdh.from_state") from error

    async def _answer(self, asked: Asked, request: Request) -> Response:
        caller = caller_of(request)
        generation = await self._service.begin(asked.jobs, caller=caller, arrived=request.state.arrived)
        if asked.is_stream:
            end = partial(self._close, asked, generation, request)
            return EventStream(self._events(asked, generation, request), end)
        try:
            return JSONResponse(await unless_gone(request.receive, lambda: self._whole(asked, generation)))
        finally:
            self._close(asked, generation, request)

    async def _whole(self, asked: Asked, generation: Generation) -> Json:
        try:
            while not generation.is_done:
                item = await generation.next()
                assert item is not None
                await self._take(asked, generation, item)
        except CutOff:
            raise self._cut_off(asked) from None
        if generation.is_cut_off:
            raise self._cut_off(asked)
        return asked.writer.answer()

    async def _events(self, asked: Asked, generation: Generation, request: Request) -> AsyncIterator[bytes]:
        writer = asked.writer
        try:
            for piece in writer.opening():
                yield piece
            while not generation.is_done:
                item = await generation.next(SILENCE_SECONDS)
                for piece in [PING] if item is None else await self._take(asked, generation, item):
                    yield piece
            if generation.is_cut_off:
                raise self._cut_off(asked)
            for piece in writer.closing():
                yield piece
        except CutOff:
            yield writer.failure(self._cut_off(asked))
        except ApiError as error:
            request.state.facts["error"] = error.code
            yield writer.failure(error)
        except Exception as error:
            log("exception", level=logging.ERROR, error=error, request_id=request.state.request_id)
            yield writer.failure(internal_error())

    async def _take(self, asked: Asked, generation: Generation, item: Event) -> list[bytes]:
        """Notes what has come, and keeps its state; the events that tell it."""
        completion = item.output.completion
        if completion is not None and completion.finish_reason == "error":
            if completion.error is not None and completion.error.startswith(GRAMMAR_FAULT):
                raise bad_request(f"{self.format_field}: {completion.error}", self.format_field)
            log("a text failed", level=logging.ERROR, reason=completion.error)
            raise internal_error()
        if completion is not None and completion.finish_reason == "abort":
            await self._keep_unfinished(asked, generation, item)
            asked.writer.take(item)
            return []
        if completion is not None and asked.extras.save_state:
            if completion.snapshot is None:
                raise _no_room(completion.snapshot_error)
            asked.writer.text(item).extras["state_id"] = await self._saved(asked, generation, item)
        return asked.writer.pieces(item)

    async def _saved(self, asked: Asked, generation: Generation, item: Event) -> str:
        completion, job = item.output.completion, asked.jobs[item.job]
        assert completion is not None
        assert completion.snapshot is not None
        notes = {**job.notes}
        if notes["kind"] == "chat":
            notes["messages"] = [*notes["messages"], {"role": "assistant", "content": completion.text}]
            notes["stopped_by"] = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        snapshot = replace(completion.snapshot, notes=notes)
        states = self._service.loaded.states  # type: ignore[union-attr]
        try:
            saved = await asyncio.to_thread(states.put, snapshot, owner=generation.caller.id, model=asked.model)
        except (ValueError, DiskFullError) as error:
            raise _no_room(error) from error
        return saved.id

    async def _keep_unfinished(self, asked: Asked, generation: Generation, item: Event) -> None:
        completion, job = item.output.completion, asked.jobs[item.job]
        assert completion is not None
        if completion.snapshot is None:
            if completion.snapshot_error is not None:
                log("a text that was cut off cannot be kept", level=logging.ERROR, reason=completion.snapshot_error)
            return
        params = replace(job.params, n=1, max_tokens=job.params.max_tokens - len(completion.token_ids))
        params.seed = None  # the snapshot's generator goes on
        params.echo, params.logprobs, params.prompt_logprobs = False, None, None
        if params.grammar is not None:
            params.grammar = {**params.grammar, "written": len(completion.token_ids)}
        loaded = self._service.loaded
        assert loaded is not None
        decoder = completion.snapshot.decoder
        held = await loaded.in_text_thread(
            lambda: TextDecoder.from_state(loaded.tokenizer, params.stop, decoder).flush()
        )
        states = loaded.states
        try:
            saved = await asyncio.to_thread(
                states.put,
                replace(completion.snapshot, notes=job.notes),
                owner=generation.caller.id,
                model=asked.model,
                unfinished=asdict(params),
                text=completion.text.removesuffix(held),
            )
        except Exception as error:  # the others of the request are kept nevertheless
            log("a text that was cut off cannot be kept", level=logging.ERROR, error=error)
            return
        asked.writer.text(item).extras["state_id"] = saved.id

    def _cut_off(self, asked: Asked) -> ApiError:
        kept = [text.extras["state_id"] for text in asked.writer.texts if "state_id" in text.extras]
        return ApiError(
            503,
            "the server has ended before the text did" + ("; it finishes it when it is back" if kept else ""),
            code="draining",
            retry_after=5,
            facts={"state_ids": kept} if kept else None,
        )

    def _close(self, asked: Asked, generation: Generation, request: Request) -> None:
        generation.close()
        num_prompt = sum(len(job.tokens) for job in asked.jobs)
        self._rates.charge(generation.caller, num_prompt + generation.num_generated)
        request.state.facts.update(prompt_tokens=num_prompt, completion_tokens=generation.num_generated)
        if self._service.settings.log_prompts:
            request.state.facts["texts"] = ["".join(text.parts) for text in asked.writer.texts]


async def finish_unfinished(loaded: Loaded) -> None:
    """Goes on with the texts that an earlier process could not finish; they stay as saved states, with their text."""
    for saved in loaded.states.unfinished():
        try:
            snapshot = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
            params = SamplingParams(**saved.unfinished or {})
            params.logit_bias = {int(token): bias for token, bias in params.logit_bias.items()}
            (completion,) = await loaded.front.generate(None, params, snapshot=snapshot, keep_snapshot=True)
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


def caller_of(request: Request) -> Caller:
    return request.state.caller


def tokens_of(loaded: Loaded, prompt: str | Sequence[int], param: str, goes_on: bool = False) -> list[int]:
    """Of a text, or of ids that are checked.

    Args:
        param: what the request calls it.
        goes_on: it follows in a state, where it may be empty, and begins with nothing of its own.

    Raises:
        ApiError: 400, there is nothing to start from, or ids outside of the vocabulary.
    """
    if goes_on:
        if isinstance(prompt, str):
            ids: Any = loaded.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            return list(ids)
        tokens = list(prompt)
    else:
        try:
            tokens = encode_prompt(loaded.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        except ValueError as error:
            raise bad_request(str(error), param) from error
        if not tokens:
            raise bad_request("the prompt has no tokens: give at least one to start from", param)
    vocab_size = loaded.model.config.vocab_size
    if wrong := [token for token in tokens if token >= vocab_size][:3]:
        raise bad_request(f"the prompt has the token ids {wrong}: must be within 0 and {vocab_size - 1}", param)
    return tokens
