"""A running sequence: sampling its next token, decoding its text, and detecting its end."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from bdh.generate.advance import LayerActivity, Residuals
from bdh.generate.grammar import Matcher
from bdh.generate.params import DrawSettings, SamplingParams
from bdh.generate.snapshot import Snapshot
from bdh.model.network import ModelParts
from bdh.model.state import SynapticState
from bdh.model.weights import WeightsMark, weights_mark
from bdh.tokenizer.plain import PlainTokenizer, document_end_id

if TYPE_CHECKING:
    from llguidance import LLMatcher

_logger = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "abort", "error"]
Prompt = str | Sequence[int]
"""A string, in which nothing is parsed as a special token, or a sequence of token ids."""

_REPLACEMENT = "\ufffd"  # decoders return it for bytes that are not, or not yet, a character
_MAX_UNFINISHED = 3  # the most bytes of an incomplete character, which has at most 4 when complete
CONTEXT_TOKENS = 8
"""The number of tokens before a text to decode with it: whether a word piece starts with a space depends on them."""
_WINDOW_TOKENS = 64


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Returns the token ids of a prompt, without parsing special tokens. An empty prompt becomes ``<bos>``.

    Raises:
        ValueError: the prompt is empty and the tokenizer has neither ``<bos>`` nor ``<eos>`` to start from.
    """
    if ids := PlainTokenizer.of(tokenizer).encode(prompt):
        return ids
    for start in (tokenizer.bos_token_id, document_end_id(tokenizer)):
        if start is not None:
            return [start]
    raise ValueError(
        "the prompt is empty, and this tokenizer has no <bos> token to start from: give at least one character"
    )


def text_of(tokenizer: Any, tokens: Sequence[int], context: Sequence[int] = ()) -> str:
    """Returns the complete text of tokens, as :class:`TextDecoder` returns it in pieces."""
    decoder = TextDecoder(tokenizer, context=context)
    return decoder.push(tokens) + decoder.flush()


class TextDecoder:
    """Decodes a stream of token ids, holding back incomplete characters and possible beginnings of stop strings.

    When a stop string is complete, ``stopped`` becomes True, ``stopped_by`` is the string, and no further text follows.

    Args:
        tokenizer: a ``PreTrainedTokenizerFast`` or a :class:`PlainTokenizer`.
        stop: the stop strings.
        context: the tokens before the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._backend, self._stop = tokenizer.backend_tokenizer, list(stop)
        # Only the last tokens: decoding all tokens again for each new one would take quadratic time.
        self._window: list[int] = list(context[-CONTEXT_TOKENS:])
        # The characters of the window's text that were returned, are in `_pending`, or belong to the context.
        self._num_decoded = len(self._decode())
        self._pending = ""  # decoded text that may be the beginning of a stop string
        self.stopped = False
        self.stopped_by: str | None = None

    def state(self) -> dict[str, Any]:
        """Returns the decoder's state as JSON types."""
        held = {"window": list(self._window), "num_decoded": self._num_decoded, "pending": self._pending}
        return {**held, "stopped": self.stopped}

    @classmethod
    def from_state(cls, tokenizer: Any, stop: Sequence[str], state: dict[str, Any]) -> "TextDecoder":
        """Restores a decoder. Text that was held back is released if no stop string begins with it."""
        decoder = cls(tokenizer, stop)
        decoder._window, decoder._num_decoded = list(state["window"]), state["num_decoded"]
        decoder._pending, decoder.stopped = state["pending"], state["stopped"]
        return decoder

    def push(self, token_ids: Sequence[int], *, stops: bool = True) -> str:
        """Adds tokens, and returns the text that is certain now, which is often empty.

        Args:
            token_ids: the further tokens.
            stops: whether stop strings can end the text.
        """
        if self.stopped:
            return ""
        self._window.extend(token_ids)
        text = self._decode()
        num_unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
        certain = len(text) - min(num_unfinished, _MAX_UNFINISHED)
        new = text[self._num_decoded : certain]
        self._num_decoded = max(self._num_decoded, certain)
        if num_unfinished == 0 and len(self._window) >= _WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._num_decoded = len(self._decode())
        return self._release(new, self._stop if stops else [])

    def flush(self) -> str:
        """Returns the text that was held back, at the end of the text."""
        if self.stopped:
            return ""
        rest = self._release(self._decode()[self._num_decoded :], self._stop)
        rest, self._pending = rest + self._pending, ""
        return rest

    def _decode(self) -> str:
        # Without cleaning up spaces, which depends on later characters and could change text that was returned already.
        return self._backend.decode(self._window, skip_special_tokens=True)

    def _release(self, new: str, stop: Sequence[str]) -> str:
        text = self._pending + new
        if found := [(at + len(s), at, s) for s in stop if (at := text.find(s)) >= 0]:
            # The stop string that was completed first, as it would be if the text came character by character.
            _, cut, self.stopped_by = min(found)
            self._pending, self.stopped = "", True
        else:
            most = min(len(text), max(map(len, stop), default=1) - 1)
            held = (n for n in range(most, 0, -1) if any(n < len(s) and text.endswith(s[:n]) for s in stop))
            cut = len(text) - next(held, 0)
            self._pending = text[cut:]
        return text[:cut]


@dataclass
class TokenLogprobs:
    """The log-probabilities (natural) of a token and of the likeliest tokens, before temperature and penalties."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The likeliest tokens with their log-probabilities, as many as requested."""

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, num_top: int) -> "TokenLogprobs":
        """Returns the log-probabilities for a token under logits (V,)."""
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(num_top, len(logprobs)))
        return cls(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def generator_of(seed: int | None) -> torch.Generator:
    """Returns a random generator with a seed, or with a random one for None."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class Sampler:
    """Samples the tokens of one sequence. They depend only on the seed and the text.

    Args:
        prompt: the tokens before the generated ones, which only count for the repetition penalty.
        generated: the tokens that have been generated already, if a sequence continues.
        end_token_ids: the tokens that are forbidden before ``min_tokens``.
        generator: the random generator, instead of a new one with the seed.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt: Iterable[int] = (),
        generated: Iterable[int] = (),
        end_token_ids: Iterable[int] = (),
        index: int = 0,
        generator: torch.Generator | None = None,
    ):
        self._params = params
        self.generator = generator or generator_of(params.seed_of(index))
        self._end_token_ids = torch.tensor(sorted(set(end_token_ids)), dtype=torch.int64)
        self._bias: torch.Tensor | None = None
        if params.logit_bias:
            self._bias = torch.zeros(vocab_size)
            self._bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()))
        self._seen: torch.Tensor | None = None  # bool (V,): the tokens in the text, for the repetition penalty
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[list(prompt)] = True
        has_counts = params.presence_penalty or params.frequency_penalty
        self._counts = torch.zeros(vocab_size) if has_counts else None
        for token in generated:
            self._count(token)
        self._num_generated = 0  # the tokens generated by this request

    def sample(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        """Samples the next token from float32 logits (V,), which are not modified.

        Args:
            logits: the logits.
            allowed: bool (V,), the tokens that are allowed; None for all.

        Raises:
            ValueError: the logits contain NaN, or no token is possible.
        """
        if bool(logits.isnan().any()):
            raise ValueError("the model's logits hold NaN: no token can be drawn from them")
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        scores = self._adjusted(logits)
        if allowed is not None and bool(scores.isneginf().all()):
            raise ValueError("the model's logits rule out all tokens that the grammar allows: none can be drawn")
        if self._params.temperature == 0:
            token = int(scores.argmax())
        else:
            probabilities = warped(scores, self._params).softmax(-1)
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        self._count(token)
        self._num_generated += 1
        return token

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """Applies penalties and biases, in the order of OpenAI's API and transformers."""
        params, scores = self._params, logits
        if self._seen is not None:
            factor = params.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * factor, scores / factor), scores)
        if self._counts is not None:
            scores = scores - params.frequency_penalty * self._counts - params.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            scores = scores + self._bias
        if self._num_generated < params.min_tokens and len(self._end_token_ids):
            scores = scores.index_fill(0, self._end_token_ids, -torch.inf)
        return scores

    def _count(self, token: int) -> None:
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True


def warped(scores: torch.Tensor, settings: DrawSettings) -> torch.Tensor:
    """Applies temperature, ``top_k``, ``top_p`` and ``min_p`` to scores (V,), in this order, as transformers does.

    Excluded tokens have a score of minus infinity.
    """
    if settings.temperature != 1:
        scores = scores / settings.temperature
    if settings.top_k:
        least = scores.topk(min(settings.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p < 1:
        ascending, places = scores.sort()
        is_rest = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        is_rest[-1] = False
        scores = scores.masked_fill(is_rest.scatter(0, places, is_rest), -torch.inf)
    if settings.min_p > 0:
        probabilities = scores.softmax(-1)
        is_unlikely = probabilities < settings.min_p * probabilities.max()
        is_unlikely[scores.argmax()] = False
        scores = scores.masked_fill(is_unlikely, -torch.inf)
    return scores


@dataclass
class Completion:
    """A finished continuation."""

    text: str
    """The text without the prompt, unless ``echo`` is set."""
    token_ids: list[int]
    """The generated tokens, without the one that ended the text."""
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or token that ended the text."""
    error: str | None = None
    """The error message, if the finish reason is "error"."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """The number of prompt tokens that were not read because a stored prefix had them."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """For each token of the prompt its log-probabilities; None for the first token."""
    snapshot: Snapshot | None = None
    """A snapshot from which the sequence can continue, if requested."""
    snapshot_error: str | None = None
    """Why there is no snapshot although one was requested, for example because memory ran out."""


@dataclass
class StepOutput:
    """The output of a step for one continuation."""

    request_id: int
    index: int
    """The index of the continuation within the request, from 0."""
    text: str = ""
    """The new text, in whole characters. Possible beginnings of stop strings are held back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    activity: list[LayerActivity] | None = None
    """The activity in each layer step while the previous token was read, if requested and known."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """The log-probabilities of the prompt, with the first output, if requested."""
    completion: Completion | None = None
    """The finished continuation, with its last output."""


@dataclass(eq=False)
class Request:
    """A request to the engine, with its started continuations: the first reads the prompt, the others fork from it."""

    id: int
    params: SamplingParams
    tokens: list[int]  # the prompt, after the tokens of a snapshot if there is one
    num_prompt_tokens: int
    end_token_ids: frozenset[int]  # tokens that end the text
    grammar: "LLMatcher | None" = None  # the matcher of its grammar, at the beginning of a text
    snapshot: Snapshot | None = None
    keep_snapshot: bool = False
    record_activations: int | None = None
    residuals: Residuals | None = None
    generator: torch.Generator | None = None  # the first continuation uses it instead of a new one with the seed
    sequences: list["Continuation"] = field(default_factory=list)
    places: set[int] = field(default_factory=set)  # the numbers of prompt tokens after which to store the state
    weights: WeightsMark | None = None  # the weights that started to read the prompt, if there are such places
    ended: set[int] = field(default_factory=set)  # continuations whose last output has been emitted

    @property
    def num_reserved(self) -> int:
        """The number of unfinished continuations, each of which has a state or will get one."""
        return self.params.n - len(self.ended)


class Continuation:
    """A running continuation of a request. Raises ``ValueError`` if a snapshot's text does not match the grammar."""

    def __init__(self, request: Request, index: int, model: ModelParts, tokenizer: PlainTokenizer):
        params, tokens, snapshot, V = request.params, request.tokens, request.snapshot, model.config.vocab_size
        self.request, self.index, self.params = request, index, params
        self._model, self._tokenizer = model, tokenizer
        self.tokens, self.pending = list(tokens), list(tokens)  # all tokens, and those that the state has not read
        self.num_before = len(tokens)  # the number of tokens before those that this request generates
        self.state: SynapticState | None = None
        self.logits: torch.Tensor | None = None  # the logits after the last token that the state has read
        self.num_cached_tokens = 0
        self.activity: list[LayerActivity] | None = None  # the activity at the last token that was read
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self.completion: Completion | None = None
        self._has_output = False
        if snapshot is not None and len(tokens) > len(snapshot.tokens):
            snapshot = None  # further text follows, so its held-back text and generator do not apply
        generator = request.generator if index == 0 else None
        if snapshot is not None and snapshot.generator_state is not None and index == 0 and generator is None:
            generator = torch.Generator()
            generator.set_state(snapshot.generator_state)
        self.sampler = Sampler(
            params,
            vocab_size=V,
            prompt=tokens[: request.num_prompt_tokens],
            generated=tokens[request.num_prompt_tokens :],
            end_token_ids=request.end_token_ids,
            index=index,
            generator=generator,
        )
        if snapshot is not None and snapshot.decoder:
            self._decoder = TextDecoder.from_state(tokenizer, params.stop, snapshot.decoder)
        else:
            self._decoder = TextDecoder(tokenizer, params.stop, context=tokens)
        self._matcher = None if request.grammar is None else Matcher(request.grammar, V)
        num_written = (params.grammar or {}).get("written", 0)
        if num_written > self.num_before:
            raise ValueError(f"grammar.written is {num_written}: must be at most {self.num_before}")
        self._grammar_start = self.num_before - num_written
        self._follow_grammar()

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_before

    def note_read(self, count: int, logits: torch.Tensor | None) -> None:
        """Records that the state has read pending tokens, with logits (V,) after the last or (count, V) after each."""
        if logits is not None and logits.ndim == 2:
            if self.prompt_logprobs is not None and self.num_generated == 0:
                following = self.tokens[len(self.tokens) - len(self.pending) + 1 :][:count]
                for of_token, token in zip(logits, following, strict=False):
                    self.prompt_logprobs.append(TokenLogprobs.of(of_token, token, self.params.prompt_logprobs or 0))
            logits = logits[-1]
        self.logits = self.logits if logits is None else logits
        del self.pending[:count]

    def draw(self) -> StepOutput:
        """Samples the next token. Raises ``ValueError`` if no token is possible."""
        assert self.logits is not None
        allowed = None if self._matcher is None else self._matcher.allowed(self.request.end_token_ids)
        if allowed is not None and not allowed.any():
            return self.end("stop")
        token = self.sampler.sample(self.logits, allowed)
        output = self._new_output()
        if token in self.request.end_token_ids and self.num_generated >= self.params.min_tokens:
            return self._finish("stop", output, stop_reason=token)
        self.tokens.append(token)
        self.pending.append(token)
        self._follow_grammar()
        output.token_ids, output.activity = [token], self.activity
        if self.logprobs is not None:
            output.logprobs = [TokenLogprobs.of(self.logits, token, self.params.logprobs or 0)]
            self.logprobs += output.logprobs
        output.text += self._decoder.push([token], stops=self.num_generated > self.params.min_tokens)
        if self._decoder.stopped:
            return self._finish("stop", output, stop_reason=self._decoder.stopped_by)
        if self._matcher is not None and self._matcher.is_complete:
            return self._finish("stop", output)
        if self.num_generated >= self.params.max_tokens:
            return self._finish("length", output)
        self.text += output.text
        return output

    def _follow_grammar(self) -> None:
        if self._matcher is not None:
            self._matcher.read(self.tokens, start=self._grammar_start)

    def end(self, reason: FinishReason, error: str | None = None) -> StepOutput:
        """Ends the continuation early, possibly before its first token."""
        return self._finish(reason, self._new_output(), error=error)

    def _new_output(self) -> StepOutput:
        output = StepOutput(self.request.id, self.index)
        if not self._has_output:
            output.text = text_of(self._tokenizer, self.request.tokens) if self.params.echo else ""
            self._has_output, output.prompt_logprobs = True, self.prompt_logprobs
        return output

    def _finish(
        self,
        reason: FinishReason,
        output: StepOutput,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> StepOutput:
        snapshot = snapshot_error = None
        if reason != "error":  # the error may come from the decoder itself
            decoder = self._decoder.state()
            output.text += self._decoder.flush()
            if self.request.keep_snapshot and self.state is not None:
                try:
                    snapshot = self._snapshot(self.state, decoder)
                except Exception as failure:
                    snapshot_error = error_text(failure)
                    _logger.exception("no snapshot of continuation %d of request %d", self.index, self.request.id)
        self.text += output.text
        self.completion = output.completion = Completion(
            text=self.text,
            token_ids=self.tokens[self.num_before :],
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            num_prompt_tokens=self.num_before,
            num_cached_tokens=self.num_cached_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            snapshot=snapshot,
            snapshot_error=snapshot_error,
        )
        return output

    def _snapshot(self, state: SynapticState, decoder: dict[str, Any]) -> Snapshot:
        return Snapshot(
            state=state.clone(),
            tokens=list(self.tokens),
            logits=None if self.logits is None else self.logits.clone(),
            generator_state=self.sampler.generator.get_state(),
            num_prompt_tokens=self.request.num_prompt_tokens,
            pending=list(self.pending),
            decoder=decoder,
            weights=weights_mark(self._model).content,
        )


def error_text(error: BaseException) -> str:
    """Returns the text of an exception for a completion."""
    return str(error) or type(error).__name__
