"""Request models. A field that the server does not have is refused by name, unless its value asks for nothing.

Clients send many fields of OpenAI's API, and send back what an answer contained. A field that the server does not have is
therefore accepted if its value asks for nothing: null, empty, an object of such values, or listed in ``WITHOUT_EFFECT``.
That table covers all routes; docs/serving.md shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from bdh.generate.advance import MOST_NEURONS
from bdh.generate.params import SamplingParams
from bdh.words import nearest

Json = dict[str, Any]

_TYPES: dict[str, type] = {"string": str, "boolean": bool, "object": dict, "array": list}
_EMPTY: list[Json] = [
    {"type": "null"},
    {"type": "string", "maxLength": 0},
    {"type": "array", "maxItems": 0},
    {"type": "object", "maxProperties": 0},
]
_NOTHING: Json = {"anyOf": [*_EMPTY, {"type": "object", "additionalProperties": {"anyOf": _EMPTY}}]}


def _is_empty(value: Any) -> bool:
    return value in (None, "", [], {})


def _asks_nothing(value: Any) -> bool:
    """Returns whether a value asks for nothing. ``_NOTHING`` is the same rule in JSON Schema."""
    return _is_empty(value) or (isinstance(value, dict) and all(map(_is_empty, value.values())))


@dataclass(frozen=True)
class NoEffect:
    """The values, besides null and empty ones, that are accepted for a field that the server does not have."""

    why: str
    values: tuple[Any, ...] = ()
    type: str | None = None
    """A JSON type, all of whose values are accepted."""
    may_be_empty: bool = True
    """False if an empty value, such as ``{}``, would ask for something. Then only null is accepted."""

    def accepts(self, value: Any) -> bool:
        if _asks_nothing(value):
            return value is None or self.may_be_empty
        if self.type is not None:
            return isinstance(value, _TYPES[self.type])
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.values)

    @property
    def schema(self) -> Json:
        allowed = list(_NOTHING["anyOf"]) if self.may_be_empty else [{"type": "null"}]
        allowed += [{"type": self.type}] if self.type is not None else []
        allowed += [{"enum": list(self.values)}] if self.values else []
        return {"anyOf": allowed, "description": f"Has no effect: {self.why}."}


_CACHE = "shared prompt prefixes are cached anyway"
_REPLY = "clients copy it from a reply"
_ALWAYS = "this is always the case"
_FORM = "an empty schema would ask for JSON"
_LENGTH = "it does not change the length of a reply"
_AT_ONCE = "the model replies without reasoning first"
_OF_TEXTS: dict[str, NoEffect] = {
    "tool_choice": NoEffect("there are no tools", values=("none", "auto")),
    "parallel_tool_calls": NoEffect("there are no tools", type="boolean"),
    "service_tier": NoEffect("there is only one", values=("auto", "default")),
    "prompt_cache_key": NoEffect("shared prompt prefixes are found anyway", type="string"),
    "prompt_cache_retention": NoEffect(_CACHE, type="string"),
    "safety_identifier": NoEffect("it only identifies the user", type="string"),
}
_OBFUSCATION = {"include_obfuscation": NoEffect("streams are not padded", type="boolean")}
_CACHE_CONTROL = {"cache_control": NoEffect(_CACHE, type="object")}
_TEMPLATE = {
    "add_generation_prompt": NoEffect(_ALWAYS, values=(True,)),
    "continue_final_message": NoEffect(_ALWAYS, values=(False,)),
}
WITHOUT_EFFECT: dict[str, dict[str, NoEffect]] = {
    "request": {
        **_OF_TEXTS,
        **_TEMPLATE,
        "function_call": NoEffect("there are no tools", values=("none", "auto")),
        "web_search_options": NoEffect("an empty object would ask for a search", may_be_empty=False),
        "json_schema": NoEffect(_FORM, may_be_empty=False),
        "guided_json": NoEffect(_FORM, may_be_empty=False),
        "structured_outputs": NoEffect(_FORM, may_be_empty=False),
        "modalities": NoEffect("replies are text only", values=(["text"],)),
        "reasoning_effort": NoEffect(_AT_ONCE, values=("none",)),
        "verbosity": NoEffect(_LENGTH, values=("medium",)),
        "store": NoEffect("replies are not stored", values=(False,)),
        "metadata": NoEffect("it only tags stored replies", type="object"),
        "cache_prompt": NoEffect(_CACHE, type="boolean"),
        "min_tokens": NoEffect("there is no minimum length", values=(0,)),
        "length_penalty": NoEffect("there is no beam search", values=(1,)),
        "use_beam_search": NoEffect("there is no beam search", values=(False,)),
        "early_stopping": NoEffect("there is no beam search", values=(False,)),
        "typical_p": NoEffect("this value switches it off", values=(1,)),
        "mirostat": NoEffect("this value switches it off", values=(0,)),
        "skip_special_tokens": NoEffect(_ALWAYS, values=(True,)),
        "spaces_between_special_tokens": NoEffect(_ALWAYS, values=(True,)),
        "include_stop_str_in_output": NoEffect(_ALWAYS, values=(False,)),
        "return_token_ids": NoEffect(_ALWAYS, values=(False,)),
    },
    "stream_options": _OBFUSCATION,
    "message": {"name": NoEffect("the model does not see it", type="string"), **_CACHE_CONTROL},
    "content part": _CACHE_CONTROL,
    "response": {
        **_OF_TEXTS,
        "truncation": NoEffect("no input is cut off", values=("disabled",)),
        "background": NoEffect("responses do not run in the background", values=(False,)),
    },
    "response stream_options": {
        **_OBFUSCATION,
        "include_usage": NoEffect("the last event always has the usage", type="boolean"),
    },
    "response text": {"verbosity": NoEffect(_LENGTH, values=("medium",))},
    "response reasoning": {"effort": NoEffect(_AT_ONCE, values=("none",))},
    "response item": {
        "id": NoEffect(_REPLY, type="string"),
        "status": NoEffect(_REPLY, type="string"),
        "phase": NoEffect(_REPLY, values=("final_answer",)),
    },
    "response part": {
        "logprobs": NoEffect(_REPLY, type="array"),
        "prompt_cache_breakpoint": NoEffect(_CACHE, type="object"),
    },
    "tokenize": {
        **_TEMPLATE,
        "parse_special": NoEffect(_ALWAYS, values=(False,)),
        "with_pieces": NoEffect("the answer has ids", values=(False,)),
        "return_token_strs": NoEffect("the answer has ids", values=(False,)),
    },
}


def optional(description: str, **limits: Any) -> Any:
    """Returns a field that may be omitted or null."""
    return Field(default=None, description=description, **limits)


AS_WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""Accepts 2.0 as an integer, as JSON Schema does."""
MOST_WHOLE = 2**31 - 1
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_AS_GIVEN = ("temperature", "top_p", "min_p", "n", "seed", "ignore_eos", *_PENALTIES)
_MOST_SEED = 9_223_372_036_854_776_000  # 2**63 as OpenAPI descriptions print it: their numbers are float64
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
    """Adds what a model accepts besides its fields, and which fields go together, to its JSON schema."""
    without_effect = {name: field.schema for name, field in model.without_effect.items()}
    schema["properties"] = {**without_effect, **schema["properties"]}
    schema["additionalProperties"] = _NOTHING
    schema |= model.conditions


class RequestModel(BaseModel):
    """The base class of all objects in requests. Nothing is converted or ignored silently: an unknown field is refused,
    unless its value asks for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)
    without_effect: ClassVar[Mapping[str, NoEffect]] = {}
    """Fields that the object does not have, with the values that are accepted for them."""
    conditions: ClassVar[Json] = {}
    """What the validators check, in JSON Schema."""

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
                    raise ValueError(f"{where}: has half of a surrogate pair, which is not text")
            if name not in fields:
                effect = cls.without_effect.get(name)
                if _asks_nothing(value) if effect is None else effect.accepts(value):
                    continue
                near = nearest(name, fields, 0.75) if effect is None else None
                raise PydanticCustomError("unknown_field", "is no field", {"name": name, "near": near})
            kept[name] = value
        return kept

    def faults(self) -> Iterator[str]:
        """Yields the errors that involve several fields. Each begins with the name of one: ``n: must be 1``."""
        yield from ()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if fault := next(self.faults(), None):
            raise ValueError(fault)
        return self


def _is_text(value: str) -> bool:
    """Returns False for half of a surrogate pair, which JSON can spell but which is not text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def given(name: str, **schema: Any) -> Json:
    return {"required": [name], "properties": {name: schema}}


def _only(name: str, type: str, *absent: str) -> Json:
    """Returns the schema of an object that has this field and none of the absent ones."""
    nothing = {"enum": [None, False]}
    return {"required": [name], "properties": {name: {"type": type}, **dict.fromkeys(absent, nothing)}}


def when(condition: Json, then: Json) -> Json:
    return {"if": condition, "then": then}


def texts_of(prompt: Any) -> list[str | list[int]]:
    """Returns the texts or lists of token ids in a :data:`Prompt`."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class JsonSchema(RequestModel):
    name: str | None = None
    description: str | None = None
    schema_: Json | None = Field(default=None, alias="schema", description="null allows any object.")
    strict: bool | None = optional("The schema is always enforced exactly, whatever the value.")


FormatType = Literal["text", "json_object", "json_schema", "regex"]
NULL: Json = {"type": "null"}
NOT_NULL: Json = {"not": NULL}


def form(kinds: Json, **fields: Json) -> Json:
    """Returns the schema of one text format: its ``type``, and the fields beside it."""
    needed = (["type"] if "const" in kinds else []) + [name for name, schema in fields.items() if schema == NOT_NULL]
    return {**({"required": needed} if needed else {}), "properties": {"type": kinds, **fields}}


def grammar_of(kind: str | None, schema: Json | None, pattern: str | None) -> Json | None:
    """Returns ``SamplingParams.grammar`` for a text format of this type; None for free text."""
    if kind in (None, "text"):
        return None
    return {"regex": pattern} if kind == "regex" else {"json_schema": {"type": "object"} if schema is None else schema}


class ResponseFormat(RequestModel):
    conditions = {
        "oneOf": [
            form({"enum": ["text", None]}, json_schema=NULL, pattern=NULL),
            form({"const": "json_object"}, json_schema=NULL, pattern=NULL),
            form({"const": "json_schema"}, json_schema=NOT_NULL, pattern=NULL),
            form({"const": "regex"}, json_schema=NULL, pattern=NOT_NULL),
        ]
    }
    type: FormatType | None = optional("null means text.")
    json_schema: JsonSchema | None = optional("Required with the type json_schema, and allowed only then.")
    pattern: str | None = optional("Required with the type regex, and allowed only then. Must match the whole text.")

    def faults(self) -> Iterator[str]:
        for name, kind in (("json_schema", "json_schema"), ("pattern", "regex")):
            if (getattr(self, name) is not None) != (self.type == kind):
                yield f"{name}: must be given with the type {kind}, and with no other"


class StreamOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["stream_options"]
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = optional("Add the usage so far to each chunk.")

    @property
    def are_needed(self) -> bool:
        """Whether any option is set."""
        return bool(self.include_usage or self.continuous_usage_stats)


class Extras(RequestModel):
    """The extensions of this server: saved states and the activity of neurons."""

    save_state: bool | None = optional("Save the state after the text. The answer contains its id.")
    from_state: str | None = optional("Id of a saved state to continue from. Its text is not read again.")
    activations: Annotated[int, Field(ge=0, le=MOST_NEURONS), AS_WHOLE] | None = optional(
        "Add to each streamed token the share of neurons that fired in each layer step, and this many of the strongest."
    )


class Sampling(RequestModel):
    """The fields of all requests that generate text."""

    model: str | None = optional("One of the server's model names. null or empty means the first.")
    temperature: float | None = optional("0 always takes the likeliest token. Otherwise at least 1e-6.", ge=0, le=100)
    top_p: float | None = optional("0 always takes the likeliest token.", ge=0, le=1)
    top_k: Annotated[int, Field(ge=-1, le=MOST_WHOLE), AS_WHOLE] | None = optional("0 or -1 allows all tokens.")
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
    user: str | None = optional("Recorded in the log.")

    def params(
        self, max_tokens: int, *, stops: Sequence[str] = (), stop_token_ids: Sequence[int] = ()
    ) -> SamplingParams:
        """Returns the sampling parameters that all these requests have in common."""
        given: Json = {name: value for name in _AS_GIVEN if (value := getattr(self, name, None)) is not None}
        if given.get("seed", 0) < -(2**63):
            given["seed"] %= 2**64  # the few that PyTorch does not accept
        if self.top_p == 0:  # only the likeliest token
            given |= {"temperature": 0.0, "top_p": 1.0}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            top_k=max(0, self.top_k or 0),
            stop=[*([self.stop] if isinstance(self.stop, str) and self.stop else self.stop or []), *stops],
            stop_token_ids=[*(self.stop_token_ids or []), *stop_token_ids],
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )

    def faults(self) -> Iterator[str]:
        if self.temperature is not None and 0 < self.temperature < 1e-6:
            yield "temperature: must be 0, or at least 1e-6"
        if self.logit_bias is not None and len(set(map(int, self.logit_bias))) < len(self.logit_bias):
            yield "logit_bias: has a token twice, with and without leading zeros"


_STREAMS = given("stream", const=True)
_ONLY_STREAMED = [
    when(given("stream_options", **given("include_usage", const=True)), _STREAMS),
    when(given("stream_options", **given("continuous_usage_stats", const=True)), _STREAMS),
    when(given("bdh", type="object", **given("activations", type="integer")), _STREAMS),
]


class _Texts(Sampling):
    """The fields that completions and chats have in common."""

    without_effect = WITHOUT_EFFECT["request"]
    n: Positive | None = None
    response_format: ResponseFormat | None = optional("The format that the text must have.")
    stream_options: StreamOptions | None = None
    bdh: Extras | None = None

    @property
    def extras(self) -> Extras:
        return self.bdh or Extras()

    def params(self, *arguments: Any, **options: Any) -> SamplingParams:
        form = self.response_format or ResponseFormat()
        schema = None if form.json_schema is None else form.json_schema.schema_
        grammar = grammar_of(form.type, schema, form.pattern)
        return replace(super().params(*arguments, **options), grammar=grammar)

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.stream_options is not None and self.stream_options.are_needed and not self.stream:
            yield "stream_options: only with stream"
        if self.extras.activations is not None and not self.stream:
            yield "bdh.activations: only with stream"


class CompletionRequest(_Texts):
    conditions = {
        "allOf": [
            *_ONLY_STREAMED,
            when(given("best_of", type="integer", minimum=2), {"properties": {"stream": {"enum": [False, None]}}}),
            when(given("best_of", type="integer"), {"properties": {"n": {"anyOf": [NULL, {"const": 1}]}}}),
        ]
    }
    prompt: Prompt = Field(description="A text, a list of texts, a list of token ids, or several such lists.")
    max_tokens: Whole | None = optional("Defaults to 16.")
    best_of: Positive | None = optional("Number of texts to generate. The likeliest is returned.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), AS_WHOLE] | None = None

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if (self.best_of or 1) > 1 and self.stream:
            yield "best_of: only without stream"
        if self.best_of is not None and self.n not in (None, 1):
            yield "best_of: only with n left out, or 1: the likeliest is given"


class MessageModel(RequestModel):
    """A message of a conversation. Its content is a text, or a list of parts that have texts."""

    role: Literal["system", "developer", "user", "assistant"]

    @property
    def text(self) -> str:
        content = getattr(self, "content", None) or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self) -> dict[str, str]:
        """Returns the message as chat templates expect it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.text}


class TextPart(RequestModel):
    without_effect = WITHOUT_EFFECT["content part"]
    type: Literal["text"]
    text: str


class ChatMessage(MessageModel):
    without_effect = WITHOUT_EFFECT["message"]
    conditions = {
        "allOf": [
            when(
                {"properties": {"role": {"enum": ["system", "developer", "user"]}}},
                given("content", type=["string", "array"], minItems=1),
            )
        ]
    }
    content: str | list[TextPart] | None = optional("Only an assistant may omit it: the text is then empty.")

    def faults(self) -> Iterator[str]:
        if self.role != "assistant" and self.content in (None, []):
            yield f"content: is needed in a message of the role {self.role}"


class ChatRequest(_Texts):
    conditions = {
        "allOf": [
            *_ONLY_STREAMED,
            when(given("top_logprobs", type="integer", minimum=1), given("logprobs", const=True)),
            when(given("max_completion_tokens", type="integer"), {"properties": {"max_tokens": NULL}}),
        ]
    }
    messages: list[ChatMessage] = Field(min_length=1, description="With bdh.from_state, only the new messages.")
    max_tokens: Positive | None = optional("Alias of max_completion_tokens. Set only one of them.")
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if self.top_logprobs and not self.logprobs:
            yield "top_logprobs: only with logprobs"
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            yield "max_completion_tokens: is the same as max_tokens, of which only one may be given"


class TokenizeRequest(RequestModel):
    without_effect = WITHOUT_EFFECT["tokenize"]
    conditions = {
        "oneOf": [
            _only("prompt", "string", "content", "messages"),
            _only("content", "string", "prompt", "messages"),
            _only("messages", "array", "prompt", "content", "add_special_tokens"),
        ]
    }
    model: str | None = None
    prompt: str | None = optional("A text. Special tokens in it are read as plain text.")
    content: str | None = optional("Alias of prompt.")
    messages: list[ChatMessage] | None = optional("A conversation, instead of a text.", min_length=1)
    add_special_tokens: bool | None = optional(
        "Add the special tokens that the tokenizer puts around a text. Not with messages: the chat template has its own."
    )

    def faults(self) -> Iterator[str]:
        if [self.prompt, self.content, self.messages].count(None) != 2:
            yield "prompt: one of prompt, content and messages is needed"
        if self.add_special_tokens and self.messages is not None:
            yield "add_special_tokens: only with prompt or content, a chat template has its own"


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[Whole]
