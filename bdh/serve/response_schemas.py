"""What requests to /v1/responses and their answers look like."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from bdh.serve.fields import WITHOUT_EFFECT
from bdh.serve.schemas import (
    Grammar,
    Json,
    MessageModel,
    Positive,
    RequestModel,
    Sampling,
    TextFormat,
    TopLogprobs,
    given,
)

OUTPUT_LOGPROBS = "message.output_text.logprobs"


class InputText(RequestModel):
    without_effect = WITHOUT_EFFECT["response part"]
    type: Literal["input_text"]
    text: str


class OutputText(RequestModel):
    """As an earlier answer had it."""

    without_effect = WITHOUT_EFFECT["response part"]
    type: Literal["output_text"]
    text: str


def _type_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message" if kind is None else ""


# The tags are in capitals, so that no error takes them for the name of a field.
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
        """As ``input_items`` lists it."""
        content: Json = {"type": "input_text", "text": self.text}
        if self.role == "assistant":
            content = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"id": item_id, "type": "message", "role": self.role, "status": "completed", "content": [content]}


class EmptyReasoning(RequestModel):
    """A reasoning item in which nothing stands: what some clients put before each answer."""

    without_effect = WITHOUT_EFFECT["response item"]
    type: Literal["reasoning"]


class ItemReference(RequestModel):
    type: Literal["item_reference"]
    id: str = Field(description="Of a message that a stored response has got or given.")


Item = Annotated[
    Annotated[Message, Tag("Message")]
    | Annotated[EmptyReasoning, Tag("EmptyReasoning")]
    | Annotated[ItemReference, Tag("ItemReference")],
    Discriminator(lambda item: _ITEMS.get(_type_of(item))),
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
            {
                "if": given("top_logprobs", type="integer", minimum=1),
                "then": given("include", type="array", contains={"const": OUTPUT_LOGPROBS}),
            }
        ]
    }
    input: (
        str
        | Annotated[
            list[Item],
            Field(
                min_length=1,
                json_schema_extra={"contains": {"properties": {"type": {"not": {"const": "reasoning"}}}}},
            ),
        ]
    ) = Field(description="A user's text, or items; with previous_response_id only the new ones.")
    instructions: str | None = Field(default=None, description="What the system says before all else, in this turn.")
    max_output_tokens: Positive | None = None
    previous_response_id: str | None = Field(default=None, description="Continue a stored response.")
    store: bool | None = Field(default=None, description="Keep the response and its state; true if not given.")
    # All but the first are of items that there are never here: asking for more of them changes nothing.
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
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None

    @property
    def items(self) -> list[tuple[int, Message | ItemReference]]:
        """What is not empty of the input, with its place there."""
        if isinstance(self.input, str):
            return [(0, Message(role="user", content=self.input))]
        return [(place, item) for place, item in enumerate(self.input) if not isinstance(item, EmptyReasoning)]

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens get log-probabilities beside the token's own; None for no log-probabilities."""
        return (self.top_logprobs or 0) if OUTPUT_LOGPROBS in (self.include or []) else None

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    def grammar(self) -> Grammar | None:
        return self.format.grammar()

    @model_validator(mode="before")
    @classmethod
    def _check_items(cls, given: Any) -> Any:
        """Names what is of another kind, where pydantic would list all kinds that there are."""
        items = given.get("input") if isinstance(given, dict) else None
        for number, item in enumerate(items if isinstance(items, list) else []):
            _check_type(f"input.{number}", item, _ITEMS)
            parts = item.get("content") if isinstance(item, dict) else None
            if _type_of(item) == "message" and isinstance(parts, list):
                for place, part in enumerate(parts):
                    _check_type(f"input.{number}.content.{place}", part, _PARTS)
        return given

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        if self.top_logprobs and self.num_logprobs is None:
            raise ValueError(f"top_logprobs: only with {OUTPUT_LOGPROBS!r} in include")
        if not self.items:
            raise ValueError("input: has no message, but only empty reasoning: there is nothing to answer")
        return self


def _check_type(place: str, value: Any, known: Mapping[str, str]) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        shown = json.dumps(kind)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{place}.type: {shown} is not supported: must be {' or '.join(known)}")


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseAnswer(BaseModel):
    """A response as it is given and kept. What is always the same here is there for clients that look for it."""

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
