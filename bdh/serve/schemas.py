"""What requests and answers look like. A field that is not here is refused, unless it asks for nothing."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bdh.generate.activity import MOST_NEURONS
from bdh.generate.params import SamplingParams
from bdh.serve.fields import WITHOUT_EFFECT, RequestModel
from bdh.serve.formats import Grammar, ResponseFormat


def as_whole(value: Any) -> Any:
    """A number as 2.0 is a whole one in JSON Schema."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_LIMIT = 2**31 - 1
_MOST_SEED = 9_223_372_036_854_776_000  # 2**63, as descriptions of APIs have it, whose numbers are float64
Whole = Annotated[int, Field(ge=0, le=_LIMIT), BeforeValidator(as_whole)]
Positive = Annotated[int, Field(ge=1, le=_LIMIT), BeforeValidator(as_whole)]
TokenId = Whole
Text = Annotated[str, Field(min_length=1)]
Prompt = (
    str
    | Annotated[list[str], Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)


class StreamOptions(RequestModel):
    without_effect = WITHOUT_EFFECT["stream_options"]
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="Usage so far in each chunk.")

    @property
    def are_needed(self) -> bool:
        """Whether they ask for anything."""
        return bool(self.include_usage or self.continuous_usage_stats)


class Extras(RequestModel):
    """What only a model with a state of fixed size can do."""

    save_state: bool | None = Field(default=None, description="Keep the state behind the text; the answer has its id.")
    from_state: str | None = Field(default=None, description="Go on from a saved state, without reading it again.")
    activations: Annotated[int, Field(ge=0, le=MOST_NEURONS), BeforeValidator(as_whole)] | None = Field(
        default=None,
        description="With each streamed token the share of neurons that fired in each pass, and so many of the strongest.",
    )


class Sampling(RequestModel):
    """What all requests for texts have."""

    model: str | None = Field(default=None, description="A name that the server has; null, or empty, for its first.")
    temperature: float | None = Field(
        default=None, ge=0, le=100, description="0 takes the likeliest token; else at least 1e-6."
    )
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 takes the likeliest token.")
    top_k: Annotated[int, Field(ge=-1, le=_LIMIT), BeforeValidator(as_whole)] | None = Field(
        default=None, description="0 or -1 for all tokens."
    )
    min_p: float | None = Field(default=None, ge=0, lt=1)
    stop: str | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED), BeforeValidator(as_whole)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    repetition_penalty: float | None = Field(default=None, ge=1e-6, le=100)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = Field(default=None, description="For the log.")

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    def params(self, *, max_tokens: int, stops: list[str], stop_token_ids: list[int]) -> SamplingParams:
        """How the engine samples, but for what only one kind of request has."""
        given = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "n",
                "seed",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "ignore_eos",
            )
            if getattr(self, name, None) is not None
        }
        if given.get("seed", 0) < -(2**63):
            given["seed"] %= 2**64  # the few beyond what PyTorch takes
        if self.top_p == 0:  # no tokens but the likeliest
            given |= {"temperature": 0.0, "top_p": 1.0}
        stop = [self.stop] if isinstance(self.stop, str) and self.stop else list(self.stop or [])
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            top_k=max(0, self.top_k or 0),
            stop=[*stop, *stops],
            stop_token_ids=[*(self.stop_token_ids or []), *stop_token_ids],
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            grammar=self.grammar(),
        )

    def grammar(self) -> Grammar | None:
        """The form that the text must have, for ``SamplingParams``; None for any."""
        return None

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < 1e-6:
            raise ValueError("temperature: must be 0, or at least 1e-6")
        if self.logit_bias is not None and len(set(map(int, self.logit_bias))) < len(self.logit_bias):
            raise ValueError("logit_bias: has a token twice, with and without leading zeros")
        return self


class _Generation(Sampling):
    """What completions and chats have."""

    without_effect = WITHOUT_EFFECT["request"]
    n: Positive | None = None
    response_format: ResponseFormat | None = Field(default=None, description="The form that the text must have.")
    stream_options: StreamOptions | None = None
    bdh: Extras | None = None

    @property
    def extras(self) -> Extras:
        return self.bdh or Extras()

    def grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and self.stream_options.are_needed and not self.is_stream:
            raise ValueError("stream_options: only with stream")
        if self.bdh is not None and self.bdh.activations is not None and not self.is_stream:
            raise ValueError("bdh.activations: only with stream")
        return self


class CompletionRequest(_Generation):
    prompt: Prompt = Field(description="Text, texts, token ids, or lists of them.")
    max_tokens: Whole | None = Field(default=None, description="16 if not given.")
    best_of: Positive | None = Field(default=None, description="Texts generated, of which the likeliest is given.")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5), BeforeValidator(as_whole)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        if (self.best_of or 1) > 1 and self.is_stream:
            raise ValueError("best_of: only without stream")
        if self.best_of is not None and self.n not in (None, 1):
            raise ValueError("best_of: only with n left out, or 1: the likeliest is given")
        return self


class TextPart(RequestModel):
    without_effect = WITHOUT_EFFECT["content part"]
    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    without_effect = WITHOUT_EFFECT["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = Field(default=None, description="An assistant's may be left out: no text.")

    @model_validator(mode="after")
    def _check_content(self) -> "ChatMessage":
        if self.role != "assistant" and self.content in (None, []):
            raise ValueError(f"content: is needed in a message of the role {self.role}")
        return self

    def plain(self) -> dict[str, str]:
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Generation):
    messages: list[ChatMessage] = Field(min_length=1, description="With bdh.from_state only the new ones.")
    max_tokens: Positive | None = Field(default=None, description="The same as max_completion_tokens.")
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), BeforeValidator(as_whole)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: is the same as max_tokens, of which only one may be given")
        return self


class TokenizeRequest(RequestModel):
    without_effect = WITHOUT_EFFECT["tokenize"]
    model: str | None = None
    prompt: str | None = Field(default=None, description="A text, in which nothing is a special token.")
    content: str | None = Field(default=None, description="The same as prompt.")
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, description="Or a conversation.")
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put around a text what the tokenizer does. A conversation has what its template says.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TokenizeRequest":
        if [self.prompt, self.content, self.messages].count(None) != 2:
            raise ValueError("prompt: one of prompt, content and messages is needed")
        if self.add_special_tokens and self.messages is not None:
            raise ValueError("add_special_tokens: only with prompt or content, a chat template has its own")
        return self

    @property
    def text(self) -> str:
        return (self.prompt if self.content is None else self.content) or ""


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]


class ErrorFacts(BaseModel):
    model_config = ConfigDict(extra="allow")
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorFacts


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None
    bdh: dict[str, Any] | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatChoice(BaseModel):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: Literal["stop", "length"] | None
    bdh: dict[str, Any] | None = None


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelFacts(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    bdh: dict[str, Any]


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
    added_tokens_decoder: dict[str, dict[str, Any]]


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
