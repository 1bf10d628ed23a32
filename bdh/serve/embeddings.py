"""/v1/embeddings: what texts leave in the residual stream of a model that was trained to continue them."""

import asyncio
import base64
import logging
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh.generate.advance import Residuals
from bdh.generate.params import SamplingParams
from bdh.serve.errors import ApiError, bad_request, internal_error, unavailable
from bdh.serve.middleware import unless_gone
from bdh.serve.monitoring import log
from bdh.serve.schemas import EmbeddingOptions, EmbeddingRequest, Json
from bdh.serve.service import CutOff, Generation, PromptRequest, Service
from bdh.serve.text import prompt_tokens

_AT_ONCE = 8  # texts of a request that are read at the same time: others' prompts wait for so many at most
_QUEUE_SECONDS = 0.1


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="As text: the float32 numbers, little-endian, in base64.")


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def add_embeddings(app: FastAPI, service: Service, errors: dict[int | str, Json]) -> None:
    @app.post("/v1/embeddings", response_model=EmbeddingAnswer, responses=errors, tags=["embeddings"])
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        return JSONResponse((await _embed(service, body, request)).model_dump())


async def _embed(service: Service, body: EmbeddingRequest, request: Request) -> EmbeddingAnswer:
    model = service.begin(body, request)
    loaded, most = service.ready(), service.settings.limits.embeddings
    width = loaded.model.config.n_embd
    if body.dimensions not in (None, width):
        raise bad_request(f"dimensions is {body.dimensions}: must be {width}, or left out", "dimensions")
    texts = body.texts
    if len(texts) > most:
        raise bad_request(f"the request has {len(texts):,} texts: must be at most {most:,}", "input")
    prompts, residuals = [], []
    for number, text in enumerate(texts):
        param = "input" if text is body.input else f"input.{number}"
        tokens = await loaded.in_text_thread(prompt_tokens, loaded.tokenizer, loaded.vocab_size, text, param)
        residuals.append(Residuals())
        prompts.append(PromptRequest(tokens, SamplingParams(max_tokens=0), residuals=residuals[-1], param=param))
    service.check_lengths(prompts)  # before the first of them is read
    await unless_gone(request.receive, lambda: _read(service, prompts, request))
    vectors = [_vector(each, body.bdh or EmbeddingOptions()) for each in residuals]
    num_tokens = sum(len(prompt.prompt) for prompt in prompts)
    is_text = body.encoding_format == "base64"
    return EmbeddingAnswer(
        data=[
            Embedding(
                index=index,
                embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_text else vector.tolist(),
            )
            for index, vector in enumerate(vectors)
        ],
        model=model,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )


async def _read(service: Service, prompts: Sequence[PromptRequest], request: Request) -> None:
    """Has the engine read all texts, a few at a time, as it reads prompts.

    Raises:
        ApiError: as :meth:`Generation.submit`; 500, or 503.
    """
    size, num_tokens = min(_AT_ONCE, service.settings.limits.prompts), 0
    try:
        for first in range(0, len(prompts), size):
            group = prompts[first : first + size]
            generation = await _admitted(service, group, request, is_first=first == 0)
            num_tokens += sum(len(prompt.prompt) for prompt in group)
            try:
                await _finish(generation)
            finally:
                generation.close()
    finally:
        service.rates.charge(request.state.caller, num_tokens)
        request.state.facts["prompt_tokens"] = num_tokens


async def _admitted(
    service: Service, prompts: Sequence[PromptRequest], request: Request, *, is_first: bool
) -> Generation:
    """Those after the first wait where the queue is full: what has been read is not to be asked for again."""
    arrived, seconds = request.state.arrived, service.settings.limits.request_timeout
    while True:
        now = time.monotonic()
        if now - arrived > seconds:
            message = (
                f"the request has run for {now - arrived:.0f} seconds, which is as long as it may: send fewer texts"
            )
            raise unavailable(message, "request_timeout")
        generation = Generation(service, prompts, request, arrived if is_first else now)
        try:
            await generation.submit()
            return generation
        except ApiError as error:
            if is_first or error.code != "queue_full":
                raise
        await asyncio.sleep(_QUEUE_SECONDS)


async def _finish(generation: Generation) -> None:
    """Waits until all texts have been read."""
    try:
        async for item in generation.outputs():
            completion = None if item is None else item[1].completion
            if completion is not None and completion.finish_reason == "error":
                log("a text could not be read", level=logging.ERROR, reason=completion.error)
                raise internal_error()
    except CutOff:
        raise unavailable("the server has ended before the texts were read", "draining") from None


def _vector(residuals: Residuals, options: EmbeddingOptions) -> np.ndarray:
    """Float32, (D,)."""
    vector = residuals.mean if options.pooling != "last" else residuals.last
    assert vector is not None
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if options.normalize is False or length == 0:
        return vector
    return (vector / length).astype(np.float32)
