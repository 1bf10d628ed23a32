"""The form that a text must have, as plain data: a JSON schema, or a regular expression."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

KINDS = ("json_schema", "regex")
MOST_CHARACTERS = 100_000
"""Of a schema, as JSON, or of a regular expression."""
MOST_LEVELS = 100
"""Of lists and objects inside each other in a schema."""
MOST_JOINED = 12
"""Patterns and formats of a schema that may want several of them of one text: what it takes to see whether such a text
exists doubles with each."""
_ABOUT = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "examples",
    "readOnly",
    "title",
    "writeOnly",
]


def check_grammar_library() -> None:
    """
    Raises:
        ImportError: ``llguidance`` is not installed.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise ImportError('a grammar needs llguidance, which is not installed: pip install "bdh[serve]"')


def collect_grammar_faults(grammar: Mapping[str, Any]) -> list[str]:
    """What is wrong with the form of ``SamplingParams.grammar``; the library that reads its content is not needed."""
    if sum(kind in grammar for kind in KINDS) != 1:
        return [f"grammar has {', '.join(map(str, grammar)) or 'nothing'}: must have one of {' and '.join(KINDS)}"]
    faults = []
    if others := [str(name) for name in grammar if name not in (*KINDS, "written")]:
        faults.append(f"grammar.{others[0]} is no part of a grammar: leave it out")
    written = grammar.get("written", 0)
    if not isinstance(written, int) or isinstance(written, bool) or written < 0:
        faults.append(f"grammar.written is {written!r}: must be a number of tokens, at least 0")
    try:
        grammar_source(grammar)
    except ValueError as error:
        faults.append(str(error))
    return faults


def grammar_source(grammar: Mapping[str, Any]) -> tuple[str, str]:
    """The kind, and a text that is equal for equal grammars.

    Raises:
        ValueError: it is of another type, or too large.
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
        _check_levels(schema)
        _check_joined(schema)
        try:
            text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"grammar.json_schema is no JSON: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"grammar.{kind} has {len(text):,} characters: must have at most {MOST_CHARACTERS:,}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"grammar.{kind} has half of a surrogate pair, which is no text") from error
    return kind, text


def _check_levels(schema: dict[str, Any]) -> None:
    level: list[Any] = [schema]
    for _ in range(MOST_LEVELS):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for several in parts for part in several if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"grammar.json_schema has more than {MOST_LEVELS} lists and objects inside each other")


def _check_joined(schema: dict[str, Any]) -> None:
    count = sum(isinstance(part.get(name), str) for part in _objects(schema) for name in ("pattern", "format"))
    if count > MOST_JOINED and any(map(_joins, _objects(schema))):
        raise ValueError(
            f"grammar.json_schema has {count} patterns and formats, and joins schemas, by allOf or by what stands beside "
            f"$ref, anyOf or oneOf: must then have at most {MOST_JOINED}"
        )


def _joins(part: dict[str, Any]) -> bool:
    """Whether a text must follow several schemas at once."""
    names = [name for name in part if name not in _ABOUT]
    several = part.get("allOf")
    return (isinstance(several, list) and len(several) > 1) or (
        len(names) > 1 and any(name in names for name in ("allOf", "$ref", "anyOf", "oneOf"))
    )


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All objects in a schema, itself included."""
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
        left += [each for each in (part.values() if isinstance(part, dict) else part) if isinstance(each, dict | list)]
