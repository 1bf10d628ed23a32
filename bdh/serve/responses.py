"""/v1/responses: conversations that the server keeps, each as its text and, where it fits, as its state."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query
from starlette.requests import Request
from starlette.responses import Response

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion, StepOutput
from bdh.generate.snapshot import Snapshot
from bdh.serve.answers import ChatWriter
from bdh.serve.completions import STREAMS, TextGeneration, begin, compile_grammar
from bdh.serve.errors import ApiError
from bdh.serve.middleware import sent_event
from bdh.serve.monitoring import log
from bdh.serve.response_schemas import (
    InputItems,
    ItemReference,
    Message,
    ResponseAnswer,
    ResponseDeleted,
    ResponseRequest,
    ResponseUsage,
)
from bdh.serve.schemas import Json
from bdh.serve.service import Loaded, PromptRequest, Service
from bdh.serve.states import SavedState
from bdh.serve.text import Message as PlainMessage

_ITEM_ID = re.compile(r"msg_([0-9a-f]{32})(_\d+)?")


class ResponseWriter(ChatWriter):
    """The one text of a response, as an answer or as the events of its stream.

    Args:
        answer: the response as it is known before its text.
        items: of the input, as ``input_items`` lists them.
        messages: the conversation that is answered, without the instructions.
    """

    def __init__(
        self,
        prompt: PromptRequest,
        loaded: Loaded,
        answer: ResponseAnswer,
        items: list[Json],
        messages: list[PlainMessage],
    ):
        super().__init__([prompt], loaded.names, answer.model, prompt.params.logprobs, reply=loaded.chat.reply)
        self.id = answer.id
        self._prompt, self._items, self._messages = prompt, items, messages
        self._answer, self._number = answer, 0
        self._item_id = _item_id(answer.id)

    @property
    def is_stored(self) -> bool:
        return self._answer.store

    def not_stored(self) -> None:
        self._answer.store = False

    def opening(self) -> list[bytes]:
        item = self._item("in_progress", [])
        return [
            self._event("created", response=self.facts()),
            self._event("in_progress", response=self.facts()),
            self._event("output_item.added", output_index=0, item=item),
            self._part_event("content_part.added", part=_part("", [])),
        ]

    def pieces(self, place: int, output: StepOutput) -> list[bytes]:
        piece = self.take(place, output)
        if piece is None or not (piece["text"] or piece["logprobs"]):
            return []
        return [self._part_event("output_text.delta", delta=piece["text"], logprobs=piece["logprobs"])]

    def closing(self) -> list[bytes]:
        facts = self.answer()
        (item,) = facts["output"]
        (part,) = item["content"]
        return [
            self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._part_event("content_part.done", part=part),
            self._event("output_item.done", output_index=0, item=item),
            self._event(facts["status"], response=facts),
        ]

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"  # all that there is for it
        self._answer.status = "failed"
        self._answer.error = {"code": code, "message": error.message, **error.facts}
        return self._event("failed", response=self.facts())

    def answer(self) -> Json:
        completion = self._completion
        is_cut = completion.finish_reason == "length"
        answer = self._answer
        answer.status = "incomplete" if is_cut else "completed"
        answer.incomplete_details = {"reason": "max_output_tokens"} if is_cut else None
        answer.completed_at = answer.completed_at or int(time.time())
        (text,) = self.all_texts
        logprobs = [] if self._num_top is None else self._logprobs(text, text.entries)["content"]
        answer.output = [self._item(answer.status, [_part("".join(text.parts), logprobs)])]
        answer.usage = self._response_usage(completion)
        return self.facts()

    def facts(self) -> Json:
        return self._answer.model_dump(mode="json")

    def record(self) -> Json:
        """What is kept of it, once it has ended."""
        reason = self._completion.stop_reason
        (text,) = self.all_texts
        return {
            "answer": self.answer(),
            "items": self._items,
            "messages": [*self._messages, {"role": "assistant", "content": "".join(text.parts)}],
            "stopped_by": reason if isinstance(reason, str) else None,
        }

    @property
    def _completion(self) -> Completion:
        (text,) = self.all_texts
        assert text.completion is not None
        return text.completion

    def _response_usage(self, completion: Completion) -> ResponseUsage:
        """All that the state has read counts as input; what it had read before this request, as cached."""
        snapshot = self._prompt.snapshot
        known = completion.num_cached_tokens if snapshot is None else snapshot.state.position
        num_input, num_output = completion.num_prompt_tokens, len(completion.token_ids)
        return ResponseUsage(
            input_tokens=num_input,
            input_tokens_details={"cached_tokens": known, "cache_write_tokens": 0},
            output_tokens=num_output,
            output_tokens_details={"reasoning_tokens": 0},
            total_tokens=num_input + num_output,
        )

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _event(self, name: str, **facts: Any) -> bytes:
        self._number += 1
        name = f"response.{name}"
        return sent_event({"type": name, "sequence_number": self._number - 1, **facts}, name)

    def _part_event(self, name: str, **facts: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **facts)

    def _chunk_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion | None) -> Json:
        return {"text": text, "logprobs": [] if logprobs is None else logprobs["content"]}


class ResponseGeneration(TextGeneration):
    """That of a response, which is stored at its end."""

    writer: ResponseWriter

    async def finished(self, completion: Completion) -> None:
        writer, loaded = self.writer, self.service.loaded
        if not writer.is_stored:
            return
        assert loaded is not None
        record, snapshot, notes = writer.record(), completion.snapshot, self.prompts[0].notes
        if snapshot is None:
            log("a response is stored without its state", level=logging.WARNING, reason=completion.snapshot_error)
        else:
            messages = [*notes["messages"], record["messages"][-1]]
            notes = {**notes, "messages": messages, "stopped_by": record["stopped_by"]}
            snapshot = replace(snapshot, notes=notes)
        put, owner = loaded.states.put_response, self.caller.id
        if not await asyncio.to_thread(put, writer.id, record, snapshot, owner=owner, model=writer.model):
            writer.not_stored()


def add_responses(
    app: FastAPI, service: Service, errors: dict[int | str, Json], of_stored: dict[int | str, Json]
) -> None:
    """
    Args:
        errors: the descriptions of errors of a new response, for the API's description.
        of_stored: those of a stored one.
    """
    stored: Json = {"responses": of_stored, "tags": ["responses"]}

    @app.post("/v1/responses", response_model=ResponseAnswer, responses={**errors, **STREAMS}, tags=["responses"])
    async def create(body: ResponseRequest, request: Request) -> Response:
        return await (await _response(service, body, request)).respond()

    @app.get("/v1/responses/{response_id}", **stored)
    async def response(response_id: str, request: Request, stream: Literal["false"] = "false") -> ResponseAnswer:
        return ResponseAnswer(**_stored(service, response_id, request).record["answer"])

    @app.delete("/v1/responses/{response_id}", **stored)
    async def delete_response(response_id: str, request: Request) -> ResponseDeleted:
        _stored(service, response_id, request)
        try:
            await asyncio.to_thread(service.ready().states.delete, response_id, request.state.caller.id)
        except KeyError:  # by another request, meanwhile
            raise _not_found(response_id) from None
        return ResponseDeleted(id=response_id)

    @app.get("/v1/responses/{response_id}/input_items", **stored)
    async def input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> InputItems:
        items = _stored(service, response_id, request).record["items"]
        items = items if order == "asc" else items[::-1]
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise ApiError(404, f"{response_id} has no item {after!r}", param="after", code="item_not_found")
            items = items[places[0] + 1 :]
        page = items[:limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return InputItems(data=page, first_id=first, last_id=last, has_more=len(page) < len(items))


async def _response(service: Service, body: ResponseRequest, request: Request) -> ResponseGeneration:
    model = begin(service, body, request)
    loaded = service.ready()
    max_tokens = service.max_tokens(body.max_output_tokens, service.settings.limits.chat_tokens, "max_output_tokens")
    params = body.params(max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
    params.logprobs = body.num_logprobs
    await compile_grammar(loaded, params, "text.format")
    previous = None
    if body.previous_response_id is not None:
        previous = _stored(service, body.previous_response_id, request, is_previous=True)
    response_id = f"resp_{secrets.token_hex(16)}"
    messages, items = [], []
    for place, item in body.items:
        message = _referred(service, item, place, request) if isinstance(item, ItemReference) else item
        messages.append(message.plain())
        items.append(message.item(f"{_item_id(response_id)}_{place}"))
    answer = ResponseAnswer(
        id=response_id,
        created_at=int(time.time()),
        model=model,
        store=body.store is not False,
        temperature=params.temperature,
        top_p=params.top_p,
        metadata=body.metadata or {},
        top_logprobs=body.top_logprobs or 0,
        text={"format": body.format.shown(), "verbosity": "medium"},
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        user=body.user,
    )
    prompt = await _prompt(loaded, previous, messages, body.instructions or None, params)
    prompt.keep_snapshot = answer.store
    before = [] if previous is None else previous.record["messages"]
    writer = ResponseWriter(prompt, loaded, answer, items, [*before, *messages])
    return ResponseGeneration(
        service, [prompt], request, writer, is_stream=bool(body.stream), format_param="text.format"
    )


async def _prompt(
    loaded: Loaded,
    previous: SavedState | None,
    messages: list[PlainMessage],
    instructions: str | None,
    params: SamplingParams,
) -> PromptRequest:
    """What is to be read: with the state of the previous response, where that has been kept and has read the same
    instructions, only what is new; else the conversation from its beginning.

    Raises:
        ApiError: 400, there is no chat template, or it refuses the conversation.
    """
    before = [] if instructions is None else [{"role": "system", "content": instructions}]
    snapshot = None
    if previous is not None:
        before += previous.record["messages"]
        if loaded.chat.can_continue and (previous.record["answer"]["instructions"] or None) == instructions:
            snapshot = await _state_of(loaded, previous)
    try:
        if previous is not None and snapshot is not None:
            stopped_by = previous.record["stopped_by"]
            tokens = await loaded.in_text_thread(loaded.chat.further, before, messages, stopped_by)
        else:
            tokens = await loaded.in_text_thread(loaded.chat.encode, [*before, *messages])
    except ApiError as error:
        error.param = "input" if error.param == "messages" else error.param
        raise
    notes = {"kind": "chat", "messages": [*before, *messages]}
    return PromptRequest(tokens, params, snapshot, param="input", notes=notes)


async def _state_of(loaded: Loaded, saved: SavedState) -> Snapshot | None:
    """None where it has been given up, or is of another model or tokenizer, or of other settings of the engine."""
    try:
        found = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
    except KeyError:
        return None
    except ValueError as error:
        log("the conversation of a response is read again", reason=str(error))
        return None
    return found if found.state.pattern == loaded.engine.engine.advancer.pattern else None


def _stored(service: Service, response_id: str, request: Request, *, is_previous: bool = False) -> SavedState:
    """A response that has been stored for this caller.

    Raises:
        ApiError: 404, there is none.
    """
    try:
        saved = service.ready().states.get(response_id, request.state.caller.id)
        if saved.response is not None:
            return saved
    except KeyError:
        pass
    if not is_previous:
        raise _not_found(response_id)
    raise ApiError(
        404,
        f"there is no response {response_id!r} of yours here: it has not been stored, or nobody has used it for "
        "too long; send the conversation as input instead",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _referred(service: Service, item: ItemReference, place: int, request: Request) -> Message:
    """The message that an item refers to."""
    if match := _ITEM_ID.fullmatch(item.id):
        with contextlib.suppress(ApiError):
            record = _stored(service, f"resp_{match[1]}", request).record
            for known in (*record["items"], *record["answer"]["output"]):
                if known["id"] == item.id:
                    return Message(role=known["role"], content="".join(part["text"] for part in known["content"]))
    message = f"there is no item {item.id!r} of yours here: send the message itself"
    raise ApiError(404, message, param=f"input.{place}.id", code="item_not_found")


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"there is no response {response_id!r} of yours here", code="response_not_found")


def _item_id(response_id: str) -> str:
    return response_id.replace("resp_", "msg_")


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
