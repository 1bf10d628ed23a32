"""Constrained generation: texts that match a JSON schema or a regular expression, enforced by ``llguidance``.

The bytes of each token determine which tokens can follow; all others are masked before sampling. A text that ends by
itself therefore matches the grammar, and one that ``max_tokens`` or a stop string cuts off is a prefix of a match.

The settings check the outer form of a grammar, so importing this module requires neither PyTorch nor ``llguidance``.
"""

import importlib.util
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bdh.extras import install_command

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher, LLTokenizer

KINDS = ("json_schema", "regex")
MOST_CHARACTERS = 100_000  # in a schema, as JSON, or in a regular expression
MOST_LEVELS = 100  # of lists and objects in a schema
# The most patterns and formats in a schema that combines schemas. Each doubles the time to check whether a match
# exists.
MOST_JOINED = 12
# Annotations of a schema, which do not constrain the text.
_ABOUT = {"$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "examples"}
_ABOUT |= {"readOnly", "title", "writeOnly"}
GRAMMAR_FAULT = "the grammar cannot be enforced any further: "
"""The beginning of errors about a grammar that proves too complex during generation, no fault of the engine."""
_MOST_COMPILED = 64
# White space between the parts of JSON. It is bounded, since a model could otherwise write spaces forever.
_WHITESPACE = r"[ \t\r\n]{1,20}"
# Without this option, if only one text can follow, the library allows only one of its tokenizations.
_ALL_TOKENS = '%llguidance {"no_forcing": true}'
_MOST_LEXER_STATES = 20_000  # of 1 to 2 kB each, for a running text; the library's default is 250,000


def check_grammar_library() -> None:
    """Raises ``ImportError`` unless ``llguidance`` is installed."""
    if importlib.util.find_spec("llguidance") is None:
        raise ImportError(f"a grammar needs llguidance, which is not installed: {install_command('serve')}")


def collect_grammar_faults(grammar: Mapping[str, Any]) -> list[str]:
    """Returns the faults in the form of ``SamplingParams.grammar``, without the library that parses its content."""
    if sum(kind in grammar for kind in KINDS) != 1:
        return [f"grammar has {', '.join(map(str, grammar)) or 'nothing'}: must have one of {' and '.join(KINDS)}"]
    faults = []
    if others := [str(name) for name in grammar if name not in (*KINDS, "written")]:
        faults.append(f"grammar.{others[0]} is not a field of a grammar: leave it out")
    written = grammar.get("written", 0)
    if not isinstance(written, int) or isinstance(written, bool) or written < 0:
        faults.append(f"grammar.written is {written!r}: must be a number of tokens, at least 0")
    try:
        grammar_source(grammar)
    except ValueError as error:
        faults.append(str(error))
    return faults


def grammar_source(grammar: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the kind of a grammar, and a text that is equal for equal grammars.

    Raises:
        ValueError: a value has the wrong type or is too large.
    """
    if "regex" in grammar:
        kind, text = "regex", grammar["regex"]
        if not isinstance(text, str):
            raise ValueError(f"grammar.regex is {text!r}: must be a regular expression, as a string")
    else:
        kind, schema = "json_schema", grammar["json_schema"]
        if not isinstance(schema, dict):
            raise ValueError(f"grammar.json_schema is {str(schema)[:100]!r}: must be a JSON schema, an object")
        if "x-guidance" in schema:
            raise ValueError(
                "grammar.json_schema has the key x-guidance, which changes what a schema means: leave it out"
            )
        _check_size(schema)
        try:
            text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"grammar.json_schema is not JSON: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"grammar.{kind} has {len(text):,} characters: must have at most {MOST_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"grammar.{kind} has half of a surrogate pair, which is not text") from error
    return kind, text


def _check_size(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    objects: list[dict[str, Any]] = []
    for _ in range(MOST_LEVELS):
        objects += (each for each in level if isinstance(each, dict))
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for several in inside for each in several if isinstance(each, dict | list)]
    if level:
        raise ValueError(f"grammar.json_schema has more than {MOST_LEVELS} lists and objects inside each other")
    count = sum(isinstance(each.get(name), str) for each in objects for name in ("pattern", "format"))
    if count > MOST_JOINED and any(map(_joins, objects)):
        raise ValueError(
            f"grammar.json_schema has {count} patterns and formats, and combines schemas, with allOf or with keywords "
            f"beside $ref, anyOf or oneOf: must then have at most {MOST_JOINED}"
        )


def _joins(schema: dict[str, Any]) -> bool:
    """Whether a schema combines several schemas that a text must match at once."""
    names, several = [name for name in schema if name not in _ABOUT], schema.get("allOf")
    return (isinstance(several, list) and len(several) > 1) or (
        len(names) > 1 and any(name in names for name in ("allOf", "$ref", "anyOf", "oneOf"))
    )


class Grammars:
    """Compiles the grammars of requests for the tokens of one tokenizer, and caches them. Thread-safe."""

    def __init__(self, tokenizer: Any, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._trie: LLTokenizer | None = None
        self._compiled = lru_cache(_MOST_COMPILED)(lambda kind, text: _compile(kind, text, self._trie))

    def compile(self, grammar: Mapping[str, Any]) -> "LLMatcher":
        """Returns the matcher of a grammar at the beginning of a text. It is cached and must not be advanced.

        Raises:
            ImportError: ``llguidance`` is not installed.
            ValueError: the grammar is invalid or cannot be enforced, or the tokens have no exact bytes.
        """
        source = grammar_source(grammar)
        with self._lock:
            if self._trie is None:
                self._trie = _trie(self._tokenizer, self._vocab_size)
        return self._compiled(*source)


class Matcher:
    """Follows one text through its grammar, starting with a copy of ``beginning`` from :meth:`Grammars.compile`."""

    def __init__(self, beginning: "LLMatcher", vocab_size: int):
        self._matcher, self._vocab_size = beginning.deep_copy(), vocab_size
        self._num_read = 0

    def read(self, tokens: Sequence[int], *, start: int = 0) -> None:
        """Reads the tokens of the text that have not been read yet.

        Args:
            tokens: all tokens of the sequence.
            start: the index at which the text begins.

        Raises:
            ValueError: the text is not a prefix of a match, or the grammar is too complex.
        """
        for token in tokens[start + self._num_read :]:
            if not self._matcher.consume_token(token):
                raise ValueError(GRAMMAR_FAULT + _reason(self._matcher))
            self._num_read += 1

    @property
    def is_complete(self) -> bool:
        """Whether the text matches, and nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self, end_token_ids: Iterable[int] = ()) -> "torch.Tensor":
        """Returns the tokens that can come next, bool (V,); none if the text is complete.

        Args:
            end_token_ids: the tokens that end a text, which are allowed where it can end.

        Raises:
            ValueError: the grammar is too complex, or no token is possible.
        """
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise ValueError(GRAMMAR_FAULT + _reason(self._matcher))
        flags = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        allowed, may_end = torch.from_numpy(flags[:-1]), bool(flags[-1])
        if not may_end and not allowed.any():
            raise ValueError(f"{GRAMMAR_FAULT}no token of the vocabulary can follow")
        if may_end and allowed.any():
            allowed[list(end_token_ids)] = True
        return allowed


def _compile(kind: str, text: str, trie: Any) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    if kind == "regex":
        source = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
    else:
        schema = {**json.loads(text), "x-guidance": {"whitespace_pattern": _WHITESPACE}}
        source = f"start: %json {json.dumps(schema)}"
    limits = LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(trie, f"{_ALL_TOKENS}\n{source}", log_level=0, limits=limits)
    bits = b"" if matcher.is_error() else matcher.compute_bitmask()  # finds the errors that the first step would
    if matcher.is_error():
        reason = _reason(matcher)
        reason = "no text can match it" if "NoExtension" in reason else reason
        raise ValueError(f"grammar.{kind} cannot be enforced: {reason}")
    if not any(bits):
        raise ValueError(f"grammar.{kind} cannot be enforced: no token of this vocabulary can start a matching text")
    return matcher


def _reason(matcher: "LLMatcher") -> str:
    """Returns a matcher's error in one line, without its location in a rewritten form of the grammar."""
    lines = (line.strip() for line in matcher.get_error().partition("   1 | ")[0].splitlines())
    reason = " ".join(line for line in lines if line.strip("^") and line != "<non-verbose/>")
    for before in ("(in regex): ", "failed to compile JSON schema: "):
        reason = reason.rpartition(before)[2]
    return reason or "no reason given"


def _trie(tokenizer: Any, vocab_size: int) -> "LLTokenizer":
    """Returns the bytes of all tokens in the library's form. An additional entry, V, stands for the end of the text."""
    check_grammar_library()
    from llguidance import LLTokenizer, TokenizerWrapper

    try:
        from bdh.tokenizer.plain import token_bytes

        tokens = token_bytes(tokenizer)
    except ValueError as error:
        raise ValueError(f"a grammar cannot be enforced with this tokenizer: {error}") from error
    return LLTokenizer(TokenizerWrapper(_Vocabulary([*tokens, b"<end>"], vocab_size)))


class _Vocabulary:
    """The interface of a tokenizer that the library requires."""

    def __init__(self, tokens: list[bytes], end: int):
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id, self.special_token_ids = end, None, [end]
        self._ids = {token: number for number, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[bytes([byte])] for byte in text]
