"""/v1/embeddings: what texts leave in the residual stream of a model that was trained to continue them."""

import asyncio
import base64
import logging
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh.generate.params import SamplingParams
from bdh.generate.residuals import Residuals
from bdh.serve.errors import ApiError, bad_request, internal_error
from bdh.serve.events import unless_gone
from bdh.serve.fields import RequestModel
from bdh.serve.handling import caller_of, tokens_of
from bdh.serve.keys import RateLimits
from bdh.serve.logs import log
from bdh.serve.schemas import Prompt, as_whole
from bdh.serve.service import RETRY_SECONDS, CutOff, Generation, Job, Service

_AT_ONCE = 8  # texts of a request that are read at the same time: others' prompts wait for so many at most
_QUEUE_SECONDS = 0.1


class EmbeddingOptions(RequestModel):
    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="Of the residuals of all tokens (mean, the default), or that of the last."
    )
    normalize: bool | None = Field(default=None, description="To length 1, as OpenAI's are; true if not given.")


class EmbeddingRequest(RequestModel):
    input: Prompt = Field(description="Text, texts, token ids, or lists of them.")
    model: str | None = Field(default=None, description="A name that the server has; None for its first.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), BeforeValidator(as_whole)] | None = Field(
        default=None, description="The model's residual width, or left out."
    )
    user: str | None = Field(default=None, description="For the log.")
    bdh: EmbeddingOptions | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        is_one = isinstance(self.input, str) or isinstance(self.input[0], int)
        return [self.input] if is_one else list(self.input)  # type: ignore[arg-type, list-item]


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


class Embeddings:
    def __init__(self, service: Service, rates: RateLimits):
        self._service, self._rates = service, rates

    async def create(self, body: EmbeddingRequest, request: Request) -> Response:
        model = self._service.check_model(body.model)
        loaded, limits = self._service.ready(), self._service.settings.limits
        self._rates.begin(caller_of(request))
        request.state.facts.update(user=body.user)
        width = loaded.model.config.n_embd
        if body.dimensions not in (None, width):
            raise bad_request(f"dimensions is {body.dimensions}: must be {width}, or left out", "dimensions")
        if len(body.texts) > limits.embeddings:
            raise bad_request(
                f"the request has {len(body.texts):,} texts: must be at most {limits.embeddings:,}", "input"
            )
        jobs, residuals = [], []
        for number, text in enumerate(body.texts):
            param = "input" if text is body.input else f"input.{number}"
            tokens = await loaded.in_text_thread(tokens_of, loaded, text, param)
            residuals.append(Residuals())
            jobs.append(Job(tokens, SamplingParams(max_tokens=0), param=param, residuals=residuals[-1]))
        self._service.check_lengths(jobs)  # before the first of them is read
        await unless_gone(request.receive, lambda: self._read(jobs, request))
        options = body.bdh or EmbeddingOptions()
        vectors = [_vector(each, options) for each in residuals]
        num_tokens = sum(len(job.tokens) for job in jobs)
        answer = EmbeddingAnswer(
            data=[
                Embedding(
                    index=index, embedding=_encoded(vector) if body.encoding_format == "base64" else vector.tolist()
                )
                for index, vector in enumerate(vectors)
            ],
            model=model,
            usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )
        return JSONResponse(answer.model_dump())

    async def _read(self, jobs: Sequence[Job], request: Request) -> None:
        """Has the engine read all texts, a few at a time, as it reads prompts.

        Raises:
            ApiError: as :meth:`Service.begin`; 500, or 503.
        """
        limits = self._service.settings.limits
        size = min(_AT_ONCE, limits.prompts)
        num_tokens = 0
        try:
            for first in range(0, len(jobs), size):
                group = jobs[first : first + size]
                generation = await self._admitted(group, request, is_first=first == 0)
                num_tokens += sum(len(job.tokens) for job in group)
                try:
                    await _finish(generation)
                finally:
                    generation.close()
        finally:
            self._rates.charge(caller_of(request), num_tokens)
            request.state.facts.update(prompt_tokens=num_tokens)

    async def _admitted(self, jobs: Sequence[Job], request: Request, *, is_first: bool) -> Generation:
        """Those after the first wait where the queue is full: what has been read is not to be asked for again."""
        arrived, seconds = request.state.arrived, self._service.settings.limits.request_timeout
        while True:
            now = time.monotonic()
            if now - arrived > seconds:
                raise ApiError(
                    503,
                    f"the request has run for {now - arrived:.0f} seconds, which is as long as it may: send fewer texts",
                    code="request_timeout",
                    retry_after=RETRY_SECONDS,
                )
            try:
                return await self._service.begin(jobs, caller=caller_of(request), arrived=arrived if is_first else now)
            except ApiError as error:
                if is_first or error.code != "queue_full":
                    raise
            await asyncio.sleep(_QUEUE_SECONDS)


async def _finish(generation: Generation) -> None:
    """Waits until all texts have been read."""
    try:
        while not generation.is_done:
            come = await generation.next()
            completion = None if come is None else come.output.completion
            if completion is not None and completion.finish_reason == "error":
                log("a text could not be read", level=logging.ERROR, reason=completion.error)
                raise internal_error()
    except CutOff:
        raise _ended() from None
    if generation.is_cut_off:
        raise _ended()


def _ended() -> ApiError:
    message = "the server has ended before the texts were read"
    return ApiError(503, message, code="draining", retry_after=RETRY_SECONDS)


def _vector(residuals: Residuals, options: EmbeddingOptions) -> np.ndarray:
    """Float32, (D,)."""
    vector = residuals.mean if options.pooling != "last" else residuals.last
    assert vector is not None
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if options.normalize is False or length == 0:
        return vector
    return (vector / length).astype(np.float32)


def _encoded(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
