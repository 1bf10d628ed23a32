"""Reads files that people write: UTF-8 text, and YAML in which nothing is silently lost or misread.

A byte order mark (BOM) is not part of the text. PyYAML drops the first of two equal keys, reads a key without a value
as null, and follows YAML 1.1, in which 010 is 8 and 1:30 is 90. Here these are faults, which are reported with their
lines. Anchors, aliases and merge keys work, as long as no value contains itself and aliases do not add too many values.
"""

import codecs
import io
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from bdh.validation import Faults

_OTHER_MARKS = {  # the longer ones first: UTF-32's begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WIDE = {  # the bytes in a unit, the index of the highest byte, and that of the second-highest one
    "UTF-32LE": (4, 3, 2),
    "UTF-32BE": (4, 0, 1),
    "UTF-16LE": (2, 1, None),
    "UTF-16BE": (2, 0, None),
}
MARK_BYTES = 64
"""The number of bytes at the beginning of a file that determine its encoding."""

MAX_LEVELS = 50
"""The maximum depth of nested lists and mappings."""
MAX_BY_ALIASES = 10_000
"""The maximum number of values that aliases may add to a document."""
WRONG = object()
"""Replaces a value that has a fault."""

_TAG = "tag:yaml.org,2002:"
_WRONG_TAG = "tag:bdh,2026:wrong"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_UNDERSCORES = re.compile(r"_(?![0-9a-fA-F])|(?<![0-9a-fA-F])_")  # other than between two digits


def mark_length(beginning: bytes, path: Path) -> int:
    """Returns the length of UTF-8's byte order mark at the beginning of a file: 3 bytes, or 0 if there is none.

    Args:
        beginning: the first ``MARK_BYTES`` bytes of the file, or more.
        path: the file, for error messages.

    Raises:
        ValueError: the file has the byte order mark of another encoding, or seems to be in another encoding without a
            mark.
    """
    mark = next(filter(beginning.startswith, _OTHER_MARKS), None)
    encoding = _OTHER_MARKS[mark] if mark else _wide_encoding(beginning[:MARK_BYTES])
    if encoding:
        about = (
            f"is {encoding}, as its first bytes say"
            if mark
            else (f"seems to be {encoding} without a byte order mark, as its first bytes tell")
        )
        shown = (mark or beginning[:8]).hex(" ").upper()
        raise ValueError(f"{path} {about} ({shown}): must be UTF-8. `iconv -f {encoding} -t UTF-8` converts it")
    return len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0


def _wide_encoding(beginning: bytes) -> str | None:
    """Returns UTF-16 or UTF-32 if bytes without a mark seem to be in that encoding, otherwise None.

    The high bytes of most scripts are then bytes that would be control characters in UTF-8.
    """
    if len(beginning) < 4:
        return None
    for encoding, (size, high, next_to_it) in _WIDE.items():
        high_bytes = beginning[high::size]
        if next_to_it is not None:
            if not any(high_bytes) and max(beginning[next_to_it::size]) <= 0x10:  # U+10FFFF is the last character
                return encoding
        elif sum(byte < 0x09 for byte in high_bytes) >= 0.75 * len(high_bytes):
            return encoding
    return None


def read_text(path: Path) -> str:
    r"""Returns the text of a file without a byte order mark. All line ends become ``\n``.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    start = mark_length(data, path)
    try:
        text = data[start:].decode()
    except UnicodeDecodeError as error:
        position = start + error.start
        raise ValueError(f"{path} is not UTF-8: byte {position} is 0x{data[position]:02X}") from error
    return io.StringIO(text, newline=None).read()


@dataclass
class YamlDocument:
    """The content of a YAML file, with the lines and the spelling of its values."""

    tree: Any
    """The content as plain data, with ``WRONG`` in place of values that have a fault."""
    lines: dict[str, list[int]] = field(default_factory=dict)
    """The lines in which the name of each value, such as ``data.mix[0].weight``, is written, counted from 1. A name can
    be in several lines, for example if it is also written as a key with dots."""
    written: dict[str, str] = field(default_factory=dict)
    """The spelling of values that are not text, such as ``no`` where the tree has False."""


class _Loader(yaml.SafeLoader):
    """Reads dates as text, since no setting is a date."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it as a class variable)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be a fault without quotes."""

    def text(self, value: str) -> yaml.ScalarNode:
        is_plain = value != "None" and not _LEADING_ZERO.fullmatch(value)
        return self.represent_scalar(f"{_TAG}str", value, style=None if is_plain else "'")


_Dumper.add_representer(str, _Dumper.text)
_Loader.add_constructor(_WRONG_TAG, lambda loader, node: WRONG)


def read_yaml(path: Path, faults: Faults) -> YamlDocument:
    """Reads a YAML file. Duplicate keys, missing values and values that would be misread are added to ``faults``.

    Raises:
        ValueError: the file is not UTF-8, or not YAML.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    try:
        return parse_yaml(text, faults, origin=str(path))
    except RecursionError as error:
        raise ValueError(f"{path} is not YAML that can be read: it is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error)
        raise ValueError(f"{path}{line} is not YAML: {' '.join(reason.split())}") from error


def parse_yaml(text: str, faults: Faults, *, origin: str | None = None, name: str = "") -> YamlDocument:
    """Parses YAML text, as :func:`read_yaml` does with a file.

    Args:
        text: the text.
        faults: the object to which faults are added.
        origin: the file that contains the text, if any. Faults then name the file and the line.
        name: the name of the value that the text gives, if it is not a whole file.

    Raises:
        yaml.YAMLError: the text is not YAML.
        RecursionError: the text is nested too deeply.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None or (isinstance(root, yaml.ScalarNode) and not name):
            return YamlDocument(None if root is None else loader.construct_document(root))
        check = _Check(faults, origin)
        root = check.node(root, name, root.start_mark.line + 1)
        return YamlDocument(loader.construct_document(root), check.lines, check.written)
    finally:
        loader.dispose()


def dump_yaml(tree: Any, **options: Any) -> str:
    """Returns YAML that reads back as the same plain data. ``options`` are those of ``yaml.dump``."""
    written: str = yaml.dump(tree, Dumper=_Dumper, **options)
    return written


def lines_in_words(lines: Iterable[int]) -> str:
    """Returns line numbers in words, such as "lines 1, 3 and 4", for messages."""
    *others, last = map(str, dict.fromkeys(lines))
    return f"lines {', '.join(others)} and {last}" if others else f"line {last}"


class _Check:
    """Walks the nodes of a document, and replaces those that have a fault by marks."""

    def __init__(self, faults: Faults, origin: str | None):
        self.lines: dict[str, list[int]] = {}
        self.written: dict[str, str] = {}
        self._faults, self._origin = faults, origin
        self._open: dict[yaml.Node, tuple[str, int]] = {}  # the name and line of the nodes that contain the current one
        self._extents: dict[yaml.Node, tuple[int, int]] = {}  # the levels and values of the completed nodes
        self._seen_keys: set[yaml.Node] = set()
        self._num_by_aliases = 0

    def node(self, node: yaml.Node, name: str, line: int) -> yaml.Node:
        """Returns the node to use in place of ``node``: itself, or a mark."""
        self.lines.setdefault(name, []).append(line)
        if node in self._open:
            outer, outer_line = self._open[node]
            fault = f"{outer or 'the document'} contains itself, as {name}: write out what is meant"
            return self._wrong(node, fault, outer_line, line)
        is_alias = node in self._extents
        levels, num_values = self._extents.get(node, (isinstance(node, yaml.CollectionNode), 0))
        if len(self._open) + levels > MAX_LEVELS:
            return self._wrong(node, f"{name} is nested too deeply: at most {MAX_LEVELS} levels", line)
        if is_alias:
            had_too_many = self._num_by_aliases > MAX_BY_ALIASES
            self._num_by_aliases += num_values
            if self._num_by_aliases <= MAX_BY_ALIASES:
                return node
            if had_too_many:  # reported only once
                return _mark(node)
            return self._wrong(
                node, f"{name} repeats too much: aliases may add {MAX_BY_ALIASES} values to a file", line
            )
        self._open[node] = (name, line)
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, name)
            children = [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            node.value = children = [
                self.node(item, f"{name}[{index}]", item.start_mark.line + 1) for index, item in enumerate(node.value)
            ]
        elif scalar_fault := self._fault(node):
            self._add(f"{name} {scalar_fault}", line)
            node.tag = _WRONG_TAG
        elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag != f"{_TAG}str":
            self.written[name] = node.value
        del self._open[node]
        extents = [self._extents.get(child, (0, 1)) for child in children]
        levels = max((levels for levels, _ in extents), default=0) + isinstance(node, yaml.CollectionNode)
        self._extents[node] = (levels, 1 + sum(num_values for _, num_values in extents))
        return node

    def _mapping(self, node: yaml.MappingNode, name: str) -> None:
        entries: dict[Hashable, list[tuple[yaml.Node, yaml.Node]]] = {}
        for key, value in node.value:
            if isinstance(key, yaml.CollectionNode):
                kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
                self._add(f"a name{name and f' under {name}'} is a {kind}: must be text", key.start_mark.line + 1)
                self.node(value, f"{name}.?", value.start_mark.line + 1)
            else:
                entries.setdefault(_identity(key), []).append((key, value))
        node.value = [same[-1] for same in entries.values()]
        checked = [(same[-1][0], self._entry(same, name)) for same in entries.values()]
        node.value = [(key, value) for key, value in checked if not _is_no_merge(key, value)]

    def _entry(self, same: list[tuple[yaml.Node, yaml.Node]], name: str) -> yaml.Node:
        """Returns the node to use as the value of a key, which may be given several times, in the mapping ``name``."""
        key, value = same[-1]
        written = f"{name}.{key.value}" if name else str(key.value)
        lines = [each.start_mark.line + 1 for each, _ in same]
        if len(same) > 1:
            times = "twice" if len(same) == 2 else f"{len(same)} times"
            self._add(f"{written} is given {times}: give it once", *lines)
        for (_, earlier), line in zip(same[:-1], lines, strict=False):
            if isinstance(earlier, yaml.MappingNode) and isinstance(value, yaml.MappingNode):
                if earlier is not value:  # both can contain faults
                    value.value = [*earlier.value, *value.value]
            else:
                self.node(earlier, written, line)
        if key not in self._seen_keys:
            self._seen_keys.add(key)
            if fault := self._fault(key, is_key=True):
                self._add(f"a name{name and f' under {name}'} {fault}", lines[-1])
                key.tag = _WRONG_TAG
        return self.node(value, written, lines[-1])

    def _wrong(self, node: yaml.Node, fault: str, *lines: int) -> yaml.Node:
        self._add(fault, *lines)
        return _mark(node)

    def _fault(self, node: yaml.Node, *, is_key: bool = False) -> str | None:
        """Returns what is wrong with a scalar, or None."""
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:
            return None  # in quotes, or a block of text
        text = node.value
        if not text and node.tag == f"{_TAG}null":
            without = "has no value: give it one, or null where that is allowed, or leave it out"
            return "is empty: give it one" if is_key else without
        if text == "None" and not is_key:
            return "is None, which YAML reads as text: write null for no value, or 'None' if it is one"
        if _LEADING_ZERO.fullmatch(text):
            return f"is {text}, which YAML may read as octal: leave out the leading zeros, or put it in quotes"
        if node.tag not in (f"{_TAG}int", f"{_TAG}float"):
            return None
        if _BASE_60.fullmatch(text):
            return f"is {text}, which YAML reads as a number in base 60: write a plain number, or put it in quotes"
        if _UNDERSCORES.search(text):
            return f"is {text}: in a number _ stands between two digits; put it in quotes if it is text"
        try:
            SafeConstructor().construct_object(node)
        except ValueError:
            return f"is {text[:20]}...: a number of {len(text)} characters is too long to be read"
        return None

    def _add(self, fault: str, *lines: int) -> None:
        self._faults.add(f"{fault} ({self._origin}, {lines_in_words(lines)})" if self._origin else fault)


def _mark(node: yaml.Node) -> yaml.Node:
    return yaml.ScalarNode(_WRONG_TAG, "", node.start_mark, node.end_mark)


def _is_no_merge(key: yaml.Node, value: yaml.Node) -> bool:
    """Whether a merge key has nothing left to merge, because its value has a fault."""
    if key.tag != f"{_TAG}merge":
        return False
    if isinstance(value, yaml.SequenceNode):
        value.value = [item for item in value.value if item.tag != _WRONG_TAG]
    return value.tag == _WRONG_TAG


def _identity(key: yaml.Node) -> Hashable:
    """Returns a value that is equal for keys of which a mapping would keep only one."""
    if isinstance(key, yaml.ScalarNode) and key.tag not in (f"{_TAG}merge", f"{_TAG}value"):
        try:
            constructed: Hashable = SafeConstructor().construct_object(key)
        except ValueError:
            return key.value
        return constructed
    return (key.tag, str(key.value))
