"""From prompt to text: whole characters as they come, and nothing behind a stop string."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from bdh.model.sampling import SamplingOptions
from bdh.vocabulary import check_vocabulary, document_end_id

if TYPE_CHECKING:
    from bdh.model.modeling import BDHForCausalLM

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)
# A character has at most 4 bytes, so at most 3 bytes of an unfinished one can stand at the end.
_MAX_UNFINISHED = 3
_WINDOW_TOKENS, _CONTEXT_TOKENS = 64, 8

Prompt = str | Sequence[int]
"""A text, in which nothing is a special token, or the ids of tokens."""


class TextDecoder:
    """Turns token ids into text as they come, holding back what is not certain yet.

    Held back are unfinished characters, and text that may become a stop string. ``stopped`` turns true with
    a stop string, and nothing comes out after it.

    Args:
        stop: the stop strings.
        context: the tokens in front of the text. Whether a word-piece begins with a space depends on whether
            anything stands before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._stop = list(stop)
        # The last tokens: decoding all of them anew for each would be quadratic.
        self._window: list[int] = list(context[-_CONTEXT_TOKENS:])
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
    def from_state(
        cls, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str], state: dict[str, Any]
    ) -> "TextDecoder":
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
            self._window = self._window[-_CONTEXT_TOKENS:]
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
        # Cleaning up spaces looks at the characters on both sides: it would change text that is out already.
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)  # a list for lists of lists

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


class TextGenerationMixin:
    """``generate_text`` and its relatives, for a model with transformers' ``generate``."""

    def generate_text(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Prompt,
        options: SamplingOptions | None = None,
        **settings: Any,
    ) -> str:
        """The continuation of ``prompt``, without the prompt.

        Args:
            prompt: a text, or the ids of its tokens.
            options: how to sample; or give the fields of :class:`SamplingOptions` as keywords.

        Raises:
            ValueError: a setting out of range, or an empty prompt where the tokenizer has no ``<bos>``.
        """
        return self.generate_texts(tokenizer, [prompt], options, **settings)[0][0]

    def generate_texts(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[Prompt],
        options: SamplingOptions | None = None,
        **settings: Any,
    ) -> list[list[str]]:
        """For each prompt its continuations, ``num_return_sequences`` of them, all in one batch."""
        options = _options(options, settings)
        ids, mask = _encode_batch(self, tokenizer, prompts)
        special = _special_tokens(self, tokenizer)
        decoders = _BatchDecoder(tokenizer, options, prompt_columns=ids.shape[1], ends=special["eos_token_id"])
        with _sampling_from(options.seed, ids.device):
            sequences = self.generate(  # type: ignore[attr-defined]
                ids,
                attention_mask=mask,
                stopping_criteria=StoppingCriteriaList([decoders] if options.stop else []),
                **special,
                **options.generate_arguments(),
            )
        texts = [decoders.text_of(row) for row in sequences]
        n = options.num_return_sequences
        return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]

    def stream_text(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: Prompt,
        options: SamplingOptions | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The continuation of ``prompt`` piece by piece, in whole characters, as it is generated.

        Generation runs in a thread of its own, and ends when the iterator is closed.

        Raises:
            ValueError: as :meth:`generate_text`; also with beams or several sequences, which cannot stream.
        """
        options = _options(options, settings)
        if options.num_beams > 1 or options.num_return_sequences > 1:
            raise ValueError(
                f"a stream carries one text: num_beams is {options.num_beams} and num_return_sequences "
                f"{options.num_return_sequences}, both must be 1"
            )
        ids, mask = _encode_batch(self, tokenizer, [prompt])
        return _stream(self, tokenizer, ids, mask, options)


def _stream(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    mask: torch.Tensor,
    options: SamplingOptions,
) -> Iterator[str]:
    streamer = _TextQueue(TextDecoder(tokenizer, options.stop, context=ids[0].tolist()))

    def run() -> None:
        try:
            with _sampling_from(options.seed, ids.device):
                model.generate(
                    ids,
                    attention_mask=mask,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([streamer.criterion]),
                    **_special_tokens(model, tokenizer),
                    **options.generate_arguments(),
                )
        except BaseException as error:  # handed on to the thread that reads
            streamer.queue.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not isinstance(piece := streamer.queue.get(), _End):
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        streamer.cancelled = True
        thread.join()


class _End:
    """Marks the end in a queue of texts."""


class _TextQueue(BaseStreamer):
    """Receives tokens from ``generate`` and queues their text."""

    def __init__(self, decoder: TextDecoder):
        self.queue: queue.SimpleQueue[str | _End | BaseException] = queue.SimpleQueue()
        self.decoder = decoder
        self.cancelled = False
        self.criterion = _StopWhen(lambda: self.cancelled or self.decoder.stopped)
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # `generate` puts the prompt first
            self._prompt_seen = True
            return
        if text := self.decoder.push(value.flatten().tolist()):
            self.queue.put(text)

    def end(self) -> None:
        if text := self.decoder.flush():
            self.queue.put(text)
        self.queue.put(_End())


class _StopWhen(StoppingCriteria):
    def __init__(self, condition: Any):
        self._condition = condition

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._condition(), device=input_ids.device)


class _BatchDecoder(StoppingCriteria):
    """Stops each row of a batch at its stop string, and cuts its text there.

    Rows change places in a beam search, so each row is decoded from its tokens, of which those that can
    matter for a stop string that ends with the newest one are the last ones.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, options: SamplingOptions, prompt_columns: int, ends: list[int] | None
    ):
        self._tokenizer = tokenizer
        self._ends = set(ends or ())
        self._options = options
        self._prompt_columns = prompt_columns
        # A token has at least one byte, except special ones, which decode to nothing.
        self._tail_tokens = max((len(s.encode()) for s in options.stop), default=0) + _CONTEXT_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        start = max(self._prompt_columns, input_ids.shape[1] - self._tail_tokens)
        stopped = [self._decoded(row, start)[0].stopped for row in input_ids]
        return torch.tensor(stopped, device=input_ids.device)

    def text_of(self, row: torch.Tensor) -> str:
        decoder, text = self._decoded(row, self._prompt_columns)
        return text + decoder.flush()

    def _decoded(self, row: torch.Tensor, start: int) -> tuple[TextDecoder, str]:
        """The text of a row's tokens from ``start`` on, up to its end, and the decoder behind it."""
        context, ids = row[max(0, start - _CONTEXT_TOKENS) : start].tolist(), row[start:].tolist()
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        ids = ids[:end]  # behind it stands padding
        decoder = TextDecoder(self._tokenizer, self._options.stop, context)
        return decoder, decoder.push(ids)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt. Text that looks like a special token is text; an empty prompt is ``<bos>``.

    Raises:
        ValueError: the prompt is empty and the tokenizer has neither ``<bos>`` nor ``<eos>`` to start from.
    """
    ids = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if ids:
        return list(ids)
    for start in (tokenizer.bos_token_id, document_end_id(tokenizer)):
        if start is not None:
            return [start]
    raise ValueError(
        "the prompt is empty, and this tokenizer has no <bos> token to start from: give at least one character"
    )


def _options(options: SamplingOptions | None, settings: dict[str, Any]) -> SamplingOptions:
    if options is not None and settings:
        raise ValueError(f"give either options or keywords, not both: got {', '.join(settings)} too")
    return (options or SamplingOptions(**settings)).validated()


def _encode_batch(
    model: "BDHForCausalLM | Any", tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and their mask, int64 (B, T)."""
    check_vocabulary(tokenizer, model.config.vocab_size)
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    rows = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    T = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0  # never seen: the mask hides it
    ids = torch.tensor([[pad] * (T - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return ids, mask


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the model's settings."""
    of_model = model.generation_config.eos_token_id
    ends = [*(of_model if isinstance(of_model, list) else [of_model]), tokenizer.eos_token_id]
    return sorted({token for token in ends if token is not None})


def _special_tokens(model: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Where a text ends, and what stands behind its end in a batch."""
    return {"pad_token_id": tokenizer.pad_token_id or 0, "eos_token_id": end_token_ids(model, tokenizer) or None}


def _sampling_from(seed: int | None, device: torch.device) -> AbstractContextManager[Any]:
    """Within it this thread samples from ``seed``; with None, from PyTorch's own generator as ever."""
    return nullcontext() if seed is None else _SamplingFrom(torch.Generator(device).manual_seed(seed))


class _SamplingFrom(TorchFunctionMode):
    """Draws of this thread come from a generator of their own.

    transformers' ``generate`` takes no generator, and seeding the global one for the while would disturb, and
    be disturbed by, whatever else draws: a second stream, or a training.
    """

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.multinomial:
            kwargs.setdefault("generator", self._generator)
        return func(*args, **kwargs)
