"""The description of the API, /openapi.json: what this server, with its model and its limits, takes and gives.

It says as much as JSON Schema can, so that what a client makes from it is not refused.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from bdh.serve.config import LimitSettings
from bdh.serve.schemas import MOST_WHOLE, Json
from bdh.serve.service import Loaded, Service
from bdh.vocabulary import document_end_id

_OF_TEXTS = ("CompletionRequest", "ChatRequest", "ResponseRequest")


def describe(app: FastAPI, service: Service, *, needs_key: bool) -> None:
    """Lets the application's description say what depends on the settings, and, once it is there, on the model."""
    make = app.openapi

    def openapi() -> Json:
        described = make()
        _describe_errors(described, needs_key=needs_key)
        schemas, loaded = described["components"]["schemas"], service.loaded
        limits = service.settings.limits
        most_texts = limits.texts if loaded is None else min(limits.texts, loaded.max_sequences)
        for name in _OF_TEXTS:
            _describe_limits(schemas[name]["properties"], limits, most_texts)
        _limit_texts(schemas["CompletionRequest"]["properties"]["prompt"], limits.prompts)
        _limit_texts(schemas["EmbeddingRequest"]["properties"]["input"], limits.embeddings)
        if loaded is not None:
            _describe_model(schemas, loaded)
        return described

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_errors(described: Json, *, needs_key: bool) -> None:
    header = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
    for operation in [operation for path in described["paths"].values() for operation in path.values()]:
        responses = operation["responses"]
        responses.pop("422", None)  # it is 400 here
        for status in {"429", "503"} & responses.keys():
            responses[status]["headers"] = {"Retry-After": header}
        if needs_key and "401" in responses:
            operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
    if needs_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}


def _describe_limits(properties: Json, limits: LimitSettings, most_texts: int) -> None:
    tokens = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), limits.max_tokens)
    for name, most in {**tokens, "n": most_texts, "best_of": most_texts}.items():
        if name in properties:
            properties[name]["anyOf"][0]["maximum"] = most
    temperature = {"type": "number", "minimum": 1e-6, "maximum": 100}
    properties["temperature"]["anyOf"] = [{"const": 0}, temperature, {"type": "null"}]


def _limit_texts(texts: Json, most: int) -> None:
    for kind in texts["anyOf"]:
        if kind.get("type") == "array" and kind["items"].get("type") != "integer":
            kind["maxItems"] = most


def _describe_model(schemas: Json, loaded: Loaded) -> None:
    """The vocabulary: which token ids there are, and whether an empty text can be continued."""
    last = loaded.vocab_size - 1
    for schema in _objects(schemas):
        if (schema.get("type"), schema.get("minimum"), schema.get("maximum")) == ("integer", 0, MOST_WHOLE):
            schema["maximum"] = last
    width = {"const": loaded.model.config.n_embd}
    schemas["EmbeddingRequest"]["properties"]["dimensions"]["anyOf"] = [width, {"type": "null"}]
    if loaded.tokenizer.bos_token_id is None and document_end_id(loaded.tokenizer) is None:
        for name, field in (("CompletionRequest", "prompt"), ("EmbeddingRequest", "input")):
            for kind in schemas[name]["properties"][field]["anyOf"]:
                for text in (kind, kind.get("items", {})):
                    if text.get("type") == "string":
                        text["minLength"] = 1
    for name in _OF_TEXTS:
        for kind in schemas[name]["properties"]["logit_bias"]["anyOf"]:
            if kind.get("type") == "object":
                kind.pop("patternProperties", None)
                kind["propertyNames"] = {"pattern": f"^({up_to(last)})$"}
                kind["additionalProperties"] = {"type": "number", "minimum": -100, "maximum": 100}


def _objects(schema: Any) -> Iterator[Json]:
    """All objects within one."""
    if isinstance(schema, dict):
        yield schema
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _objects(each)


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
