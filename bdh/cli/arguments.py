"""What a command line and its YAML files say of settings: which value of each counts, and what none can be.

The settings are the fields of nested dataclasses, named with a dot: ``Leaf``. Text is kept from being read as YAML: a prompt
of `# x` would be nothing, and one of `1e3` a number.
"""

import dataclasses
import difflib
import functools
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bdh.text_files import WRONG, YamlDocument, lines_in_words, read_yaml
from bdh.validation import Faults, alternatives, field_types, plain_type

MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Leaf:
    """One setting."""

    name: str
    """With its section: data.source."""
    type: Any
    default: Any
    owner: type
    """The section's class."""
    verbatim: bool
    """Whether even the flag's value `null` is text."""

    @property
    def help(self) -> str:
        """The docstring under the field."""
        return _helps(self.owner).get(self.name.rpartition(".")[2], "")

    @functools.cached_property
    def types(self) -> tuple[Any, ...]:
        return tuple(map(plain_type, alternatives(plain_type(self.type))))

    @property
    def takes_list(self) -> bool:
        return any(typing.get_origin(each) is list for each in self.types)

    @property
    def is_list(self) -> bool:
        return len(self.types) == 1 and self.takes_list

    @property
    def takes_text(self) -> bool:
        """Whether a value may be any text, or a list of texts."""
        return str in self.types or self.takes_texts

    @property
    def takes_texts(self) -> bool:
        return any(
            typing.get_origin(each) is list and plain_type(typing.get_args(each)[0]) is str for each in self.types
        )


@dataclass(frozen=True)
class Given:
    """A value of a setting, not converted yet."""

    value: Any
    place: str = ""
    """File and line."""
    shown: str = ""
    """How a file has it, where that is not as Python would show it."""
    quotable: str = ""
    """What in it would be text in quotes, as a file has it."""

    @property
    def at(self) -> str:
        return f" ({self.place})" if self.place else ""


class Leaves(dict[str, Leaf]):
    """All settings of a class by their names, and what it says of those that are gone: its sections' ``gone``."""

    def __init__(self, settings_class: Any):
        super().__init__((leaf.name, leaf) for leaf in leaves_of(settings_class))
        self.gone = dict(_gone(settings_class))


class CommandLine:
    """What an argv says: values of settings, configuration files, and the two questions it may ask."""

    def __init__(self, leaves: Leaves, positionals: Sequence[str], argv: Sequence[str]):
        self.values: dict[str, Any] = {}
        self.config_files: list[str] = []
        self.wants_help = self.wants_config = False
        self.faults: list[str] = []
        self._leaves = leaves
        by_place: list[str] = []
        arguments = list(argv)
        while arguments:
            argument = arguments.pop(0)
            if argument == "--":
                by_place += arguments
                break
            if argument.startswith("--"):
                self._option(argument, arguments)
            elif argument == "-h":
                self.wants_help = True
            elif argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit():
                self.faults.append(f"{argument} is not a setting: settings start with two dashes")
            else:
                by_place.append(argument)
        self._take_places(positionals, by_place)

    def raw_values(self, faults: Faults) -> dict[str, Given]:
        """The values of the files in their order, and over them those of the flags."""
        raw: dict[str, Given] = {}
        for path in self.config_files:
            raw |= flattened(_read_config(Path(expanded_path(path)), faults), self._leaves, path, faults)
        faults.found.extend(self.faults)
        return raw | {name: Given(value) for name, value in self.values.items()}

    def _option(self, argument: str, rest: list[str]) -> None:
        written, equals, value = argument[2:].partition("=")
        name = written.replace("-", "_")
        if name == "help":
            self.wants_help = True
            return
        if name == "print_config":
            self.wants_config = True
            return
        leaf = self._leaves.get(name)
        is_switch = leaf is not None and leaf.types == (bool,)
        follows = bool(rest) and not rest[0].startswith("--")
        if not equals and is_switch:
            value = rest.pop(0) if follows and rest[0].lower() in ("true", "false", "yes", "no") else "true"
        elif not equals and follows:
            value = rest.pop(0)
        elif not equals and (leaf is not None or name == "config"):
            self.faults.append(f"--{written} is given without a value")
            return
        if name == "config":
            self.config_files.append(value)
        elif leaf is None:
            self.faults.append(f"--{written} is not a setting{_suggestion(name, self._leaves)}")
        else:
            self._give(leaf, value)

    def _give(self, leaf: Leaf, value: str) -> None:
        """A list grows with each value; anything else is given once."""
        before = self.values.get(leaf.name, MISSING)
        is_nullable_text = leaf.takes_text and type(None) in leaf.types and not leaf.verbatim
        if is_nullable_text and value == "None":
            self.faults.append(f"{leaf.name} is 'None': write null for no value")
        elif before is MISSING:
            self.values[leaf.name] = None if is_nullable_text and value == "null" else value
        elif leaf.takes_list:
            self.values[leaf.name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            self.faults.append(f"{leaf.name} is given twice, as {before!r} and {value!r}: give it once")

    def _take_places(self, positionals: Sequence[str], by_place: list[str]) -> None:
        for name in positionals:
            leaf = self._leaves[name]
            num_taken = len(by_place) if leaf.takes_list else 1
            for value in by_place[:num_taken]:
                self._give(leaf, value)
            by_place = by_place[num_taken:]
        for argument in by_place:
            self.faults.append(f"{argument!r} is not expected here: settings start with two dashes")


def leaves_of(settings_class: Any, prefix: str = "", section: Any = None) -> Iterator[Leaf]:
    """The settings of a class. Those of a section have the defaults of ``section``, the object that its field makes."""
    for field in dataclasses.fields(settings_class):
        default, annotation = default_of(field, section), field_types(settings_class)[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(annotation):
            yield from leaves_of(annotation, f"{name}.", None if default is MISSING else default)
        else:
            yield Leaf(name, annotation, default, settings_class, field.metadata.get("verbatim", False))


def default_of(field: dataclasses.Field, section: Any) -> Any:
    """What a field holds where nothing is given, within the object that its section is by default, if there is one."""
    if section is not None:
        return getattr(section, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _gone(settings_class: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are no more, by their dotted names, each with what is said of it."""
    yield from ((f"{prefix}{name}", hint) for name, hint in getattr(settings_class, "gone", {}).items())
    for name, annotation in field_types(settings_class).items():
        if dataclasses.is_dataclass(annotation):
            yield from _gone(annotation, f"{prefix}{name}.")


@functools.cache
def _helps(settings_class: Any) -> dict[str, str]:
    """The docstrings under the fields, those of the classes above included."""
    from docstring_parser import parse_from_object

    helps: dict[str, str] = {}
    for each in reversed(settings_class.__mro__[:-1]):
        for parameter in parse_from_object(each).params:
            if parameter.description:
                helps[parameter.arg_name] = " ".join(parameter.description.split())
    return helps


def _read_config(path: Path, faults: Faults) -> YamlDocument:
    """A file of settings."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    document = read_yaml(path, faults)
    content = document.tree
    if content is None:
        raise ValueError(f"{path} is empty: a configuration file holds at least one setting")
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: must hold settings, as `name: value`")
    return document


def flattened(document: YamlDocument, leaves: Leaves, origin: str, faults: Faults) -> dict[str, Given]:
    """The settings of a document by their dotted names, without those that are among the faults already."""
    flat: dict[str, Given] = {}
    sections = {name.rpartition(".")[0] for name in leaves} - {""}

    def walk(branch: Mapping[Any, Any], prefix: str) -> None:
        for key, value in branch.items():
            name = f"{prefix}{key}"
            lines = document.lines.get(name)
            place = f"{origin}, line {document.lines[name][-1]}" if lines else origin
            if key is WRONG or _holds_wrong(value):
                if name in sections and isinstance(value, dict):
                    walk(value, f"{name}.")
            elif name in leaves:
                if name in flat:
                    where = f"{origin}, {lines_in_words(sorted(lines))}" if lines else origin
                    faults.add(f"{name} is given twice: give it once ({where})")
                flat[name] = Given(value, place, *_as_written(name, value, document))
            elif name in sections and isinstance(value, dict):
                walk(value, f"{name}.")
            elif name in sections:
                faults.add(f"{name} is {shown_value(value)}: must be a section, with settings under it ({place})")
            else:
                faults.add(f"{name} is not a setting{_suggestion(name, leaves)} ({place})")

    walk(document.tree, "")
    return flat


def _as_written(name: str, value: Any, document: YamlDocument) -> tuple[str, str]:
    """How a value is written, and what in it would be text in quotes; nothing where it is as Python would show it."""
    if len(document.lines.get(name, ())) > 1:
        return "", ""  # which of them it is cannot be told
    inside = [f"{name}[{index}]" for index in range(len(value))] if isinstance(value, list) else []
    shown = document.written.get(name, "") if value is not None else ""
    return shown, shown or next((document.written[each] for each in inside if each in document.written), "")


def _holds_wrong(value: Any) -> bool:
    if isinstance(value, dict):
        return any(key is WRONG or _holds_wrong(inner) for key, inner in value.items())
    return value is WRONG or (isinstance(value, list) and any(map(_holds_wrong, value)))


def shown_value(value: Any) -> str:
    return "null" if value is None else repr(value)


def _suggestion(name: str, leaves: Leaves) -> str:
    if name in leaves.gone:
        return f": {leaves.gone[name]}"
    same_end = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_end or difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    if not near:
        ends = {leaf.rpartition(".")[2]: leaf for leaf in leaves}
        near = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.7)]
    return f": did you mean {near[0]}?" if near else "; --help lists them"


_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def holds_paths(annotation: Any) -> bool:
    """Whether a type is ``PathText``, or made of it."""
    if typing.get_origin(annotation) is Annotated:
        return "path" in annotation.__metadata__
    return any(map(holds_paths, typing.get_args(annotation)))


def expanded_path(text: str) -> str:
    """A path with ``~`` and ``$VARIABLE`` or ``${VARIABLE}`` replaced; also each of several with commas between them.

    What exists under the very name that is given stays as it is, and a ``$`` that no name of a variable follows.

    Raises:
        ValueError: a variable is not set.
    """
    if os.path.lexists(text):
        return text
    if "," in text:
        return ",".join(map(expanded_path, text.split(",")))
    path = text.lstrip()  # "a, ~/b"
    return text[: -len(path) or None] + os.path.expanduser(_VARIABLE.sub(_environment_value, path))


def _environment_value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]
