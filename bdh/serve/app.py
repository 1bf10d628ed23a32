"""The application: its routes, and the shape of its errors."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp

import bdh
from bdh.serve.completions import add_completions, no_state
from bdh.serve.describe import describe
from bdh.serve.embeddings import add_embeddings
from bdh.serve.errors import ApiError, bad_request, internal_error
from bdh.serve.fields import named
from bdh.serve.keys import ApiKeys
from bdh.serve.middleware import ClientGone, RequestMiddleware, error_response
from bdh.serve.responses import add_responses
from bdh.serve.schemas import DetokenizeRequest, Json, TokenizeRequest
from bdh.serve.service import Loaded, Service
from bdh.serve.states import SavedState
from bdh.serve.text import decode_tokens, encode_text, tokenizer_info

_CLIENT_GONE = 499  # what nginx calls it; for log and metrics only
_HEALTH = ("/health", "/health/live", "/health/ready")
_ERRORS = {
    400: "Something in the request is wrong; `param` names it.",
    401: "An API key is needed.",
    404: "There is no such model, state or page.",
    405: "Not this method.",
    408: "The request has not come in time.",
    413: "The request is too large.",
    429: "Too many requests; Retry-After says when to ask again.",
    500: "A fault of the server.",
    503: "The model is loading, the server is ending, or it took too long; Retry-After says when to ask again.",
    507: "The state does not fit.",
}


class ErrorFacts(BaseModel):
    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorFacts


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
    """What a tokenizer's tokenizer_config.json has. Special tokens that it has not are null."""

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
    """The application. Its service may still be loading."""
    settings = service.settings
    exported = settings.telemetry
    app = FastAPI(
        title="BDH",
        summary="OpenAI's API over a Dragon Hatchling language model.",
        version=bdh.__version__,
        redirect_slashes=False,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": exported, "metrics": exported, "logs": False, "auto_configure": exported},
        responses=_errors(400, 405, 408, 413, 500),
    )
    _add_errors(app)
    _add_health(app, service)
    add_completions(app, service, _errors(401, 404, 429, 503, 507))
    _add_models(app, service)
    _add_states(app, service)
    add_responses(app, service, _errors(401, 404, 429, 503), _errors(401, 404, 503))
    add_embeddings(app, service, _errors(401, 404, 429, 503))
    describe(app, service, needs_key=keys.are_needed)
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


def _errors(*statuses: int) -> dict[int | str, Json]:
    """Their descriptions."""
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=_errors(401, 503), tags=["models"])
    async def models() -> ModelList:
        loaded = service.ready()
        return ModelList(data=[_model_facts(loaded, name) for name in loaded.model_names])

    @app.get("/v1/models/{model:path}", responses=_errors(401, 404, 503), tags=["models"])
    async def model(model: str) -> ModelFacts:
        return _model_facts(service.ready(), service.check_model(model))

    @app.post("/tokenize", responses=_errors(401, 404, 503), tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        service.check_model(body.model)
        loaded = service.ready()
        if body.messages is not None:
            tokens = await loaded.in_text_thread(loaded.chat.encode, [message.plain() for message in body.messages])
        else:
            text = (body.prompt if body.content is None else body.content) or ""
            with_special = bool(body.add_special_tokens)
            tokens = await loaded.in_text_thread(
                lambda: encode_text(loaded.tokenizer, text, add_special_tokens=with_special)
            )
        return TokenizeAnswer(tokens=tokens, count=len(tokens))

    @app.get("/tokenizer_info", responses=_errors(401, 503), tags=["tokens"])
    async def info() -> TokenizerInfo:
        loaded, limits = service.ready(), service.settings.limits
        return TokenizerInfo(**tokenizer_info(loaded.tokenizer, loaded.chat.template, limits.prompt_tokens))

    @app.post("/detokenize", responses=_errors(401, 404, 503), tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        service.check_model(body.model)
        loaded = service.ready()
        if wrong := [token for token in body.tokens if token >= loaded.vocab_size][:3]:
            last = loaded.vocab_size - 1
            raise bad_request(f"the token ids {wrong} are not there: must be within 0 and {last}", "tokens")
        return DetokenizeAnswer(prompt=await loaded.in_text_thread(decode_tokens, loaded.tokenizer, body.tokens))


def _model_facts(loaded: Loaded, name: str) -> ModelFacts:
    config, advancer = loaded.model.config, loaded.engine.engine.advancer
    facts = {
        "layers": config.n_layer,
        "heads": config.n_head,
        "neurons_per_head": config.neurons_per_head,
        "vocabulary": config.vocab_size,
        "chat": loaded.chat.template is not None,
        "state_bytes": advancer.state_bytes,
        "path": advancer.description,
    }
    return ModelFacts(id=name, created=loaded.created, bdh=facts)


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/v1/states", responses=_errors(401, 503), tags=["states"])
    async def states(request: Request) -> StateList:
        found = await asyncio.to_thread(service.ready().states.of_owner, request.state.caller.id)
        return StateList(data=[_state_facts(saved) for saved in found])

    @app.get("/v1/states/{state_id}", responses=_errors(401, 404, 503), tags=["states"])
    async def state(state_id: str, request: Request) -> StateFacts:
        try:
            return _state_facts(service.ready().states.get(state_id, request.state.caller.id))
        except KeyError:
            raise no_state(state_id) from None

    @app.delete("/v1/states/{state_id}", responses=_errors(401, 404, 503), tags=["states"])
    async def delete_state(state_id: str, request: Request) -> Deleted:
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
        """The process answers."""
        return Health(status="live")

    @app.get("/health", responses=_errors(503), tags=["health"])
    @app.get("/health/ready", responses=_errors(503), tags=["health"])
    async def ready() -> Health:
        """Requests are taken: the model is loaded, its engine runs, and the server is not ending."""
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
    """What a Content-Security-Policy calls the one script, or style, of a page."""
    (inner,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"


def _add_metrics(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        if service.metrics is None:
            service.ready()  # raises: nothing is loaded
        assert service.metrics is not None
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_invalid(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> Response:
        message = {
            404: f"there is nothing at {request.url.path}",
            405: f"{request.method} is not allowed at {request.url.path}",
            400: "the request's body is not JSON",
        }.get(error.status_code, str(error.detail))
        response = error_response(ApiError(error.status_code, message))
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
        return error_response(internal_error())  # logged by the middleware


def _methods(app: FastAPI, request: Request) -> set[str]:
    """Those of all routes at a path: each method has a route of its own, but for HEAD, which is answered as GET."""
    matching = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    found = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return found | {"HEAD"} if "GET" in found else found


def _invalid(faults: Sequence[Any], given: Any) -> ApiError:
    """The fault that says most: what is no field of ours; then what is out of range; then what is deepest."""
    found: list[tuple[str, str]] = []
    # Of a union each member complains: that it has another type says least.
    for fault in sorted(faults, key=lambda fault: (fault["type"].endswith("_type"), -len(fault["loc"]))):
        source, *place = fault["loc"]
        if source == "body":
            param = named(place, given, is_missing=fault["type"] == "missing")
        else:  # of the path or the query
            param = ".".join(map(str, place))
        if fault["type"] == "json_invalid":
            return bad_request(f"the request's body is not JSON: {fault['ctx']['error']}", None, "invalid_json")
        if fault["type"] == "extra_forbidden":
            message = f"{param} is not supported: leave it out"
        elif fault["type"] == "value_error":  # of an object, and begins with the name of its field
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
