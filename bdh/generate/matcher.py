"""Texts that must have a form, held token by token by ``llguidance``.

What may follow a text is computed from the bytes of each token, and everything else is taken from the logits before a
token is drawn: a text that comes to its end has the form, whatever the model. One that ``max_tokens`` or a stop string
cuts off is a beginning of such a text.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bdh.generate.grammar import check_grammar_library, grammar_source
from bdh.tokenizer.byte_level import token_bytes
from bdh.tokenizer.plain import PlainTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

GRAMMAR_FAULT = "the grammar cannot be held further: "
"""With this the errors of a text begin whose grammar was found to be too complex on the way: no fault of the engine."""

_MOST_COMPILED = 64
# Between the parts of JSON. Without a bound a model could write spaces for ever.
_WHITESPACE = r"[ \t\r\n]{1,20}"
# Where only one text can follow, the library would allow but one way of writing it in tokens.
_ALL_TOKENS = '%llguidance {"no_forcing": true}'
_MOST_LEXER_STATES = 20_000  # of 1 to 2 kB, for each running text; the library's own bound is 250,000


class Grammars:
    """The grammars of requests, made ready for the tokens of one tokenizer. For several threads.

    Args:
        vocab_size: V.
    """

    def __init__(self, tokenizer: PlainTokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def compile(self, grammar: Mapping[str, Any]) -> "LLMatcher":
        """The beginning of a text of this grammar, which is not to be advanced. Made once for the same grammar.

        Raises:
            ImportError: ``llguidance`` is not installed.
            ValueError: what in the grammar is wrong, or cannot be held; or the tokens have no exact bytes.
        """
        source = grammar_source(grammar)
        with self._lock:
            if found := self._compiled.get(source):
                self._compiled.move_to_end(source)
                return found
            if self._trie is None:
                self._trie = _trie(self._tokenizer, self._vocab_size)
        made = _compile(*source, self._trie)
        with self._lock:
            self._compiled[source] = made
            while len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        return made

    def matcher(self, grammar: Mapping[str, Any]) -> "Matcher":
        """A new text of this grammar. Raises as :meth:`compile`."""
        return Matcher(self.compile(grammar), self._vocab_size)


class Matcher:
    """Where one text stands in its grammar.

    Args:
        beginning: as :meth:`Grammars.compile` gives it; it stays as it is.
    """

    def __init__(self, beginning: "LLMatcher", vocab_size: int):
        self._matcher, self._vocab_size = beginning.deep_copy(), vocab_size
        self._num_read = 0

    def read(self, tokens: Sequence[int], *, start: int = 0) -> None:
        """Follows the text up to here; what has been read before is not read again.

        Args:
            tokens: all of the sequence's.
            start: where among them the text begins.

        Raises:
            ValueError: they do not begin a text of the grammar, or it is too complex.
        """
        for token in tokens[start + self._num_read :]:
            if not self._matcher.consume_token(token):
                raise ValueError(GRAMMAR_FAULT + _reason(self._matcher))
            self._num_read += 1

    @property
    def is_complete(self) -> bool:
        """Whether the text has its form, and nothing may follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> tuple[torch.Tensor, bool]:
        """Which tokens may come next, bool (V,), and whether the text may end here.

        Raises:
            ValueError: the grammar is too complex, or leaves nothing.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(GRAMMAR_FAULT + _reason(self._matcher))
        flags = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        return torch.from_numpy(flags[:-1]), bool(flags[-1])


def _compile(kind: str, text: str, trie: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher

    if kind == "regex":
        source = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    else:
        schema = {**json.loads(text), "x-guidance": {"whitespace_pattern": _WHITESPACE}}
        source = f"start: %json {json.dumps(schema)}"
    matcher = LLMatcher(trie, f"{_ALL_TOKENS}\n{source}", log_level=0, limits=_limits())
    bits = b"" if matcher.is_error() else matcher.compute_bitmask()  # which finds what the first step would
    if matcher.is_error():
        reason = _reason(matcher)
        if "NoExtension" in reason:
            reason = "no text has this form"
        raise ValueError(f"grammar.{kind} cannot be held: {reason}")
    if not any(bits):
        raise ValueError(f"grammar.{kind} cannot be held: no token of this vocabulary begins such a text")
    return matcher


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)


def _reason(matcher: "LLMatcher") -> str:
    """Its error in one line, without where in a rewritten form of the grammar it was found."""
    lines = (line.strip() for line in matcher.get_error().partition("   1 | ")[0].splitlines())
    told = " ".join(line for line in lines if line.strip("^") and line != "<non-verbose/>")
    for before in ("(in regex): ", "failed to compile JSON schema: "):
        told = told.rpartition(before)[2]
    return told or "no reason given"


def _trie(tokenizer: PlainTokenizer, vocab_size: int) -> "LLTokenizer":
    """The bytes of all tokens as the library wants them; an entry more, V, stands for the end of the text."""
    check_grammar_library()
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        tokens = token_bytes(tokenizer)
    except ValueError as error:
        raise ValueError(f"a grammar cannot be held with this tokenizer: {error}") from error
    return LLTokenizer(TokenizerWrapper(_Vocabulary([*tokens, b"<end>"], vocab_size)))


class _Vocabulary:
    """What the library asks of a tokenizer."""

    def __init__(self, tokens: list[bytes], end: int):
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id, self.special_token_ids = end, None, [end]
        self._ids = {token: number for number, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[bytes([byte])] for byte in text]
