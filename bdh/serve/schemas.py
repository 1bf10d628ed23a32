"""What requests look like. A field that is not here is refused, unless it asks for nothing."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bdh.generate.advance import MOST_NEURONS
from bdh.generate.params import SamplingParams
from bdh.serve.fields import NOTHING_SCHEMA, WITHOUT_EFFECT, NoEffect, asks_nothing

Json = dict[str, Any]
Grammar = dict[str, Any]


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_WHOLE = BeforeValidator(_as_whole)
"""2.0 is a whole number, as in JSON Schema."""
MOST_WHOLE = 2**31 - 1
_MOST_SEED = 9_223_372_036_854_776_000  # 2**63, as descriptions of APIs have it, whose numbers are float64
Whole = Annotated[int, Field(ge=0, le=MOST_WHOLE), AS_WHOLE]
Positive = Annotated[int, Field(ge=1, le=MOST_WHOLE), AS_WHOLE]
TopLogprobs = Annotated[int, Field(ge=0, le=20), AS_WHOLE]
Text = Annotated[str, Field(min_length=1)]
Prompt = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[Whole], Field(min_length=1)]
    | Annotated[list[Annotated[list[Whole], Field(min_length=1)]], Field(min_length=1)]
)


def _describe(schema: Json, model: "type[RequestModel]") -> None:
    """Says in the model's JSON schema what it accepts besides its fields, and which fields go together."""
    without_effect = {name: field.schema for name, field in model.without_effect.items()}
    schema["properties"] = {**without_effect, **schema["properties"]}
    schema["additionalProperties"] = NOTHING_SCHEMA
    schema |= model.conditions


class RequestModel(BaseModel):
    """An object of a request. Nothing in it is converted or left out silently: what is no field of it is refused, unless
    it asks for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)
    without_effect: ClassVar[Mapping[str, NoEffect]] = {}
    """Fields that it does not have, with the values by which they are accepted."""
    conditions: ClassVar[Json] = {}
    """JSON Schema of what its validators check."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept, fields = {}, {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in given.items():
            for text in (value, *value) if isinstance(value, list) else (value, name):
                if isinstance(text, str) and not _is_text(text):
                    where = name if _is_text(name) else ""
                    raise ValueError(f"{where}: has half of a surrogate pair, which is no text")
            if name not in fields:
                effect = cls.without_effect.get(name)
                if asks_nothing(value) if effect is None else effect.accepts(value):
                    continue
            kept[name] = value
        return kept


def _is_text(value: str) -> bool:
    """False for what JSON can spell, and is no text: half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def given(name: str, **schema: Any) -> Json:
    return {"required": [name], "properties": {name: schema}}


def _only(name: str, schema: Json, *absent: str) -> Json:
    """This field, and none of those."""
    nothing = {"enum": [None, False]}
    return {"required": [name], "properties": {name: schema, **dict.fromkeys(absent, nothing)}}


def _texts(given: Any) -> list[str | list[int]]:
    """The texts of a :data:`Prompt`."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(default=None, alias="schema", description="None for any object.")
    strict: bool | None = Field(default=None, description="The schema is held exactly, whatever this says.")


_FormatType = Literal["text", "json_object", "json_schema", "regex"]
_NULL: Json = {"type": "null"}
_NOT_NULL: Json = {"not": _NULL}


def _grammar(kind: str | None, schema: Json | None, pattern: str | None) -> Grammar | None:
    """``SamplingParams.grammar`` for a format of this type."""
    if kind in (None, "text"):
        return None
    return {"regex": pattern} if kind == "regex" else {"json_schema": {"type": "object"} if schema is None else schema}


class ResponseFormat(RequestModel):
    conditions = {
        "oneOf": [
            {"properties": {"type": {"enum": ["text", None]}, "json_schema": _NULL, "pattern": _NULL}},
            {
                "required": ["type"],
                "properties": {"type": {"const": "json_object"}, "json_schema": _NULL, "pattern": _NULL},
            },
            {
                "required": ["type", "json_schema"],
                "properties": {"type": {"const": "json_schema"}, "json_schema": _NOT_NULL, "pattern": _NULL},
            },
            {
                "required": ["type", "pattern"],
                "properties": {"type": {"const": "regex"}, "json_schema": _NULL, "pattern": _NOT_NULL},
            },
        ]
    }
    type: _FormatType | None = Field(default=None, description="None for text.")
    json_schema: JsonSchema | None = Field(default=None, description="With the type json_schema.")
    pattern: str | None = Field(default=None, description="With the type regex, of the whole text.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, kind in (("json_schema", "json_schema"), ("pattern", "regex")):
            if (getattr(self, name) is not None) != (self.type == kind):
                raise ValueError(f"{name}: must be given with the type {kind}, and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """The form that the text must have, for ``SamplingParams``; None for any."""
        return _grammar(self.type, None if self.json_schema is None else self.json_schema.schema_, self.pattern)


class TextFormat(JsonSchema):
    """The same of ``text.format`` in a request to /v1/responses, where the schema stands beside the type."""

    conditions = {
        "oneOf": [
            {"properties": {"type": {"enum": ["text", "json_object", None]}, "schema": _NULL, "pattern": _NULL}},
            {"required": ["type"], "properties": {"type": {"const": "json_schema"}, "pattern": _NULL}},
            {
                "required": ["type", "pattern"],
                "properties": {"type": {"const": "regex"}, "schema": _NULL, "pattern": _NOT_NULL},
            },
        ]
    }
    type: _FormatType | None = Field(default=None, description="None for text.")
    pattern: str | None = Field(default=None, description="With the type regex, of the whole text.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.schema_ is not None and self.type != "json_schema":
            raise ValueError("schema: must be given with the type json_schema only")
        if (self.pattern is not None) != (self.type == "regex"):
            raise ValueError("pattern: must be given with the type regex, and with no other")
        return self

    def grammar(self) -> Grammar | None:
        """The form that the text must have, for ``SamplingParams``; None for any."""
        return _grammar(self.type, self.schema_, self.pattern)

    def shown(self) -> Json:
        """As an answer repeats it."""
        return {"type": "text", **self.model_dump(by_alias=True, exclude_none=True)}


class StreamOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["stream_options"]
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far in each chunk.")

    @property
    def are_needed(self) -> bool:
        """Whether they ask for anything."""
        return bool(self.include_usage or self.continuous_usage_stats)


class Extras(RequestModel):
    """What only a model with a state of fixed size can do."""

    save_state: bool | None = Field(default=None, description="Keep the state after the text; the answer has its id.")
    from_state: str | None = Field(default=None, description="Continue from a saved state, without reading it again.")
    activations: Annotated[int, Field(ge=0, le=MOST_NEURONS), AS_WHOLE] | None = Field(
        default=None,
        description="With each streamed token the share of neurons that fired in each layer step, and so many of the "
        "strongest.",
    )


class Sampling(RequestModel):
    """What all requests for texts have."""

    model: str | None = Field(default=None, description="A name that the server has; null, or empty, for its first.")
    temperature: float | None = Field(
        default=None, ge=0, le=100, description="0 takes the likeliest token; else at least 1e-6."
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 takes the likeliest token.")
    top_k: Annotated[int, Field(ge=-1, le=MOST_WHOLE), AS_WHOLE] | None = Field(
        default=None, description="0 or -1 for all tokens."
    )
    min_p: float | None = Field(default=None, ge=0, lt=1)
    stop: str | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: list[Whole] | None = Field(default=None, max_length=64)
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED), AS_WHOLE] | None = None
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    repetition_penalty: float | None = Field(default=None, ge=1e-6, le=100)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = Field(default=None, description="For the log.")

    def params(
        self, max_tokens: int, *, stops: Sequence[str] = (), stop_token_ids: Sequence[int] = ()
    ) -> SamplingParams:
        """How the engine samples, but for what only one kind of request has."""
        names = ("temperature", "top_p", "min_p", "n", "seed", "ignore_eos")
        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        values = {name: getattr(self, name, None) for name in (*names, *penalties)}
        given: Json = {name: value for name, value in values.items() if value is not None}
        if given.get("seed", 0) < -(2**63):
            given["seed"] %= 2**64  # the few beyond what PyTorch takes
        if self.top_p == 0:  # no tokens but the likeliest
            given |= {"temperature": 0.0, "top_p": 1.0}
        stop = [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or [])
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            top_k=max(0, self.top_k or 0),
            stop=[*stop, *stops],
            stop_token_ids=[*(self.stop_token_ids or []), *stop_token_ids],
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            grammar=self.grammar(),
        )

    def grammar(self) -> Grammar | None:
        """The form that the text must have, for ``SamplingParams``; None for any."""
        return None

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < 1e-6:
            raise ValueError("temperature: must be 0, or at least 1e-6")
        if self.logit_bias is not None and len(set(map(int, self.logit_bias))) < len(self.logit_bias):
            raise ValueError("logit_bias: has a token twice, with and without leading zeros")
        return self


_STREAMS = given("stream", const=True)
_ONLY_STREAMED = [
    {"if": given("stream_options", **given("include_usage", const=True)), "then": _STREAMS},
    {"if": given("stream_options", **given("continuous_usage_stats", const=True)), "then": _STREAMS},
    {"if": given("bdh", type="object", **given("activations", type="integer")), "then": _STREAMS},
]


class _Texts(Sampling):
    """What completions and chats have."""

    without_effect = WITHOUT_EFFECT["request"]
    n: Positive | None = None
    response_format: ResponseFormat | None = Field(default=None, description="The form that the text must have.")
    stream_options: StreamOptions | None = None
    bdh: Extras | None = None

    @property
    def extras(self) -> Extras:
        return self.bdh or Extras()

    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()

    @model_validator(mode="after")
    def _check_streamed(self) -> Self:
        if self.stream_options is not None and self.stream_options.are_needed and not self.stream:
            raise ValueError("stream_options: only with stream")
        if self.extras.activations is not None and not self.stream:
            raise ValueError("bdh.activations: only with stream")
        return self


class CompletionRequest(_Texts):
    conditions = {
        "allOf": [
            *_ONLY_STREAMED,
            {
                "if": given("best_of", type="integer", minimum=2),
                "then": {"properties": {"stream": {"enum": [False, None]}}},
            },
            {
                "if": given("best_of", type="integer"),
                "then": {"properties": {"n": {"anyOf": [_NULL, {"const": 1}]}}},
            },
        ]
    }
    prompt: Prompt = Field(description="Text, texts, token ids, or lists of them.")
    max_tokens: Whole | None = Field(default=None, description="16 if not given.")
    best_of: Positive | None = Field(default=None, description="Texts generated, of which the likeliest is given.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), AS_WHOLE] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        return _texts(self.prompt)

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if (self.best_of or 1) > 1 and self.stream:
            raise ValueError("best_of: only without stream")
        if self.best_of is not None and self.n not in (None, 1):
            raise ValueError("best_of: only with n left out, or 1: the likeliest is given")
        return self


class MessageModel(RequestModel):
    """A message of a conversation, whose content is a text, or parts that have one."""

    role: Literal["system", "developer", "user", "assistant"]

    @property
    def text(self) -> str:
        content = getattr(self, "content", None) or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class TextPart(RequestModel):
    without_effect = WITHOUT_EFFECT["content part"]
    type: Literal["text"]
    text: str


class ChatMessage(MessageModel):
    without_effect = WITHOUT_EFFECT["message"]
    conditions = {
        "allOf": [
            {
                "if": {"properties": {"role": {"enum": ["system", "developer", "user"]}}},
                "then": given("content", type=["string", "array"], minItems=1),
            }
        ]
    }
    content: str | list[TextPart] | None = Field(default=None, description="An assistant's may be left out: no text.")

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.role != "assistant" and self.content in (None, []):
            raise ValueError(f"content: is needed in a message of the role {self.role}")
        return self


class ChatRequest(_Texts):
    conditions = {
        "allOf": [
            *_ONLY_STREAMED,
            {"if": given("top_logprobs", type="integer", minimum=1), "then": given("logprobs", const=True)},
            {
                "if": given("max_completion_tokens", type="integer"),
                "then": {"properties": {"max_tokens": _NULL}},
            },
        ]
    }
    messages: list[ChatMessage] = Field(min_length=1, description="With bdh.from_state only the new ones.")
    max_tokens: Positive | None = Field(default=None, description="The same as max_completion_tokens.")
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: is the same as max_tokens, of which only one may be given")
        return self


class TokenizeRequest(RequestModel):
    without_effect = WITHOUT_EFFECT["tokenize"]
    conditions = {
        "oneOf": [
            _only("prompt", {"type": "string"}, "content", "messages"),
            _only("content", {"type": "string"}, "prompt", "messages"),
            _only("messages", {"type": "array"}, "prompt", "content", "add_special_tokens"),
        ]
    }
    model: str | None = None
    prompt: str | None = Field(default=None, description="A text, in which nothing is a special token.")
    content: str | None = Field(default=None, description="The same as prompt.")
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, description="Or a conversation.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put around a text what the tokenizer does. A conversation has what its template says.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if [self.prompt, self.content, self.messages].count(None) != 2:
            raise ValueError("prompt: one of prompt, content and messages is needed")
        if self.add_special_tokens and self.messages is not None:
            raise ValueError("add_special_tokens: only with prompt or content, a chat template has its own")
        return self


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[Whole]


class EmbeddingOptions(RequestModel):
    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="Of the residuals of all tokens (mean, the default), or that of the last."
    )
    normalize: bool | None = Field(default=None, description="To length 1, as OpenAI's are; true if not given.")


class EmbeddingRequest(RequestModel):
    input: Prompt = Field(description="Text, texts, token ids, or lists of them.")
    model: str | None = Field(default=None, description="A name that the server has; None for its first.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = Field(default=None, description="The model's residual width, or left out.")
    user: str | None = Field(default=None, description="For the log.")
    bdh: EmbeddingOptions | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        return _texts(self.input)
