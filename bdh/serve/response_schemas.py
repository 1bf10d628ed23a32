"""What requests to /v1/responses and their answers look like."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import core_schema

from bdh.serve.schemas import Positive, Sampling, _is_text, _Request, _whole

OUTPUT_LOGPROBS = "message.output_text.logprobs"
Includable = Literal[
    "message.output_text.logprobs",
    # Of items that there are never here: asking for more of them changes nothing.
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class Only:
    """Marks a field that may be given in the forms that ask for nothing: null, or one of these values.

    Another value is refused by the field's name.
    """

    def __init__(self, *allowed: Any):
        self._allowed = (None, *allowed)

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        if any(type(value) is type(each) and value == each for each in self._allowed):
            return value
        named = "".join(f", or {json.dumps(each)}" for each in self._allowed[1:])
        raise ValueError(f"{info.field_name}: {_short(value)} is not supported: must be left out{named}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, core_schema.any_schema())

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"enum": list(self._allowed)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class InputText(_Request):
    type: Literal["input_text"]
    text: str


class OutputText(_Request):
    """As an earlier answer had it."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[Any, Only([])] = None
    logprobs: list[Any] | None = Field(default=None, description="Of an earlier answer; not read.")


_PARTS = {"input_text": "InputText", "output_text": "OutputText"}
# The tags are in capitals, so that no error takes them for the name of a field.
Part = Annotated[
    Annotated[InputText, Tag("InputText")] | Annotated[OutputText, Tag("OutputText")],
    Discriminator(lambda part: _PARTS.get(_type_of(part))),
]


class Message(_Request):
    id: str | None = None
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Annotated[Any, Only("final_answer")] = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}

    def item(self, item_id: str) -> dict[str, Any]:
        """As ``input_items`` lists it."""
        content: dict[str, Any] = {"type": "input_text", "text": self.text}
        if self.role == "assistant":
            content = {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}
        return {"id": item_id, "type": "message", "role": self.role, "status": "completed", "content": [content]}


class EmptyReasoning(_Request):
    """A reasoning item in which nothing stands: what some clients put before each answer."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[Any, Only([])] = None
    content: Annotated[Any, Only([])] = None
    encrypted_content: Annotated[Any, Only("")] = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class ItemReference(_Request):
    type: Literal["item_reference"]
    id: str = Field(description="Of a message that a stored response has got or given.")


def _type_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message" if kind is None else ""


_ITEMS = {"message": "Message", "reasoning": "EmptyReasoning", "item_reference": "ItemReference"}
Item = Annotated[
    Annotated[Message, Tag("Message")]
    | Annotated[EmptyReasoning, Tag("EmptyReasoning")]
    | Annotated[ItemReference, Tag("ItemReference")],
    Discriminator(lambda item: _ITEMS.get(_type_of(item))),
]


class TextFormat(_Request):
    type: Literal["text"]


class TextOptions(_Request):
    format: TextFormat | None = None
    verbosity: Annotated[Any, Only("medium")] = None


class ReasoningOptions(_Request):
    effort: Annotated[Any, Only("none")] = None
    summary: Annotated[Any, Only()] = None
    generate_summary: Annotated[Any, Only()] = None


class ResponseStreamOptions(_Request):
    include_obfuscation: bool | None = Field(default=None, description="Nothing is ever padded here.")


def _check_metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    for key, text in (value or {}).items():
        if not (_is_text(key) and _is_text(text)):
            raise ValueError("metadata: has half of a surrogate pair, which is no text")
    return value


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    AfterValidator(_check_metadata),
]


_NOT_REASONING = {"properties": {"type": {"not": {"const": "reasoning"}}}}


class ResponseRequest(Sampling):
    input: str | Annotated[list[Item], Field(min_length=1, json_schema_extra={"contains": _NOT_REASONING})] = Field(
        description="A user's text, or items; with previous_response_id only the new ones."
    )
    instructions: str | None = Field(default=None, description="What the system says before all else, in this turn.")
    max_output_tokens: Positive | None = None
    previous_response_id: str | None = Field(default=None, description="Go on from a stored response.")
    store: bool | None = Field(default=None, description="Keep the response and its state; true if not given.")
    include: list[Includable] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(_whole)] | None = None
    metadata: Metadata | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Positive | None = None
    prompt_cache_key: str | None = Field(default=None, description="Beginnings that prompts share are always known.")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    truncation: Annotated[Any, Only("disabled")] = None
    background: Annotated[Any, Only(False)] = None
    service_tier: Annotated[Any, Only("auto", "default")] = None
    context_management: Annotated[Any, Only([])] = None
    conversation: Annotated[Any, Only()] = None
    prompt: Annotated[Any, Only()] = None
    moderation: Annotated[Any, Only()] = None

    @property
    def items(self) -> list[Message | ItemReference]:
        """What is not empty of the input."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return [item for item in self.input if not isinstance(item, EmptyReasoning)]

    @property
    def num_logprobs(self) -> int | None:
        """Of how many of the likeliest tokens log-probabilities are wanted beside the token's own; None for none."""
        return (self.top_logprobs or 0) if OUTPUT_LOGPROBS in (self.include or []) else None

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
        text = given.get("text") if isinstance(given, dict) else None
        if isinstance(text, dict) and isinstance(text.get("format"), dict):
            _check_type("text.format", text["format"], {"text": "TextFormat"})
        return given

    @model_validator(mode="after")
    def _check_response(self) -> Self:
        if self.stream_options is not None and not self.is_stream:
            raise ValueError("stream_options: only with stream")
        if self.top_logprobs and self.num_logprobs is None:
            raise ValueError(f"top_logprobs: only with {OUTPUT_LOGPROBS!r} in include")
        if not self.items:
            raise ValueError("input: has no message, but only empty reasoning: there is nothing to answer")
        return self


def _check_type(place: str, value: Any, known: dict[str, str]) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        raise ValueError(f"{place}.type: {_short(kind)} is not supported: must be {' or '.join(known)}")


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
    output: list[dict[str, Any]] = []
    usage: ResponseUsage | None = None
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool
    metadata: dict[str, str] = {}
    max_output_tokens: int | None = None
    temperature: float
    top_p: float
    top_logprobs: int = 0
    text: dict[str, Any] = {"format": {"type": "text"}, "verbosity": "medium"}
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    tools: list[Any] = []
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    truncation: str = "disabled"
    background: bool = False
    service_tier: str = "default"
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class InputItems(BaseModel):
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
