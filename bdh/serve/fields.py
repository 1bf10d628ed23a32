"""What the objects of requests have in common: which fields are refused, and which ask for nothing and are let in.

Clients send along what they know of OpenAI's API, and what an answer had comes back in the next question. A field that the
server does not have is refused by its name, unless its value asks for nothing: null, empty, or one by which it has no
effect. Those values stand here, in one table for all routes; docs/serving.md shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

_NAME_CHARACTERS = 64  # of a name in an error
_TYPES: dict[str, type] = {"string": str, "boolean": bool, "object": dict, "array": list}
_EMPTY: list[dict[str, Any]] = [
    {"type": "null"},
    {"type": "string", "maxLength": 0},
    {"type": "array", "maxItems": 0},
    {"type": "object", "maxProperties": 0},
]
NOTHING_SCHEMA: dict[str, Any] = {
    "anyOf": [*_EMPTY, {"type": "object", "additionalProperties": {"anyOf": _EMPTY}}],
}
"""Of the values that ask for nothing in any field, as :func:`asks_nothing` has them."""


@dataclass(frozen=True)
class NoEffect:
    """The values by which a field that the server does not have changes nothing, besides null and empty ones."""

    why: str
    values: tuple[Any, ...] = ()
    type: str | None = None
    """Any value of this type of JSON."""
    may_be_empty: bool = True
    """False for a field that asks for something when it is an empty object: only null is accepted."""

    def accepts(self, value: Any) -> bool:
        if asks_nothing(value):
            return value is None or self.may_be_empty
        if self.type is not None:
            return isinstance(value, _TYPES[self.type])
        return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.values)

    @property
    def schema(self) -> dict[str, Any]:
        allowed = list(NOTHING_SCHEMA["anyOf"]) if self.may_be_empty else [{"type": "null"}]
        allowed += [{"type": self.type}] if self.type is not None else []
        allowed += [{"enum": list(self.values)}] if self.values else []
        return {"anyOf": allowed, "description": f"Has no effect: {self.why}."}


_TOOLS = "there are no tools"
_REPLY = "it comes back from a reply"
_VLLM = "what always happens"
_FORM = "an empty schema asks for JSON, as response_format does"
WITHOUT_EFFECT: dict[str, dict[str, NoEffect]] = {
    "request": {
        "tool_choice": NoEffect(_TOOLS, values=("none", "auto")),
        "function_call": NoEffect(_TOOLS, values=("none", "auto")),
        "parallel_tool_calls": NoEffect(_TOOLS, type="boolean"),
        "web_search_options": NoEffect("an empty object asks for a search", may_be_empty=False),
        "json_schema": NoEffect(_FORM, may_be_empty=False),
        "guided_json": NoEffect(_FORM, may_be_empty=False),
        "structured_outputs": NoEffect(_FORM, may_be_empty=False),
        "modalities": NoEffect("replies are text", values=(["text"],)),
        "reasoning_effort": NoEffect("the model writes its reply at once", values=("none",)),
        "verbosity": NoEffect("no reply is shorter or longer by it", values=("medium",)),
        "store": NoEffect("replies are not kept", values=(False,)),
        "metadata": NoEffect("tags of replies that are kept", type="object"),
        "service_tier": NoEffect("there is one", values=("auto", "default")),
        "prompt_cache_key": NoEffect("beginnings that prompts share are found without it", type="string"),
        "prompt_cache_retention": NoEffect("beginnings that prompts share are kept without it", type="string"),
        "cache_prompt": NoEffect("beginnings that prompts share are kept without it", type="boolean"),
        "safety_identifier": NoEffect("a name of the user", type="string"),
        "min_tokens": NoEffect("no least length", values=(0,)),
        "length_penalty": NoEffect("no beams", values=(1,)),
        "use_beam_search": NoEffect("no beams", values=(False,)),
        "early_stopping": NoEffect("no beams", values=(False,)),
        "typical_p": NoEffect("switched off", values=(1,)),
        "mirostat": NoEffect("switched off", values=(0,)),
        "skip_special_tokens": NoEffect(_VLLM, values=(True,)),
        "spaces_between_special_tokens": NoEffect(_VLLM, values=(True,)),
        "include_stop_str_in_output": NoEffect(_VLLM, values=(False,)),
        "add_generation_prompt": NoEffect(_VLLM, values=(True,)),
        "continue_final_message": NoEffect(_VLLM, values=(False,)),
        "return_token_ids": NoEffect(_VLLM, values=(False,)),
    },
    "stream_options": {
        "include_obfuscation": NoEffect("streams are not padded", type="boolean"),
    },
    "message": {
        "name": NoEffect("the model is not shown it", type="string"),
        "cache_control": NoEffect("beginnings that prompts share are kept without it", type="object"),
    },
    "content part": {
        "cache_control": NoEffect("beginnings that prompts share are kept without it", type="object"),
    },
    "response": {
        "tool_choice": NoEffect(_TOOLS, values=("none", "auto")),
        "parallel_tool_calls": NoEffect(_TOOLS, type="boolean"),
        "truncation": NoEffect("nothing is cut off", values=("disabled",)),
        "background": NoEffect("answers are waited for", values=(False,)),
        "service_tier": NoEffect("there is one", values=("auto", "default")),
        "prompt_cache_key": NoEffect("beginnings that prompts share are found without it", type="string"),
        "prompt_cache_retention": NoEffect("beginnings that prompts share are kept without it", type="string"),
        "safety_identifier": NoEffect("a name of the user", type="string"),
    },
    "response stream_options": {
        "include_obfuscation": NoEffect("streams are not padded", type="boolean"),
        "include_usage": NoEffect("the last event always has it", type="boolean"),
    },
    "response text": {"verbosity": NoEffect("no reply is shorter or longer by it", values=("medium",))},
    "response reasoning": {"effort": NoEffect("the model writes its reply at once", values=("none",))},
    "response item": {
        "id": NoEffect(_REPLY, type="string"),
        "status": NoEffect(_REPLY, type="string"),
        "phase": NoEffect(_REPLY, values=("final_answer",)),
    },
    "response part": {
        "logprobs": NoEffect(_REPLY, type="array"),
        "prompt_cache_breakpoint": NoEffect("beginnings that prompts share are kept without it", type="object"),
    },
    "tokenize": {
        "add_generation_prompt": NoEffect(_VLLM, values=(True,)),
        "continue_final_message": NoEffect(_VLLM, values=(False,)),
        "parse_special": NoEffect(_VLLM, values=(False,)),
        "with_pieces": NoEffect("ids are given", values=(False,)),
        "return_token_strs": NoEffect("ids are given", values=(False,)),
    },
}


def asks_nothing(value: Any) -> bool:
    """Whether any field has no effect by this value: null, empty, or an object of nothing else."""
    return _is_empty(value) or (isinstance(value, dict) and all(map(_is_empty, value.values())))


def is_text(value: str) -> bool:
    """JSON can spell what is no character: half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(schema: dict[str, Any], model: type[Any]) -> None:
    """Says in the model's JSON schema what it accepts besides its fields."""
    without_effect = {name: field.schema for name, field in model.without_effect.items()}
    schema["properties"] = {**without_effect, **schema["properties"]}
    schema["additionalProperties"] = NOTHING_SCHEMA


class RequestModel(BaseModel):
    """An object of a request. Nothing in it is converted or left out silently: what is no field of it is refused, unless
    it asks for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_describe)
    without_effect: ClassVar[Mapping[str, NoEffect]] = {}
    """Fields that it does not have, with the values by which they are accepted."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept, fields = {}, {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in given.items():
            for text in (value, *value) if isinstance(value, list) else (value, name):
                if isinstance(text, str) and not is_text(text):
                    raise ValueError(f"{name if is_text(name) else ''}: has half of a surrogate pair, which is no text")
            accepted = cls.without_effect[name].accepts if name in cls.without_effect else asks_nothing
            if name in fields or not accepted(value):
                kept[name] = value
        return kept


def named(place: Sequence[str | int], given: Any, *, is_missing: bool = False) -> str:
    """A place in a request as its client wrote it: ``messages.0.content``.

    Args:
        place: the keys and indices that lead there, and, between them, what only the schema has: which of several types.
        given: the request.
        is_missing: whether the last key is of a field that is not there.
    """
    parts = []
    for number, key in enumerate(place, 1):
        is_there = key in given if isinstance(given, dict) else isinstance(given, list) and isinstance(key, int)
        if is_there:
            given = given[key]
        if is_there or (is_missing and number == len(place)):
            parts.append(str(key).encode(errors="replace").decode()[:_NAME_CHARACTERS])
    return ".".join(parts)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
