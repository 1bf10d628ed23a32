"""The routes of /v1/responses: conversations that the server stores, as their text and, if it fits, their state."""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Query
from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from starlette.requests import Request
from starlette.responses import Response

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion
from bdh.generate.snapshot import Snapshot
from bdh.serve.answers import ResponseAnswer, ResponseWriter, item_id
from bdh.serve.completions import STREAMS, TextGeneration, notes_with_reply
from bdh.serve.middleware import ApiError, errors_of, log
from bdh.serve.schemas import (
    NOT_NULL,
    NULL,
    WITHOUT_EFFECT,
    FormatType,
    Json,
    JsonSchema,
    MessageModel,
    Positive,
    RequestModel,
    Sampling,
    TopLogprobs,
    form,
    given,
    grammar_of,
    optional,
    when,
)
from bdh.serve.service import Loaded, PromptRequest, Service
from bdh.serve.states import SavedState
from bdh.serve.text import Message as PlainMessage

_ITEM_ID = re.compile(r"msg_([0-9a-f]{32})(_\d+)?")
OUTPUT_LOGPROBS = "message.output_text.logprobs"


class TextFormat(JsonSchema):
    """The format of a response's text. Unlike in response_format, the schema is a field beside the type."""

    conditions: ClassVar[Json] = {
        "oneOf": [
            form({"enum": ["text", "json_object", None]}, schema=NULL, pattern=NULL),
            form({"const": "json_schema"}, pattern=NULL),
            form({"const": "regex"}, schema=NULL, pattern=NOT_NULL),
        ]
    }
    type: FormatType | None = optional("null means text.")
    pattern: str | None = optional("Required with the type regex, and allowed only then. Must match the whole text.")

    def faults(self) -> Iterator[str]:
        if self.schema_ is not None and self.type != "json_schema":
            yield "schema: must be given with the type json_schema only"
        if (self.pattern is not None) != (self.type == "regex"):
            yield "pattern: must be given with the type regex, and with no other"


class InputText(RequestModel):
    without_effect = WITHOUT_EFFECT["response part"]
    type: Literal["input_text"]
    text: str


class OutputText(RequestModel):
    """A text from an earlier answer."""

    without_effect = WITHOUT_EFFECT["response part"]
    type: Literal["output_text"]
    text: str


def _type_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message" if kind is None else ""


# The tags are capitalized, so that errors do not confuse them with names of fields.
_PARTS = {"input_text": "InputText", "output_text": "OutputText"}
_ITEMS = {"message": "Message", "reasoning": "EmptyReasoning", "item_reference": "ItemReference"}
Part = Annotated[
    Annotated[InputText, Tag("InputText")] | Annotated[OutputText, Tag("OutputText")],
    Discriminator(lambda part: _PARTS.get(_type_of(part))),
]


class Message(MessageModel):
    without_effect = WITHOUT_EFFECT["response item"]
    type: Literal["message"] | None = None
    content: str | list[Part]

    def item(self, item_id: str) -> Json:
        """Returns the message as ``input_items`` lists it."""
        content: Json = {"type": "input_text", "text": self.text}
        if self.role == "assistant":
            content = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"id": item_id, "type": "message", "role": self.role, "status": "completed", "content": [content]}


class EmptyReasoning(RequestModel):
    """An empty reasoning item, which some clients send before each answer."""

    without_effect = WITHOUT_EFFECT["response item"]
    type: Literal["reasoning"]


class ItemReference(RequestModel):
    type: Literal["item_reference"]
    id: str = Field(description="Id of a message in the input or output of a stored response.")


Item = Annotated[
    Annotated[Message, Tag("Message")]
    | Annotated[EmptyReasoning, Tag("EmptyReasoning")]
    | Annotated[ItemReference, Tag("ItemReference")],
    Discriminator(lambda item: _ITEMS.get(_type_of(item))),
]


_NOT_ALL_EMPTY: Json = {"contains": {"properties": {"type": {"not": {"const": "reasoning"}}}}}
Items = Annotated[list[Item], Field(min_length=1, json_schema_extra=_NOT_ALL_EMPTY)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class TextOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["response text"]
    format: TextFormat | None = None


class ReasoningOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["response reasoning"]


class ResponseStreamOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["response stream_options"]


class ResponseRequest(Sampling):
    without_effect = WITHOUT_EFFECT["response"]
    conditions: ClassVar[Json] = {
        "allOf": [
            when(
                given("top_logprobs", type="integer", minimum=1),
                given("include", type="array", contains={"const": OUTPUT_LOGPROBS}),
            )
        ]
    }
    input: str | Items = Field(description="A user's text, or items. With previous_response_id, only the new ones.")
    instructions: str | None = optional("System message before everything else, for this response only.")
    max_output_tokens: Positive | None = None
    previous_response_id: str | None = optional("Continue a stored response.")
    store: bool | None = optional("Store the response and its state. Defaults to true.")
    # All but the first are about items that this server never returns, so they add nothing.
    include: (
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "message.input_image.image_url",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None
    ) = None
    top_logprobs: TopLogprobs | None = None
    metadata: Metadata | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def items(self) -> list[tuple[int, Message | ItemReference]]:
        """The items of the input that are not empty, with their index in the input."""
        if isinstance(self.input, str):
            return [(0, Message(role="user", content=self.input))]
        return [(place, item) for place, item in enumerate(self.input) if not isinstance(item, EmptyReasoning)]

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to list with log-probabilities; None for no log-probabilities."""
        return (self.top_logprobs or 0) if OUTPUT_LOGPROBS in (self.include or []) else None

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    def params(self, *arguments: Any, **options: Any) -> SamplingParams:
        grammar = grammar_of(self.format.type, self.format.schema_, self.format.pattern)
        return replace(super().params(*arguments, **options), logprobs=self.num_logprobs, grammar=grammar)

    @model_validator(mode="before")
    @classmethod
    def _check_items(cls, given: Any) -> Any:
        """Reports an unknown type by its value. Pydantic would list all known types instead."""
        items = given.get("input") if isinstance(given, dict) else None
        for number, item in enumerate(items if isinstance(items, list) else []):
            _check_type(f"input.{number}", item, _ITEMS)
            parts = item.get("content") if isinstance(item, dict) else None
            if _type_of(item) == "message" and isinstance(parts, list):
                for place, part in enumerate(parts):
                    _check_type(f"input.{number}.content.{place}", part, _PARTS)
        return given

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.top_logprobs and self.num_logprobs is None:
            yield f"top_logprobs: only with {OUTPUT_LOGPROBS!r} in include"
        if not self.items:
            yield "input: has no message, but only empty reasoning: there is nothing to answer"


def _check_type(place: str, value: Any, known: Mapping[str, str]) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        shown = json.dumps(kind)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{place}.type: {shown} is not supported: must be {' or '.join(known)}")


class InputItems(BaseModel):
    object: Literal["list"] = "list"
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ResponseGeneration(TextGeneration):
    """Generates a response, which is stored when it has ended.

    Args:
        items: the items of the input, as ``input_items`` lists them.
        messages: the conversation that is answered, without the instructions.
    """

    writer: ResponseWriter
    format_param, names_states = "text.format", False

    def __init__(self, *arguments: Any, items: list[Json], messages: list[PlainMessage]):
        super().__init__(*arguments)
        self._input_items, self._messages = items, messages

    async def finished(self, completion: Completion) -> None:
        writer, snapshot = self.writer, completion.snapshot
        if not writer.response.store:
            return
        reply = str(writer.all_texts[0])
        of_input = {"kind": "chat", "messages": self._messages}
        of_answer = notes_with_reply(of_input, reply, completion)
        record = {
            "answer": writer.answer(),
            "items": self._input_items,
            "messages": of_answer["messages"],
            "stopped_by": of_answer["stopped_by"],
        }
        if snapshot is None:
            log("a response is stored without its state", level=logging.WARNING, reason=completion.snapshot_error)
        else:
            snapshot = replace(snapshot, notes=notes_with_reply(self.prompts[0].notes, reply, completion))
        put, owner = self.loaded.states.put_response, self.caller.id
        if not await asyncio.to_thread(put, writer.id, record, snapshot, owner=owner, model=writer.model):
            writer.response.store = False


def add_responses(app: FastAPI, service: Service) -> None:
    """Adds the routes of /v1/responses."""
    new: Json = {"responses": {**errors_of(401, 404, 429, 503), **STREAMS}, "tags": ["responses"]}
    stored: Json = {"responses": errors_of(401, 404, 503), "tags": ["responses"]}

    @app.post("/v1/responses", response_model=ResponseAnswer, **new)
    async def create(body: ResponseRequest, request: Request) -> Response:
        """Replies to a conversation, and stores the response by default."""
        return await (await _response(service, body, request)).respond()

    @app.get("/v1/responses/{response_id}", **stored)
    async def response(response_id: str, request: Request, stream: Literal["false"] = "false") -> ResponseAnswer:
        """Returns a stored response."""
        return ResponseAnswer(**_stored(service, response_id, request).record["answer"])

    @app.delete("/v1/responses/{response_id}", **stored)
    async def delete_response(response_id: str, request: Request) -> ResponseDeleted:
        """Deletes a stored response and its state."""
        _stored(service, response_id, request)
        try:
            await asyncio.to_thread(service.ready().states.delete, response_id, request.state.caller.id)
        except KeyError:  # deleted meanwhile by another request
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
        """Lists the messages in the input of a stored response."""
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
    model = service.begin(body, request)
    loaded = service.ready()
    max_tokens = service.max_tokens(body.max_output_tokens, service.settings.limits.chat_tokens, "max_output_tokens")
    params = body.params(max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
    previous = None
    if body.previous_response_id is not None:
        previous = _stored(service, body.previous_response_id, request, is_previous=True)
    response_id = f"resp_{secrets.token_hex(16)}"
    messages, items = [], []
    for place, item in body.items:
        message = _referred(service, item, place, request) if isinstance(item, ItemReference) else item
        messages.append(message.plain())
        items.append(message.item(f"{item_id(response_id)}_{place}"))
    text_format = {"type": "text", **body.format.model_dump(by_alias=True, exclude_none=True)}
    answer = ResponseAnswer(
        id=response_id,
        created_at=int(time.time()),
        model=model,
        store=body.store is not False,
        temperature=params.temperature,
        top_p=params.top_p,
        metadata=body.metadata or {},
        top_logprobs=body.top_logprobs or 0,
        text={"format": text_format, "verbosity": "medium"},
        **body.model_dump(include={"instructions", "previous_response_id", "max_output_tokens", "user"}),
    )
    prompt = await _prompt(loaded, previous, messages, body.instructions or None)
    prompt.params, prompt.keep_snapshot = params, answer.store
    before = [] if previous is None else previous.record["messages"]
    writer = ResponseWriter(prompt, loaded.names, answer, loaded.chat.reply)
    return ResponseGeneration(service, [prompt], request, writer, body, items=items, messages=[*before, *messages])


async def _prompt(
    loaded: Loaded, previous: SavedState | None, messages: list[PlainMessage], instructions: str | None
) -> PromptRequest:
    """Returns the prompt of a response.

    If the state of the previous response is stored and has read the same instructions, the prompt continues it with the
    new messages only. Otherwise the prompt is the whole conversation.

    Raises:
        ApiError: 400 if there is no chat template, or if it refuses the conversation.
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
    return PromptRequest(tokens, snapshot=snapshot, param="input", notes=notes)


async def _state_of(loaded: Loaded, saved: SavedState) -> Snapshot | None:
    """Returns None if the state was dropped, or belongs to another model, tokenizer or engine setting."""
    try:
        found = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
    except KeyError:
        return None
    except ValueError as error:
        log("the conversation of a response is read again", reason=str(error))
        return None
    return found if found.state.pattern == loaded.engine.engine.advancer.pattern else None


def _stored(service: Service, response_id: str, request: Request, *, is_previous: bool = False) -> SavedState:
    """Returns a response that is stored for this caller.

    Raises:
        ApiError: 404 if there is none.
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
        f"you have no response {response_id!r} on this server: it was not stored, or it was removed after a "
        "long time without use; send the conversation as input instead",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _referred(service: Service, item: ItemReference, place: int, request: Request) -> Message:
    """Returns the message that an item refers to."""
    if match := _ITEM_ID.fullmatch(item.id):
        with contextlib.suppress(ApiError):
            record = _stored(service, f"resp_{match[1]}", request).record
            for known in (*record["items"], *record["answer"]["output"]):
                if known["id"] == item.id:
                    return Message(role=known["role"], content="".join(part["text"] for part in known["content"]))
    message = f"you have no item {item.id!r} on this server: send the message itself"
    raise ApiError(404, message, param=f"input.{place}.id", code="item_not_found")


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"you have no response {response_id!r} on this server", code="response_not_found")
