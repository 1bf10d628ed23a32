"""YAML, read, and written, so that nothing in it is lost or misread without a word.

PyYAML drops the first of two equal keys, takes a name with nothing after its colon for null, and follows YAML 1.1, in
which 010 is 8 and 1:30 is 90. Here those are faults, with the lines where they are. Anchors, aliases and merge keys work.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from bdh.validation import Faults

WRONG = object()
"""Stands in a tree for a value that is among the faults."""

_TAG = "tag:yaml.org,2002:"
_WRONG_TAG = "tag:bdh,2026:wrong"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_UNDERSCORES = re.compile(r"_(?![0-9a-fA-F])|(?<![0-9a-fA-F])_")  # other than between two digits


@dataclass
class YamlDocument:
    tree: Any
    """Plain data, with ``WRONG`` in the place of what is among the faults."""
    lines: dict[str, int] = field(default_factory=dict)
    """The line, from 1, where each value's name is written: ``data.mix[0].weight``."""


class _Loader(yaml.SafeLoader):
    """Dates stay text: no setting is one."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML declares it as a class variable)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what would be a fault without them."""

    def text(self, value: str) -> yaml.ScalarNode:
        is_plain = value != "None" and not _LEADING_ZERO.fullmatch(value)
        return self.represent_scalar(f"{_TAG}str", value, style=None if is_plain else "'")


_Dumper.add_representer(str, _Dumper.text)
_Loader.add_constructor(_WRONG_TAG, lambda loader, node: WRONG)


def read_yaml(path: Path, faults: Faults) -> YamlDocument:
    """A file of YAML. What stands in it twice, has no value, or would be misread is added to ``faults``.

    Raises:
        ValueError: it is not UTF-8, or not YAML.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), faults, origin=str(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = str(getattr(error, "problem", None) or error)
        raise ValueError(f"{path}{line} is not YAML: {' '.join(reason.split())}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from error


def parse_yaml(text: str, faults: Faults, *, origin: str | None = None, name: str = "") -> YamlDocument:
    """The same of a text.

    Args:
        origin: file that the text is from; faults then name it, and the line.
        name: what the text is the value of.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None or (isinstance(root, yaml.ScalarNode) and not name):
            return YamlDocument(None if root is None else loader.construct_document(root))
        check = _Check(faults, origin)
        check.node(root, name, root.start_mark.line + 1)
        return YamlDocument(loader.construct_document(root), check.lines)
    finally:
        loader.dispose()


def dump_yaml(tree: Any, **options: Any) -> str:
    """Plain data as YAML that is read back as it was. ``options`` are those of ``yaml.dump``."""
    written: str = yaml.dump(tree, Dumper=_Dumper, **options)
    return written


class _Check:
    """Walks the nodes of a document, and marks those that are faults."""

    def __init__(self, faults: Faults, origin: str | None):
        self.lines: dict[str, int] = {}
        self._faults, self._origin = faults, origin
        self._seen: set[yaml.Node] = set()

    def node(self, node: yaml.Node, name: str, line: int) -> None:
        self.lines[name] = line
        if node in self._seen:  # by an alias
            return
        self._seen.add(node)
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, name)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.node(item, f"{name}[{index}]", item.start_mark.line + 1)
        elif fault := self._fault(node):
            self._add(f"{name} {fault}", line)
            node.tag = _WRONG_TAG

    def _mapping(self, node: yaml.MappingNode, name: str) -> None:
        entries: dict[Hashable, list[tuple[yaml.Node, yaml.Node]]] = {}
        for key, value in node.value:
            entries.setdefault(_identity(key), []).append((key, value))
        node.value = [same[-1] for same in entries.values()]
        for same in entries.values():
            key, value = same[-1]
            written = f"{name}.{key.value}" if name else str(key.value)
            lines = [each.start_mark.line + 1 for each, _ in same]
            if len(same) > 1:
                times = "twice" if len(same) == 2 else f"{len(same)} times"
                self._add(f"{written} is given {times}: give it once", *lines)
            for (_, earlier), line in zip(same[:-1], lines, strict=False):
                if isinstance(earlier, yaml.MappingNode) and isinstance(value, yaml.MappingNode):
                    if earlier is not value:  # what is wrong in either is to be found
                        value.value = [*earlier.value, *value.value]
                else:
                    self.node(earlier, written, line)
            if key not in self._seen:
                self._seen.add(key)
                if fault := self._fault(key, is_key=True):
                    self._add(f"a name{f' under {name}' if name else ''} {fault}", lines[-1])
                    key.tag = _WRONG_TAG
            self.node(value, written, lines[-1])

    def _fault(self, node: yaml.Node, *, is_key: bool = False) -> str | None:
        """What is to be said of a scalar, where something is."""
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:
            return None  # in quotes, or a block of text
        text = node.value
        if not text and node.tag == f"{_TAG}null":
            if is_key:
                return "is empty: give it one"
            return "has no value: give it one, or null where that is allowed, or leave it out"
        if text == "None" and not is_key:
            return "is None, which YAML takes for a text: write null for no value, or 'None' if it is one"
        if node.tag not in (f"{_TAG}int", f"{_TAG}float") and not _LEADING_ZERO.fullmatch(text):
            return None
        if _LEADING_ZERO.fullmatch(text):
            return f"is {text}, which YAML may take for octal: leave out the leading zeros, or put it in quotes"
        if _BASE_60.fullmatch(text):
            return f"is {text}, which YAML takes for a number to base 60: write a plain one, or put it in quotes"
        if _UNDERSCORES.search(text):
            return f"is {text}: in a number _ stands between two digits; put it in quotes if it is text"
        try:
            SafeConstructor().construct_object(node)
        except ValueError:
            return f"is {text[:20]}...: a number of {len(text)} characters is too long to be read"
        return None

    def _add(self, fault: str, *lines: int) -> None:
        *others, last = map(str, dict.fromkeys(lines))
        words = f"lines {', '.join(others)} and {last}" if others else f"line {last}"
        self._faults.add(f"{fault} ({self._origin}, {words})" if self._origin else fault)


def _identity(key: yaml.Node) -> Hashable:
    """Equal for keys of which a mapping would keep one."""
    if isinstance(key, yaml.ScalarNode) and key.tag not in (f"{_TAG}merge", f"{_TAG}value"):
        try:
            constructed: Hashable = SafeConstructor().construct_object(key)
        except ValueError:
            return key.value
        return constructed
    return (key.tag, str(key.value))
