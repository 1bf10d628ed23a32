"""A request and its continuations while they run: tokens, text, and where they stand."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bdh.generate.advance import LayerActivity, Residuals
from bdh.generate.grammar import GRAMMAR_FAULT, Matcher
from bdh.generate.params import SamplingParams
from bdh.generate.sampler import Sampler, TokenLogprobs, token_logprobs
from bdh.generate.snapshot import Snapshot
from bdh.model.state import SynapticState
from bdh.model.weights import WeightsMark
from bdh.tokenizer.plain import PlainTokenizer, document_end_id

_logger = logging.getLogger(__name__)
REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)
# A character has at most 4 bytes, so at most 3 bytes of an unfinished one can stand at the end.
_MAX_UNFINISHED = 3
CONTEXT_TOKENS = 8
"""In front of a text: whether a word-piece begins with a space depends on whether anything stands before it."""
_WINDOW_TOKENS = 64

Prompt = str | Sequence[int]
"""A text, in which nothing is a special token, or the ids of tokens."""
FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass
class Completion:
    """A finished continuation."""

    text: str
    """Without the prompt, unless it is to be echoed."""
    token_ids: list[int]
    """What was generated, the token that ended it not included."""
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string, or the token, that ended it."""
    error: str | None = None
    """What went wrong, where the reason is error."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Tokens of the prompt that were not read, since a stored prefix had them."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One for each token of the prompt; None for the first."""
    snapshot: Snapshot | None = None
    """From which the sequence can go on, where that was asked for."""
    snapshot_error: str | None = None
    """Why there is none though it was asked for: there was no memory for it, say."""


@dataclass
class StepOutput:
    """What a step has added to one continuation."""

    request_id: int
    index: int
    """Which of the request's continuations, from 0."""
    text: str = ""
    """In whole characters. What may become a stop string is held back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    activity: list[LayerActivity] | None = None
    """Of each layer step, while the token before this one was read, where that was asked for and is known."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first output, where they were asked for."""
    completion: Completion | None = None
    """With the last output of a continuation."""


class Continuation:
    """A continuation while it runs.

    Args:
        tokens: the prompt's, and those generated before where it goes on from a snapshot.
        ends: tokens that end the text.
        matcher: at the beginning of the text's grammar, where it has one.
        generator: draw from this one, instead of the snapshot's or one that begins with the seed.

    Raises:
        ValueError: what a snapshot holds of the text does not begin a text of the grammar.
    """

    def __init__(
        self,
        request_id: int,
        index: int,
        params: SamplingParams,
        *,
        tokenizer: PlainTokenizer,
        vocab_size: int,
        tokens: list[int],
        num_prompt_tokens: int,
        ends: frozenset[int],
        snapshot: Snapshot | None = None,
        keep_snapshot: bool = False,
        matcher: Matcher | None = None,
        generator: torch.Generator | None = None,
    ):
        self.request_id, self.index, self.params = request_id, index, params
        self.tokens, self.num_prompt_tokens = list(tokens), num_prompt_tokens
        self.ends, self.keep_snapshot = ends, keep_snapshot
        self.num_before = len(tokens)  # tokens that this request has not generated
        self.state: SynapticState | None = None
        self.pending: list[int] = list(tokens)  # not yet read by the state
        self.logits: torch.Tensor | None = None  # after the last token that the state has read
        self.num_cached_tokens = 0
        self.mark_weights: Callable[[], tuple[Any, ...] | None] = lambda: None  # for a snapshot, of the model as it is
        self.record_activations: int | None = None  # how many of the strongest neurons are wanted
        self.residuals: Residuals | None = None  # that take those of all its tokens
        self.activity: list[LayerActivity] | None = None  # of the last token that was read
        self.text = ""
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self.completion: Completion | None = None
        goes_on = snapshot is not None and len(tokens) == len(snapshot.tokens)
        goes_on_drawing = goes_on and index == 0 and generator is None
        if snapshot is not None and snapshot.generator_state is not None and goes_on_drawing:
            generator = torch.Generator()
            generator.set_state(snapshot.generator_state)
        self.sampler = Sampler(
            params,
            vocab_size=vocab_size,
            prompt=tokens[:num_prompt_tokens],
            generated=tokens[num_prompt_tokens:],
            ends=ends,
            index=index,
            generator=generator,
        )
        self._tokenizer = tokenizer
        if goes_on and snapshot is not None and snapshot.decoder:
            self._decoder = TextDecoder.from_state(tokenizer, params.stop, snapshot.decoder)
        else:
            self._decoder = TextDecoder(tokenizer, params.stop, context=tokens)
        self._matcher = matcher
        self._grammar_start = self.num_before - (params.grammar or {}).get("written", 0)
        if self._grammar_start < 0:
            raise ValueError(
                f"grammar.written is {self.num_before - self._grammar_start}: must be at most {self.num_before}"
            )
        self._follow_grammar()
        self._has_said = False
        self._unsaid = self._text_of(tokens) if params.echo else ""  # comes with the first output

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_before

    @property
    def wants_all_tokens(self) -> bool:
        """Whether a known beginning is of no use, since something is wanted of each of its tokens."""
        return self.prompt_logprobs is not None or self.residuals is not None

    def read(self, count: int, logits: torch.Tensor | None) -> None:
        """The state has read so many of the pending tokens.

        Args:
            logits: (V,) after them; (count, V) after each one where the prompt's log-probabilities are wanted.
        """
        if self.prompt_logprobs is not None and self.num_generated == 0 and logits is not None and logits.ndim == 2:
            start = len(self.tokens) - len(self.pending)  # of the tokens that were read
            for row, token in zip(logits, self.tokens[start + 1 : start + count + 1], strict=False):
                self.prompt_logprobs.append(token_logprobs(row, token, self.params.prompt_logprobs or 0))
        if logits is not None:
            self.logits = logits[-1] if logits.ndim == 2 else logits
        del self.pending[:count]

    def draw(self) -> StepOutput:
        """Samples a token after the last one.

        Raises:
            ValueError: the logits leave none.
        """
        assert self.logits is not None
        allowed = self._allowed()
        if allowed is not None and not allowed.any():
            return self.end("stop")
        token = self.sampler.sample(self.logits, allowed)
        output = self._new_output()
        if token in self.ends and self.num_generated >= self.params.min_tokens:
            self._finish("stop", output, stop_reason=token)
            return output
        self.tokens.append(token)
        self.pending.append(token)
        self._follow_grammar()
        output.token_ids, output.activity = [token], self.activity
        if self.logprobs is not None:
            entry = token_logprobs(self.logits, token, self.params.logprobs or 0)
            self.logprobs.append(entry)
            output.logprobs = [entry]
        output.text += self._decoder.push([token], stops=self.num_generated > self.params.min_tokens)
        if self._decoder.stopped:
            self._finish("stop", output, stop_reason=self._decoder.stopped_by)
        elif self._matcher is not None and self._matcher.is_complete:
            self._finish("stop", output)
        elif self.num_generated >= self.params.max_tokens:
            self._finish("length", output)
        else:
            self.text += output.text
        return output

    def _follow_grammar(self) -> None:
        if self._matcher is not None:
            self._matcher.read(self.tokens, start=self._grammar_start)

    def _allowed(self) -> torch.Tensor | None:
        """The tokens that the grammar allows next, bool (V,): none where it is complete. None without a grammar."""
        if self._matcher is None:
            return None
        allowed, may_end = self._matcher.allowed()
        if not may_end and not allowed.any():
            raise ValueError(f"{GRAMMAR_FAULT}no token of the vocabulary can follow")
        if may_end and allowed.any():
            allowed[list(self.ends)] = True
        return allowed

    def end(self, reason: FinishReason, error: str | None = None) -> StepOutput:
        """Ends it before its time, or before its first token."""
        output = self._new_output()
        self._finish(reason, output, error=error)
        return output

    def _new_output(self) -> StepOutput:
        output = StepOutput(self.request_id, self.index, self._unsaid)
        self._unsaid = ""
        if not self._has_said:
            self._has_said, output.prompt_logprobs = True, self.prompt_logprobs
        return output

    def _finish(
        self,
        reason: FinishReason,
        output: StepOutput,
        *,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        snapshot = snapshot_error = None
        if reason != "error":  # which may be the decoder's own
            decoder = self._decoder.state()
            output.text += self._decoder.flush()
            if self.keep_snapshot and self.state is not None:
                try:
                    snapshot = self._snapshot(self.state, decoder)
                except Exception as failure:
                    snapshot_error = told(failure)
                    _logger.exception("no snapshot of continuation %d of request %d", self.index, self.request_id)
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

    def _snapshot(self, state: SynapticState, decoder: dict[str, Any]) -> Snapshot:
        return Snapshot(
            state=state.clone(),
            tokens=list(self.tokens),
            logits=None if self.logits is None else self.logits.clone(),
            generator_state=self.sampler.generator.get_state(),
            num_prompt_tokens=self.num_prompt_tokens,
            pending=list(self.pending),
            decoder=decoder,
            weights=self.mark_weights(),
        )

    def _text_of(self, tokens: list[int]) -> str:
        decoder = TextDecoder(self._tokenizer)
        return decoder.push(tokens) + decoder.flush()


class Request:
    """A request: one sequence that reads the prompt, and later its further continuations."""

    def __init__(
        self, request_id: int, first: Continuation, make: Callable[[int], Continuation], snapshot: Snapshot | None
    ):
        self.id, self.snapshot = request_id, snapshot
        self.sequences = [first]
        self.make = make
        self.places: set[int] = set()  # where the state on the way through the prompt is stored
        self.weights: WeightsMark | None = None  # of those that began to read it, where there are such places
        self.ended: set[int] = set()  # continuations whose last output is among the engine's

    @property
    def params(self) -> SamplingParams:
        return self.sequences[0].params

    @property
    def num_reserved(self) -> int:
        """Continuations that have not ended: each has a state, or will get one."""
        return self.params.n - len(self.ended)

    @property
    def is_done(self) -> bool:
        return len(self.ended) == self.params.n

    def failed(self, index: int, error: str) -> StepOutput:
        """The end of a continuation that may not have begun, and cannot even finish its text."""
        completion = Completion("", [], "error", error=error, num_prompt_tokens=self.sequences[0].num_before)
        if index < len(self.sequences):
            sequence = self.sequences[index]
            completion.text, completion.token_ids = sequence.text, sequence.tokens[sequence.num_before :]
            sequence.completion = completion
        return StepOutput(self.id, index, completion=completion)


def told(error: BaseException) -> str:
    """An exception in the words of a completion."""
    return str(error) or type(error).__name__


class TextDecoder:
    """Turns token ids into text as they come, holding back what is not certain yet.

    Held back are unfinished characters, and text that may become a stop string. ``stopped`` turns true with
    a stop string, and nothing comes out after it.

    Args:
        stop: the stop strings.
        tokenizer: a ``PreTrainedTokenizerFast`` or a :class:`PlainTokenizer`.
        context: the tokens in front of the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer = PlainTokenizer.of(tokenizer)
        self._stop = list(stop)
        # The last tokens: decoding all of them anew for each would be quadratic.
        self._window: list[int] = list(context[-CONTEXT_TOKENS:])
        # Characters of the window's text that went on to `_pending`, or are not of this text.
        self._num_decoded = len(self._decode(self._window))
        self._pending = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False
        self.stopped_by: str | None = None

    def state(self) -> dict[str, Any]:
        """What it holds, in JSON's types."""
        return {
            "window": list(self._window),
            "num_decoded": self._num_decoded,
            "pending": self._pending,
            "stopped": self.stopped,
        }

    @classmethod
    def from_state(cls, tokenizer: Any, stop: Sequence[str], state: dict[str, Any]) -> "TextDecoder":
        """Goes on where :meth:`state` was taken. Text held back is released where no stop string begins with it."""
        decoder = cls(tokenizer, stop)
        decoder._window = list(state["window"])
        decoder._num_decoded = state["num_decoded"]
        decoder._pending = state["pending"]
        decoder.stopped = state["stopped"]
        return decoder

    def push(self, token_ids: Sequence[int], *, stops: bool = True) -> str:
        """The text that is certain after these further tokens; often none. Without ``stops``, no stop string ends it."""
        if self.stopped:
            return ""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        num_unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        certain = len(text) - min(num_unfinished, _MAX_UNFINISHED)
        new = text[self._num_decoded : certain]
        self._num_decoded = max(self._num_decoded, certain)
        if num_unfinished == 0 and len(self._window) >= _WINDOW_TOKENS:
            self._window = self._window[-CONTEXT_TOKENS:]
            self._num_decoded = len(self._decode(self._window))
        if not stops:
            new, self._pending = self._pending + new, ""
            return new
        return self._release(new)

    def flush(self) -> str:
        """The rest, at the end of the text."""
        if self.stopped:
            return ""
        rest = self._release(self._decode(self._window)[self._num_decoded :])
        rest, self._pending = rest + self._pending, ""
        return rest

    def _decode(self, token_ids: list[int]) -> str:
        # Without cleaning up spaces, which looks at the characters on both sides: it would change text that is out.
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _release(self, new: str) -> str:
        self._pending += new
        found = [(at + len(s), at, s) for s in self._stop if (at := self._pending.find(s)) >= 0]
        if found:
            # The one that was complete first: so it is for text that comes character by character too.
            _, start, self.stopped_by = min(found)
            released, self._pending, self.stopped = self._pending[:start], "", True
            return released
        held = max((_overlap(self._pending, s) for s in self._stop), default=0)
        cut = len(self._pending) - held
        released, self._pending = self._pending[:cut], self._pending[cut:]
        return released


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt. Text that looks like a special token is text; an empty prompt is ``<bos>``.

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


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the model's settings."""
    of_model = model.generation_config.eos_token_id
    ends = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return sorted({token for token in ends if token is not None})
