"""The routes."""

import asyncio
import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp

import bdh
from bdh.serve import response_schemas, schemas
from bdh.serve.describe import describe
from bdh.serve.embeddings import EmbeddingAnswer, EmbeddingRequest, Embeddings
from bdh.serve.errors import ApiError, bad_request, internal_error
from bdh.serve.fields import named
from bdh.serve.handling import Handler, no_state
from bdh.serve.keys import ApiKeys, RateLimits
from bdh.serve.middleware import ClientGone, Front
from bdh.serve.responses import Responses
from bdh.serve.service import Loaded, Service
from bdh.serve.states import SavedState
from bdh.serve.tokens import tokenizer_info

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
    507: "There is no room for the state.",
}


def make_app(service: Service, keys: ApiKeys) -> ASGIApp:
    """The application. Its service may still be loading."""
    settings = service.settings
    app = FastAPI(
        title="BDH",
        summary="OpenAI's API over a Dragon Hatchling language model.",
        version=bdh.__version__,
        redirect_slashes=False,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        telemetry={
            "tracing": settings.telemetry,
            "metrics": settings.telemetry,
            "logs": False,
            "auto_configure": settings.telemetry,
        },
        responses={
            status: {"model": schemas.ErrorBody, "description": about}
            for status, about in _ERRORS.items()
            if status in (400, 405, 408, 413, 500)
        },
    )
    app.state.service = service
    _add_errors(app)
    _add_health(app, service)
    rates = RateLimits(settings.auth)
    _add_routes(app, service, Handler(service, rates))
    _add_responses(app, Responses(service, rates))
    _add_embeddings(app, Embeddings(service, rates))
    describe(app, service, keys)
    open_paths = {*_HEALTH, "/openapi.json"}
    if settings.page:
        _add_page(app)
        open_paths.add("/")
    if settings.metrics:
        _add_metrics(app, service)
        open_paths.add("/metrics")

    front: ASGIApp = Front(
        app, keys=keys, limits=settings.limits, open_paths=frozenset(open_paths), answered=service.answered
    )
    if settings.cors_origins:
        front = CORSMiddleware(
            front, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    return front


def _also(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorBody, "description": _ERRORS[status]} for status in statuses}


def _add_routes(app: FastAPI, service: Service, handler: Handler) -> None:
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post(
        "/v1/completions",
        response_model=schemas.CompletionAnswer,
        responses={**_also(401, 404, 429, 503, 507), **streams},
        tags=["texts"],
    )
    async def complete(body: schemas.CompletionRequest, request: Request) -> Response:
        return await handler.complete(body, request)

    @app.post(
        "/v1/chat/completions",
        response_model=schemas.ChatAnswer,
        responses={**_also(401, 404, 429, 503, 507), **streams},
        tags=["texts"],
    )
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        return await handler.chat(body, request)

    @app.get("/v1/models", responses=_also(401, 503), tags=["models"])
    async def models() -> schemas.ModelList:
        loaded = service.ready()
        return schemas.ModelList(data=[_model_facts(loaded, name) for name in loaded.model_names])

    @app.get("/v1/models/{model:path}", responses=_also(401, 404, 503), tags=["models"])
    async def model(model: str) -> schemas.ModelFacts:
        return _model_facts(service.ready(), service.check_model(model))

    @app.post("/tokenize", responses=_also(401, 404, 503), tags=["tokens"])
    async def tokenize(body: schemas.TokenizeRequest) -> schemas.TokenizeAnswer:
        service.check_model(body.model)
        loaded = service.ready()
        if body.messages is not None:
            tokens = await loaded.in_text_thread(loaded.chat.encode, [message.plain() for message in body.messages])
        else:
            tokens = await loaded.in_text_thread(_encode, loaded, body.text, bool(body.add_special_tokens))
        return schemas.TokenizeAnswer(tokens=tokens, count=len(tokens))

    @app.get("/tokenizer_info", responses=_also(401, 503), tags=["tokens"])
    async def info() -> schemas.TokenizerInfo:
        loaded, limits = service.ready(), service.settings.limits
        return schemas.TokenizerInfo(**tokenizer_info(loaded.tokenizer, loaded.chat.template, limits.prompt_tokens))

    @app.post("/detokenize", responses=_also(401, 404, 503), tags=["tokens"])
    async def detokenize(body: schemas.DetokenizeRequest) -> schemas.DetokenizeAnswer:
        service.check_model(body.model)
        loaded = service.ready()
        vocab_size = loaded.model.config.vocab_size
        if wrong := [token for token in body.tokens if token >= vocab_size][:3]:
            raise bad_request(f"the token ids {wrong} are not there: must be within 0 and {vocab_size - 1}", "tokens")
        return schemas.DetokenizeAnswer(prompt=await loaded.in_text_thread(_decode, loaded, body.tokens))

    @app.get("/v1/states", responses=_also(401, 503), tags=["states"])
    async def states(request: Request) -> schemas.StateList:
        found = await asyncio.to_thread(service.ready().states.of_owner, request.state.caller.id)
        return schemas.StateList(data=[_state_facts(saved) for saved in found])

    @app.get("/v1/states/{state_id}", responses=_also(401, 404, 503), tags=["states"])
    async def state(state_id: str, request: Request) -> schemas.StateFacts:
        try:
            return _state_facts(service.ready().states.get(state_id, request.state.caller.id))
        except KeyError:
            raise no_state(state_id) from None

    @app.delete("/v1/states/{state_id}", responses=_also(401, 404, 503), tags=["states"])
    async def delete_state(state_id: str, request: Request) -> schemas.Deleted:
        try:
            await asyncio.to_thread(service.ready().states.delete, state_id, request.state.caller.id)
        except KeyError:
            raise no_state(state_id) from None
        return schemas.Deleted(id=state_id)


def _add_responses(app: FastAPI, responses: Responses) -> None:
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post(
        "/v1/responses",
        response_model=response_schemas.ResponseAnswer,
        responses={**_also(401, 404, 429, 503), **streams},
        tags=["responses"],
    )
    async def create(body: response_schemas.ResponseRequest, request: Request) -> Response:
        return await responses.create(body, request)

    @app.get("/v1/responses/{response_id}", responses=_also(401, 404, 503), tags=["responses"])
    async def response(
        response_id: str, request: Request, stream: Literal["false"] = "false"
    ) -> response_schemas.ResponseAnswer:
        return response_schemas.ResponseAnswer(**responses.get(response_id, request.state.caller))

    @app.delete("/v1/responses/{response_id}", responses=_also(401, 404, 503), tags=["responses"])
    async def delete_response(response_id: str, request: Request) -> response_schemas.ResponseDeleted:
        await responses.delete(response_id, request.state.caller)
        return response_schemas.ResponseDeleted(id=response_id)

    @app.get("/v1/responses/{response_id}/input_items", responses=_also(401, 404, 503), tags=["responses"])
    async def input_items(
        response_id: str,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> response_schemas.InputItems:
        return responses.input_items(
            response_id, request.state.caller, after=after, limit=limit, is_ascending=order == "asc"
        )


def _add_embeddings(app: FastAPI, embeddings: Embeddings) -> None:
    @app.post(
        "/v1/embeddings",
        response_model=EmbeddingAnswer,
        responses=_also(401, 404, 429, 503),
        tags=["embeddings"],
    )
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return await embeddings.create(body, request)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["health"])
    async def live() -> schemas.Health:
        """The process answers."""
        return schemas.Health(status="live")

    async def ready() -> schemas.Health:
        """Requests are taken: the model is loaded, its engine runs, and the server is not ending."""
        service.ready()
        return schemas.Health(status="ready")

    for path in ("/health", "/health/ready"):
        app.get(path, responses=_also(503), tags=["health"])(ready)


def _add_page(app: FastAPI) -> None:
    text = files("bdh.serve").joinpath("page/index.html").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash_of(text, 'script')}",
            f"style-src {_hash_of(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
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
        return internal_error().response()  # logged by the front


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


def _model_facts(loaded: Loaded, name: str) -> schemas.ModelFacts:
    config = loaded.model.config
    facts = {
        "layers": config.n_layer,
        "heads": config.n_head,
        "neurons_per_head": config.neurons_per_head,
        "vocabulary": config.vocab_size,
        "chat": loaded.chat.is_possible,
        "state_bytes": loaded.front.engine.stepper.state_bytes,
        "path": loaded.front.engine.stepper.path,
    }
    return schemas.ModelFacts(id=name, created=loaded.created, owned_by="bdh", bdh=facts)


def _state_facts(saved: SavedState) -> schemas.StateFacts:
    return schemas.StateFacts(
        id=saved.id,
        created=int(saved.created),
        model=saved.model,
        tokens=saved.num_tokens,
        bytes=saved.nbytes,
        status="saved" if saved.unfinished is None else "unfinished",
        text=saved.text,
    )


def _encode(loaded: Loaded, text: str, add_special_tokens: bool) -> list[int]:
    ids: Any = loaded.tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
    return list(ids)


def _decode(loaded: Loaded, tokens: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
