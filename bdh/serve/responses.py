"""/v1/responses: conversations that the server keeps, each as its text and, where there is room, as its state."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bdh.generate.params import SamplingParams
from bdh.generate.sequence import Completion
from bdh.generate.snapshot import Snapshot
from bdh.serve.answers import ChatWriter, Json
from bdh.serve.errors import ApiError
from bdh.serve.events import event
from bdh.serve.formats import TextFormat
from bdh.serve.handling import Asked, Handler, caller_of
from bdh.serve.keys import Caller
from bdh.serve.logs import log
from bdh.serve.prompts import Message as PlainMessage
from bdh.serve.response_schemas import (
    InputItems,
    ItemReference,
    Message,
    ResponseAnswer,
    ResponseRequest,
    ResponseUsage,
)
from bdh.serve.schemas import Extras
from bdh.serve.service import Event, Generation, Job, Loaded
from bdh.serve.states import SavedState

_ITEM_ID = re.compile(r"msg_([0-9a-f]{32})(_\d+)?")
_NO_EXTRAS = Extras()


class ResponseWriter(ChatWriter):
    """The one text of a response, as an answer or as the events of its stream.

    Args:
        answer: the response as it is known before its text.
        items: of the input, as ``input_items`` lists them.
        messages: the conversation that is answered, without the instructions.
    """

    def __init__(
        self, job: Job, loaded: Loaded, answer: ResponseAnswer, items: list[Json], messages: list[PlainMessage]
    ):
        super().__init__([job], loaded.names, answer.model, job.params.logprobs, 1, loaded.chat.reply)
        self.id = answer.id
        self.items, self.messages = items, messages
        self._answer, self._number = answer, 0
        self._item_id = answer.id.replace("resp_", "msg_")

    def opening(self) -> list[bytes]:
        item = self._item("in_progress", [])
        return [
            self._event("created", response=self.facts()),
            self._event("in_progress", response=self.facts()),
            self._event("output_item.added", output_index=0, item=item),
            self._part_event("content_part.added", part=_part("", [])),
        ]

    def pieces(self, come: Event) -> list[bytes]:
        piece = self.take(come)
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
        (text,) = self.texts
        entries = list(zip(text.tokens, text.logprobs, strict=True))
        logprobs = [] if self._num_top is None else self._logprobs(text, entries)["content"]
        answer.output = [self._item(answer.status, [_part("".join(text.parts), logprobs)])]
        answer.usage = self._response_usage(completion)
        return self.facts()

    def facts(self) -> Json:
        return self._answer.model_dump(mode="json")

    def record(self) -> Json:
        """What is kept of it, once it has ended."""
        reason = self._completion.stop_reason
        (text,) = self.texts
        return {
            "answer": self.answer(),
            "items": self.items,
            "messages": [*self.messages, {"role": "assistant", "content": "".join(text.parts)}],
            "stopped_by": reason if isinstance(reason, str) else None,
        }

    @property
    def is_stored(self) -> bool:
        return self._answer.store

    def not_stored(self) -> None:
        self._answer.store = False

    @property
    def _completion(self) -> Completion:
        (text,) = self.texts
        assert text.completion is not None
        return text.completion

    def _response_usage(self, completion: Completion) -> ResponseUsage:
        """All that the state has read counts as input; what it had read before this request, as cached."""
        (job,) = self._jobs
        known = completion.num_cached_tokens if job.snapshot is None else job.snapshot.state.position
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
        return event({"type": name, "sequence_number": self._number - 1, **facts}, name)

    def _part_event(self, name: str, **facts: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **facts)

    def _chunk_choice(self, index: int, text: str, logprobs: Json | None, completion: Completion | None) -> Json:
        return {"text": text, "logprobs": [] if logprobs is None else logprobs["content"]}


@dataclass(frozen=True)
class KeptResponse:
    saved: SavedState
    record: Json
    """As :meth:`ResponseWriter.record` made it."""


class Responses(Handler):
    format_field = "text.format"

    async def create(self, body: ResponseRequest, request: Request) -> Response:
        model = self._begin(body, request)
        return await self._answer(await self._understood(body, model, caller_of(request)), request)

    def get(self, response_id: str, caller: Caller) -> Json:
        """
        Raises:
            ApiError: 404, there is no such response of this caller.
        """
        return self._record(response_id, caller)["answer"]

    def input_items(
        self, response_id: str, caller: Caller, *, after: str | None, limit: int, is_ascending: bool
    ) -> InputItems:
        """
        Raises:
            ApiError: as :meth:`get`; 404, there is no item ``after``.
        """
        items = self._record(response_id, caller)["items"]
        if not is_ascending:
            items = items[::-1]
        if after is not None:
            places = [place for place, item in enumerate(items) if item["id"] == after]
            if not places:
                raise ApiError(404, f"{response_id} has no item {after!r}", param="after", code="item_not_found")
            items = items[places[0] + 1 :]
        page = items[:limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return InputItems(data=page, first_id=first, last_id=last, has_more=len(page) < len(items))

    async def delete(self, response_id: str, caller: Caller) -> None:
        """
        Raises:
            ApiError: as :meth:`get`.
        """
        self._record(response_id, caller)
        try:
            await asyncio.to_thread(self._service.ready().states.delete, response_id, caller.id)
        except KeyError:  # by another request, meanwhile
            raise _not_found(response_id) from None

    async def _understood(self, body: ResponseRequest, model: str, caller: Caller) -> Asked:
        loaded = self._service.ready()
        name = "max_output_tokens"
        max_tokens = self._max_tokens(body.max_output_tokens, self._service.settings.limits.chat_tokens, name)
        params = body.params(max_tokens=max_tokens, stops=loaded.chat.stops, stop_token_ids=loaded.chat.end_ids)
        params.logprobs = body.num_logprobs
        await self._compile(params)
        text_format = TextFormat() if body.text is None or body.text.format is None else body.text.format
        previous = None
        if body.previous_response_id is not None:
            previous = self._previous(body.previous_response_id, caller)
        response_id = f"resp_{secrets.token_hex(16)}"
        messages, items = [], []
        for place, item in body.items:
            message = self._referred(item, place, caller) if isinstance(item, ItemReference) else item
            messages.append(message.plain())
            items.append(message.item(f"{response_id.replace('resp_', 'msg_')}_{place}"))
        answer = ResponseAnswer(
            id=response_id,
            created_at=int(time.time()),
            model=model,
            store=body.store is not False,
            temperature=params.temperature,
            top_p=params.top_p,
            metadata=body.metadata or {},
            top_logprobs=body.top_logprobs or 0,
            text={"format": text_format.shown(), "verbosity": "medium"},
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            max_output_tokens=body.max_output_tokens,
            user=body.user,
        )
        before = [] if previous is None else previous.record["messages"]
        job = await self._job(before, messages, body.instructions or None, previous, loaded)
        job.params, job.keep_snapshot = params, answer.store
        writer = ResponseWriter(job, loaded, answer, items, [*before, *messages])
        return self._asked(body.is_stream, [job], writer, model, _NO_EXTRAS)

    async def _job(
        self,
        before: list[PlainMessage],
        messages: list[PlainMessage],
        instructions: str | None,
        previous: KeptResponse | None,
        loaded: Loaded,
    ) -> Job:
        """What is to be read: with the state of the previous response, where that has been kept and has read the same
        instructions, only what is new; else the conversation from its beginning.

        Raises:
            ApiError: 400, there is no chat template, or it refuses the conversation.
        """
        system = [] if instructions is None else [{"role": "system", "content": instructions}]
        notes = {"kind": "chat", "messages": [*system, *before, *messages]}
        snapshot = None
        if (
            previous is not None
            and loaded.chat.can_go_on
            and (previous.record["answer"]["instructions"] or None) == instructions
        ):
            snapshot = await self._state_of(previous.saved, loaded)
        try:
            if previous is not None and snapshot is not None:
                stopped_by = previous.record["stopped_by"]
                tokens = await loaded.in_text_thread(loaded.chat.further, [*system, *before], messages, stopped_by)
            else:
                snapshot = None
                tokens = await loaded.in_text_thread(loaded.chat.encode, notes["messages"])
        except ApiError as error:
            error.param = "input" if error.param == "messages" else error.param
            raise
        return Job(tokens, SamplingParams(), snapshot, notes=notes, param="input")

    async def _state_of(self, saved: SavedState, loaded: Loaded) -> Snapshot | None:
        """None where it has been given up, or is of another model or tokenizer, or of other settings of the engine."""
        try:
            found = await asyncio.to_thread(loaded.states.snapshot, saved.id, saved.owner)
        except KeyError:
            return None
        except ValueError as error:
            log("the conversation of a response is read again", reason=str(error))
            return None
        return found if found.state.pattern == loaded.front.engine.stepper.pattern else None

    async def _take(self, asked: Asked, generation: Generation, item: Event) -> list[bytes]:
        told = await super()._take(asked, generation, item)
        completion, writer = item.output.completion, asked.writer
        assert isinstance(writer, ResponseWriter)
        if completion is not None and completion.finish_reason in ("stop", "length") and writer.is_stored:
            await self._store(writer, completion, asked.jobs[0], generation.caller)
        return told

    async def _store(self, writer: ResponseWriter, completion: Completion, job: Job, caller: Caller) -> None:
        record, snapshot = writer.record(), completion.snapshot
        if snapshot is None:
            log("a response is stored without its state", level=logging.WARNING, reason=completion.snapshot_error)
        else:
            messages = [*job.notes["messages"], record["messages"][-1]]
            notes = {**job.notes, "messages": messages, "stopped_by": record["stopped_by"]}
            snapshot = replace(snapshot, notes=notes)
        states = self._service.loaded.states  # type: ignore[union-attr]
        if not await asyncio.to_thread(
            states.put_response, writer.id, record, snapshot, owner=caller.id, model=record["answer"]["model"]
        ):
            writer.not_stored()

    def _kept(self, response_id: str, caller: Caller) -> KeptResponse:
        """
        Raises:
            KeyError: there is no such response of this caller.
        """
        saved = self._service.ready().states.get(response_id, caller.id)
        if saved.response is None:
            raise KeyError(response_id)
        return KeptResponse(saved, saved.response)

    def _record(self, response_id: str, caller: Caller) -> Json:
        try:
            return self._kept(response_id, caller).record
        except KeyError:
            raise _not_found(response_id) from None

    def _previous(self, response_id: str, caller: Caller) -> KeptResponse:
        try:
            return self._kept(response_id, caller)
        except KeyError:
            raise ApiError(
                404,
                f"there is no response {response_id!r} of yours here: it has not been stored, or nobody has used it for "
                "too long; send the conversation as input instead",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from None

    def _referred(self, item: ItemReference, place: int, caller: Caller) -> Message:
        """The message that an item refers to."""
        if match := _ITEM_ID.fullmatch(item.id):
            with contextlib.suppress(KeyError):
                record = self._kept(f"resp_{match[1]}", caller).record
                for known in (*record["items"], *record["answer"]["output"]):
                    if known["id"] == item.id:
                        return Message(role=known["role"], content="".join(part["text"] for part in known["content"]))
        raise ApiError(
            404,
            f"there is no item {item.id!r} of yours here: send the message itself",
            param=f"input.{place}.id",
            code="item_not_found",
        )


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"there is no response {response_id!r} of yours here", code="response_not_found")


def _part(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
