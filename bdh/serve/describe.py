"""The description of the API, /openapi.json: what this server, with its model and its limits, takes and gives.

It says as much as JSON Schema can, so that what a client makes from it is not refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI

from bdh.serve.keys import ApiKeys
from bdh.serve.response_schemas import OUTPUT_LOGPROBS
from bdh.serve.service import Service
from bdh.vocabulary import document_end_id

Schema = dict[str, Any]
_ASKING_OPTIONS = ("include_usage", "continuous_usage_stats")
_NEEDS_CONTENT = [
    {
        "if": {"properties": {"role": {"enum": ["system", "developer", "user"]}}},
        "then": {"required": ["content"], "properties": {"content": {"type": ["string", "array"], "minItems": 1}}},
    }
]


def describe(app: FastAPI, service: Service, keys: ApiKeys) -> None:
    made: Callable[[], Schema] = app.openapi

    def openapi() -> Schema:
        described = made()
        _describe_errors(described, needs_key=keys.are_needed)
        schemas = described["components"]["schemas"]
        for name in ("CompletionRequest", "ChatRequest", "ResponseRequest"):
            _describe_limits(schemas[name]["properties"], service)
            schemas[name].setdefault("allOf", _conditions(schemas[name]["properties"]))
        _describe_lists(schemas["EmbeddingRequest"]["properties"]["input"], service.settings.limits.embeddings)
        schemas["TokenizeRequest"]["oneOf"] = [
            _one("prompt", {"type": "string"}, absent=("content", "messages")),
            _one("content", {"type": "string"}, absent=("prompt", "messages")),
            _one("messages", {"type": "array"}, absent=("prompt", "content", "add_special_tokens")),
        ]
        schemas["ChatMessage"].setdefault("allOf", _NEEDS_CONTENT)
        _describe_formats(schemas)
        if service.loaded is not None:
            _describe_model(schemas, service)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_errors(described: Schema, *, needs_key: bool) -> None:
    for path in described["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # it is 400 here
            for status in ("429", "503"):
                if status in operation["responses"]:
                    header = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
                    operation["responses"][status]["headers"] = {"Retry-After": header}
            if needs_key and "401" in operation["responses"]:
                operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
    if needs_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


def _describe_limits(properties: Schema, service: Service) -> None:
    limits = service.settings.limits
    most_texts = limits.texts
    if service.loaded is not None:
        most_texts = min(most_texts, service.loaded.front.engine.max_sequences)
    for name, most in (
        ("max_tokens", limits.max_tokens),
        ("max_completion_tokens", limits.max_tokens),
        ("max_output_tokens", limits.max_tokens),
        ("n", most_texts),
        ("best_of", most_texts),
    ):
        if name in properties:
            properties[name]["anyOf"][0]["maximum"] = most
    properties["temperature"]["anyOf"] = [
        {"const": 0},
        {"type": "number", "minimum": 1e-6, "maximum": 100},
        {"type": "null"},
    ]
    if "best_of" in properties:
        _describe_lists(properties["prompt"], limits.prompts)


def _describe_lists(texts: Schema, most: int) -> None:
    """How many texts there may be."""
    for kind in texts["anyOf"]:
        if kind.get("type") == "array" and kind["items"].get("type") != "integer":
            kind["maxItems"] = most


def _given(name: str, **schema: Any) -> Schema:
    return {"required": [name], "properties": {name: schema}}


def _absent(name: str) -> Schema:
    return {"properties": {name: {"type": "null"}}}


def _one(name: str, schema: Schema, *, absent: Sequence[str]) -> Schema:
    """This field, and none of those."""
    nothing = {"enum": [None, False]}
    return {"required": [name], "properties": {name: schema, **dict.fromkeys(absent, nothing)}}


def _conditions(properties: Schema) -> list[Schema]:
    """Which fields go together."""
    streams = _given("stream", const=True)
    watches = {"properties": {"bdh": {"type": "object", **_given("activations", type="integer")}}, "required": ["bdh"]}
    found: list[Schema] = []
    if "input" in properties:
        named = {"type": "array", "contains": {"const": OUTPUT_LOGPROBS}}
        return [{"if": _given("top_logprobs", type="integer", minimum=1), "then": _given("include", **named)}]
    found += ({"if": _given("stream_options", **_given(name, const=True)), "then": streams} for name in _ASKING_OPTIONS)
    found.append({"if": watches, "then": streams})
    if "top_logprobs" in properties:
        found += [
            {"if": _given("top_logprobs", type="integer", minimum=1), "then": _given("logprobs", const=True)},
            {"if": _given("max_completion_tokens", type="integer"), "then": _absent("max_tokens")},
        ]
    else:
        several = _given("best_of", type="integer")
        found += [
            {
                "if": _given("best_of", type="integer", minimum=2),
                "then": {"properties": {"stream": {"enum": [False, None]}}},
            },
            {"if": several, "then": {"properties": {"n": {"anyOf": [{"type": "null"}, {"const": 1}]}}}},
        ]
    return found


def _describe_formats(schemas: Schema) -> None:
    """Which fields of a format go with which type."""
    fields = {"json_schema": "json_schema", "regex": "pattern", "text": None, "json_object": None}
    schemas["ResponseFormat"]["oneOf"] = [
        {
            "required": [each for each in ("type" if kind != "text" else None, field) if each],
            "properties": {
                "type": {"enum": ["text", None]} if kind == "text" else {"const": kind},
                **{
                    name: {"not": {"type": "null"}} if name == field else {"type": "null"}
                    for name in ("json_schema", "pattern")
                },
            },
        }
        for kind, field in fields.items()
    ]
    absent: Schema = {"type": "null"}
    schemas["TextFormat"]["oneOf"] = [
        {"properties": {"type": {"enum": ["text", "json_object", None]}, "schema": absent, "pattern": absent}},
        {"required": ["type"], "properties": {"type": {"const": "json_schema"}, "pattern": absent}},
        {
            "required": ["type", "pattern"],
            "properties": {"type": {"const": "regex"}, "schema": absent, "pattern": {"not": absent}},
        },
    ]


def _describe_model(schemas: Schema, service: Service) -> None:
    """The vocabulary: which token ids there are, and whether an empty text can be continued."""
    loaded = service.loaded
    assert loaded is not None
    last = loaded.model.config.vocab_size - 1
    tokenizer = loaded.tokenizer
    starts_from_nothing = (tokenizer.bos_token_id, document_end_id(tokenizer)) != (None, None)
    _limit_tokens(schemas, last)
    width = {"const": loaded.model.config.n_embd}
    schemas["EmbeddingRequest"]["properties"]["dimensions"]["anyOf"] = [width, {"type": "null"}]
    prompts = schemas["CompletionRequest"]["properties"]["prompt"], schemas["EmbeddingRequest"]["properties"]["input"]
    for kind in [kind for each in prompts for kind in each["anyOf"]]:
        for text in (kind, kind.get("items", {})):
            if text.get("type") == "string" and not starts_from_nothing:
                text["minLength"] = 1
    for name in ("CompletionRequest", "ChatRequest", "ResponseRequest"):
        for kind in schemas[name]["properties"]["logit_bias"]["anyOf"]:
            if kind.get("type") == "object":
                kind.pop("patternProperties", None)
                kind["propertyNames"] = {"pattern": f"^({up_to(last)})$"}
                kind["additionalProperties"] = {"type": "number", "minimum": -100, "maximum": 100}


def _limit_tokens(schema: Any, last: int) -> None:
    """Lets every list of token ids end with the vocabulary."""
    if isinstance(schema, list):
        for each in schema:
            _limit_tokens(each, last)
    if isinstance(schema, dict):
        if schema.get("type") == "integer" and schema.get("maximum") == 2**31 - 1 and schema.get("minimum") == 0:
            schema["maximum"] = last
        for each in schema.values():
            _limit_tokens(each, last)


def up_to(last: int) -> str:
    """A pattern of the whole numbers from 0 to this one."""
    digits = str(last)
    found = ["0"] + [f"[1-9][0-9]{{{length - 1}}}" if length > 1 else "[1-9]" for length in range(1, len(digits))]
    for place, digit in enumerate(digits):
        least = 1 if place == 0 else 0
        if int(digit) > least:
            rest = len(digits) - place - 1
            found.append(f"{digits[:place]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join([*found, *([digits] if last else [])])
