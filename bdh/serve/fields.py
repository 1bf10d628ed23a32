"""Fields that the server does not have, and the values by which they change nothing.

Clients send along what they know of OpenAI's API, and what an answer had comes back in the next question. A field that the
server does not have is refused by its name, unless its value asks for nothing: null, empty, or one of those in this table,
which holds for all routes; docs/serving.md shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
"""JSON Schema of the values that ask for nothing in any field, as :func:`asks_nothing` has them."""


def asks_nothing(value: Any) -> bool:
    """Whether a field has no effect by this value: null, empty, or an object of nothing else."""
    return _is_empty(value) or (isinstance(value, dict) and all(map(_is_empty, value.values())))


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


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


_CACHE = "beginnings that prompts share are kept without it"
_REPLY = "it comes back from a reply"
_ALWAYS = "what always happens"
_FORM = "an empty schema asks for JSON, as response_format does"
_LENGTH = "no reply is shorter or longer by it"
_AT_ONCE = "the model writes its reply at once"
_OF_TEXTS: dict[str, NoEffect] = {
    "tool_choice": NoEffect("there are no tools", values=("none", "auto")),
    "parallel_tool_calls": NoEffect("there are no tools", type="boolean"),
    "service_tier": NoEffect("there is one", values=("auto", "default")),
    "prompt_cache_key": NoEffect("beginnings that prompts share are found without it", type="string"),
    "prompt_cache_retention": NoEffect(_CACHE, type="string"),
    "safety_identifier": NoEffect("a name of the user", type="string"),
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
        "web_search_options": NoEffect("an empty object asks for a search", may_be_empty=False),
        "json_schema": NoEffect(_FORM, may_be_empty=False),
        "guided_json": NoEffect(_FORM, may_be_empty=False),
        "structured_outputs": NoEffect(_FORM, may_be_empty=False),
        "modalities": NoEffect("replies are text", values=(["text"],)),
        "reasoning_effort": NoEffect(_AT_ONCE, values=("none",)),
        "verbosity": NoEffect(_LENGTH, values=("medium",)),
        "store": NoEffect("replies are not kept", values=(False,)),
        "metadata": NoEffect("tags of replies that are kept", type="object"),
        "cache_prompt": NoEffect(_CACHE, type="boolean"),
        "min_tokens": NoEffect("no least length", values=(0,)),
        "length_penalty": NoEffect("no beams", values=(1,)),
        "use_beam_search": NoEffect("no beams", values=(False,)),
        "early_stopping": NoEffect("no beams", values=(False,)),
        "typical_p": NoEffect("switched off", values=(1,)),
        "mirostat": NoEffect("switched off", values=(0,)),
        "skip_special_tokens": NoEffect(_ALWAYS, values=(True,)),
        "spaces_between_special_tokens": NoEffect(_ALWAYS, values=(True,)),
        "include_stop_str_in_output": NoEffect(_ALWAYS, values=(False,)),
        "return_token_ids": NoEffect(_ALWAYS, values=(False,)),
    },
    "stream_options": _OBFUSCATION,
    "message": {"name": NoEffect("the model is not shown it", type="string"), **_CACHE_CONTROL},
    "content part": _CACHE_CONTROL,
    "response": {
        **_OF_TEXTS,
        "truncation": NoEffect("nothing is cut off", values=("disabled",)),
        "background": NoEffect("answers are waited for", values=(False,)),
    },
    "response stream_options": {
        **_OBFUSCATION,
        "include_usage": NoEffect("the last event always has it", type="boolean"),
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
        "with_pieces": NoEffect("ids are given", values=(False,)),
        "return_token_strs": NoEffect("ids are given", values=(False,)),
    },
}


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
