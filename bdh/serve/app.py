"""The application: its routes, the format of its errors, and its OpenAPI description.

The description includes the limits of this server and, once it is loaded, of its model, as far as JSON Schema can express
them, so that requests generated from it are not refused.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp

import bdh
from bdh.serve.completions import add_completions, no_state
from bdh.serve.config import LimitSettings
from bdh.serve.middleware import (
    ApiError,
    ApiKeys,
    ClientGone,
    RequestMiddleware,
    bad_request,
    errors_of,
    internal_error,
)
from bdh.serve.responses import add_responses
from bdh.serve.schemas import MOST_WHOLE, DetokenizeRequest, Json, TokenizeRequest
from bdh.serve.service import Loaded, Service
from bdh.serve.states import SavedState
from bdh.serve.text import tokenizer_info
from bdh.tokenizer.plain import document_end_id

_CLIENT_GONE = 499  # nginx's status for this; for the log and metrics only
_HEALTH = ("/health", "/health/live", "/health/ready")
_NAME_CHARACTERS = 64  # the longest name in an error
_OF_TEXTS = ("CompletionRequest", "ChatRequest", "ResponseRequest")


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bdh"
    bdh: Json


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelFacts]


class TokenizeAnswer(BaseModel):
    tokens: list[int]
    count: int


class DetokenizeAnswer(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """The contents of the tokenizer's tokenizer_config.json. Special tokens that it does not have are null."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None
    added_tokens_decoder: dict[str, Json]


class StateFacts(BaseModel):
    id: str
    object: Literal["state"] = "state"
    created: int
    model: str
    tokens: int
    bytes: int
    status: Literal["saved", "unfinished"]
    text: str | None = None


class StateList(BaseModel):
    object: Literal["list"] = "list"
    data: list[StateFacts]


class Deleted(BaseModel):
    id: str
    object: Literal["state"] = "state"
    deleted: bool = True


class Health(BaseModel):
    status: Literal["ready", "live"]


def make_app(service: Service, keys: ApiKeys) -> ASGIApp:
    """Returns the application. The service may still be loading the model."""
    settings = service.settings
    exported = settings.telemetry
    app = FastAPI(
        title="BDH",
        summary="OpenAI's API for a Dragon Hatchling language model.",
        version=bdh.__version__,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
        telemetry={"tracing": exported, "metrics": exported, "logs": False, "auto_configure": exported},
        responses=errors_of(400, 405, 408, 413, 500),
    )
    _add_errors(app)
    _add_health(app, service)
    add_completions(app, service)
    _add_models(app, service)
    _add_states(app, service)
    add_responses(app, service)
    _add_description(app, service, needs_key=keys.are_needed)
    open_paths = {*_HEALTH, "/openapi.json"}
    if settings.page:
        _add_page(app)
        open_paths.add("/")
    if settings.metrics:
        _add_metrics(app, service)
        open_paths.add("/metrics")
    wrapped: ASGIApp = RequestMiddleware(
        app, keys=keys, limits=settings.limits, open_paths=frozenset(open_paths), answered=service.answered
    )
    if origins := settings.cors_origins:
        every = ["*"]
        wrapped = CORSMiddleware(
            wrapped, allow_origins=origins, allow_methods=every, allow_headers=every, expose_headers=every
        )
    return wrapped


def _add_models(app: FastAPI, service: Service) -> None:
    def facts(name: str) -> ModelFacts:
        loaded = service.ready()
        config, advancer = loaded.model.config, loaded.engine.engine.advancer
        facts = {
            "layers": config.n_layer,
            "heads": config.n_head,
            "neurons_per_head": config.neurons_per_head,
            "vocabulary": config.vocab_size,
            "chat": loaded.chat.template is not None,
            "state_bytes": advancer.state_bytes,
            "path": advancer.description,
            "weights": advancer.weight_format,
            "state": advancer.state_format,
        }
        return ModelFacts(id=name, created=loaded.created, bdh=facts)

    @app.get("/v1/models", responses=errors_of(401, 503), tags=["models"])
    async def models() -> ModelList:
        """Lists the names of the model, with its sizes and formats."""
        return ModelList(data=[facts(name) for name in service.ready().model_names])

    @app.get("/v1/models/{model:path}", responses=errors_of(401, 404, 503), tags=["models"])
    async def model(model: str) -> ModelFacts:
        """Returns one name of the model, with its sizes and formats."""
        return facts(service.check_model(model))

    @app.post("/tokenize", responses=errors_of(401, 404, 503), tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        """Returns the token ids of a text or a conversation."""
        service.check_model(body.model)
        loaded = service.ready()
        if body.messages is not None:
            tokens = await loaded.in_text_thread(loaded.chat.encode, [message.plain() for message in body.messages])
        else:
            text = (body.prompt if body.content is None else body.content) or ""
            with_special = bool(body.add_special_tokens)
            tokens = await loaded.in_text_thread(lambda: loaded.tokenizer.encode(text, add_special_tokens=with_special))
        return TokenizeAnswer(tokens=tokens, count=len(tokens))

    @app.get("/tokenizer_info", responses=errors_of(401, 503), tags=["tokens"])
    async def info() -> TokenizerInfo:
        """Returns the tokenizer's settings and chat template."""
        loaded, limits = service.ready(), service.settings.limits
        return TokenizerInfo(**tokenizer_info(loaded.tokenizer, loaded.chat.template, limits.prompt_tokens))

    @app.post("/detokenize", responses=errors_of(401, 404, 503), tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        """Returns the text of token ids."""
        service.check_model(body.model)
        loaded = service.ready()
        if wrong := [token for token in body.tokens if token >= loaded.vocab_size][:3]:
            last = loaded.vocab_size - 1
            raise bad_request(f"the request has the token ids {wrong}: must be within 0 and {last}", "tokens")
        return DetokenizeAnswer(prompt=await loaded.in_text_thread(loaded.tokenizer.decode, body.tokens))


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/v1/states", responses=errors_of(401, 503), tags=["states"])
    async def states(request: Request) -> StateList:
        """Lists the caller's saved states, the newest first."""
        found = await asyncio.to_thread(service.ready().states.of_owner, request.state.caller.id)
        return StateList(data=[_state_facts(saved) for saved in found])

    @app.get("/v1/states/{state_id}", responses=errors_of(401, 404, 503), tags=["states"])
    async def state(state_id: str, request: Request) -> StateFacts:
        """Returns the facts about a saved state."""
        try:
            return _state_facts(service.ready().states.get(state_id, request.state.caller.id))
        except KeyError:
            raise no_state(state_id) from None

    @app.delete("/v1/states/{state_id}", responses=errors_of(401, 404, 503), tags=["states"])
    async def delete_state(state_id: str, request: Request) -> Deleted:
        """Deletes a saved state."""
        try:
            await asyncio.to_thread(service.ready().states.delete, state_id, request.state.caller.id)
        except KeyError:
            raise no_state(state_id) from None
        return Deleted(id=state_id)


def _state_facts(saved: SavedState) -> StateFacts:
    return StateFacts(
        id=saved.id,
        created=int(saved.created),
        model=saved.model,
        tokens=saved.num_tokens,
        bytes=saved.nbytes,
        status="saved" if saved.unfinished is None else "unfinished",
        text=saved.text,
    )


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> Health:
        """Whether the process responds."""
        return Health(status="live")

    @app.get("/health", responses=errors_of(503), tags=["health"])
    @app.get("/health/ready", responses=errors_of(503), tags=["health"])
    async def ready() -> Health:
        """Whether the server accepts requests: the model is loaded, the engine runs, and no shutdown has begun."""
        service.ready()
        return Health(status="ready")


def _add_page(app: FastAPI) -> None:
    text = files("bdh.serve").joinpath("page/index.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash_of(text, 'script')}; style-src {_hash_of(text, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})


def _hash_of(page: str, element: str) -> str:
    """Returns the hash of a page's only script or style as a source of a Content-Security-Policy."""
    (inner,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"


def _add_metrics(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        if service.metrics is None:
            service.ready()  # raises: no model is loaded
        assert service.metrics is not None
        return Response(
            generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _invalid(error.errors(), error.body).response()

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not allowed at {request.url.path}",
            400: "the request's body is not JSON",
        }.get(error.status_code, str(error.detail))
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(sorted(_methods(app, request)))
        return response

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        request.state.facts["gone"] = True
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        return internal_error().response()  # logged by the middleware


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Returns the methods allowed at a path. Each has its own route, except HEAD, which is answered like GET."""
    matching = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    found = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return found | {"HEAD"} if "GET" in found else found


def _invalid(faults: Sequence[Any], given: Any) -> ApiError:
    """Returns the most helpful error: an unknown field, else a wrong value before a wrong type, the deepest first."""
    found: list[tuple[str, str]] = []
    # Each member of a union reports an error. The least helpful one is that the type is different.
    for fault in sorted(faults, key=lambda fault: (fault["type"].endswith("_type"), -len(fault["loc"]))):
        source, *place = fault["loc"]
        if is_unknown := fault["type"] == "unknown_field":
            place.append(fault["ctx"]["name"])
        if source == "body":
            param = named(place, given, is_missing=fault["type"] == "missing")
        else:  # in the path or the query
            param = ".".join(map(str, place))
        if fault["type"] == "json_invalid":
            return bad_request(f"the request's body is not JSON: {fault['ctx']['error']}", None, "invalid_json")
        if is_unknown:
            near = fault["ctx"]["near"]
            message = f"{param} is not supported: leave it out{f'; did you mean {near}?' if near else ''}"
        elif fault["type"] == "value_error":  # from an object; begins with the name of a field
            message = str(fault["ctx"]["error"])
            inner = message.partition(":")[0]
            message = f"{param}.{message}" if param and inner else message
            param = ".".join(filter(None, (param, inner)))
        elif not place:
            message = "the request's body must be a JSON object, with Content-Type: application/json"
        else:
            message = f"{param}: {fault['msg']}"
        found.append((param, message))
    extra = [each for each in found if "is not supported" in each[1]]
    param, message = (extra or found)[0]
    return bad_request(message, param or None, "unsupported_field" if extra else "invalid_value")


def named(place: Sequence[str | int], given: Any, *, is_missing: bool = False) -> str:
    """Returns a location in a request as the client wrote it: ``messages.0.content``.

    Args:
        place: the keys and indices that lead there. It may also have names of types, which only the schema has.
        given: the request.
        is_missing: whether the last key is that of a missing field.
    """
    parts = []
    for number, key in enumerate(place, 1):
        is_there = key in given if isinstance(given, dict) else isinstance(given, list) and isinstance(key, int)
        if is_there:
            given = given[key]
        if is_there or (is_missing and number == len(place)):
            parts.append(str(key).encode(errors="replace").decode()[:_NAME_CHARACTERS])
    return ".".join(parts)


def _add_description(app: FastAPI, service: Service, *, needs_key: bool) -> None:
    """Adds to the OpenAPI description what depends on the settings and, once it is loaded, on the model."""
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
    header = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer", "minimum": 1}}
    for operation in [operation for path in described["paths"].values() for operation in path.values()]:
        responses = operation["responses"]
        responses.pop("422", None)  # this server answers 400 instead
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
    """Adds what depends on the model: the token ids, the width of embeddings, and whether a text may be empty."""
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
    """Yields a JSON object and all objects in it."""
    if isinstance(schema, dict):
        yield schema
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _objects(each)


def up_to(last: int) -> str:
    """Returns a regular expression that matches the integers from 0 to ``last``."""
    digits = str(last)
    found = ["0"] + [f"[1-9][0-9]{{{length - 1}}}" if length > 1 else "[1-9]" for length in range(1, len(digits))]
    for place, digit in enumerate(digits):
        least = 1 if place == 0 else 0
        if int(digit) > least:
            rest = len(digits) - place - 1
            found.append(f"{digits[:place]}[{least}-{int(digit) - 1}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join([*found, *([digits] if last else [])])
