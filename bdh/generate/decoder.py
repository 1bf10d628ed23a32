"""From prompts to tokens, and from tokens to text: whole characters as they come, and nothing after a stop string."""

from collections.abc import Sequence
from typing import Any

from bdh.tokenizer.plain import PlainTokenizer
from bdh.vocabulary import document_end_id

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character (yet)
# A character has at most 4 bytes, so at most 3 bytes of an unfinished one can stand at the end.
_MAX_UNFINISHED = 3
CONTEXT_TOKENS = 8
"""In front of a text: whether a word-piece begins with a space depends on whether anything stands before it."""
_WINDOW_TOKENS = 64

Prompt = str | Sequence[int]
"""A text, in which nothing is a special token, or the ids of tokens."""


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
