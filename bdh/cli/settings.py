"""From YAML files and flags to a dataclass of settings, with every fault reported at once.

A settings class is a dataclass whose fields are values, or dataclasses: sections, whose fields are named with a dot. The
docstring under a field is its help text. Pydantic checks the values, by :mod:`bdh.validation`; this module says which of
several values of a field counts, and reads what is written. Text is kept from being read as YAML: a prompt of `# x` would
be nothing, and one of `1e3` a number.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from bdh.validation import (
    Faults,
    Settings,
    SettingsType,
    alternatives,
    checked,
    collect_relations,
    field_types,
    plain_type,
    type_in_words,
)
from bdh.yaml_files import WRONG, YamlDocument, dump_yaml, lines_in_words, parse_yaml, read_yaml

_MISSING = dataclasses.MISSING


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
class _Given:
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


class _Leaves(dict[str, Leaf]):
    """All settings of a class by their names, and what it says of those that are gone: its sections' ``gone``."""

    def __init__(self, settings_class: Any):
        super().__init__((leaf.name, leaf) for leaf in leaves_of(settings_class))
        self.gone = dict(_gone(settings_class))


def verbatim(default: Any) -> Any:
    """A field of text, or None, whose flag takes every value as text: elsewhere `null` stands for None."""
    return dataclasses.field(default=default, metadata={"verbatim": True})


def parse_settings(
    settings_class: type[SettingsType],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positionals: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    check_available: bool = True,
) -> SettingsType:
    """The settings that a command line asks for.

    Defaults are overridden by ``base``, that by the files given with ``--config`` in their order, those by the
    flags, wherever they stand. ``--help`` and ``--print_config`` print and exit.

    Args:
        positionals: fields that are given by their place; the last one may be a list, and takes the rest.
        base: nested settings, as a YAML file would hold them.
        check_available: whether to check too that what the settings name is there: :meth:`Settings.check_available`.

    Raises:
        OSError, ImportError: a configuration file, or what a setting names, is missing.
        ValueError: lists all unknown settings, values of a wrong type, and values out of range.
        SystemExit: with status 0, behind ``--help`` or ``--print_config``.
    """
    command_line = _CommandLine(leaves := _Leaves(settings_class), positionals, argv)
    if command_line.wants_help:
        _print_help(settings_class, prog, description, positionals)
        raise SystemExit(0)

    faults = Faults()
    stored = YamlDocument(base or {})
    raw = _flattened(stored, leaves, "the run's stored configuration", faults)
    raw |= command_line.raw_values(faults)
    settings, _ = _checked(settings_class, raw, leaves, faults)
    faults.raise_if_any()
    if command_line.wants_config:
        print(to_yaml(settings, with_help=True), end="")
        raise SystemExit(0)
    if check_available and isinstance(settings, Settings):
        settings.check_available()
    return settings


def given_settings(settings_class: type, argv: Sequence[str]) -> dict[str, Any]:
    """What the files and flags of a command line give, by dotted name; what is wrong is left to ``parse_settings``.

    Raises:
        FileNotFoundError: a configuration file is missing.
        ValueError: a configuration file is not YAML.
    """
    ignored, leaves = Faults(), _Leaves(settings_class)
    raw = _CommandLine(leaves, (), argv).raw_values(ignored)
    settings, right = _checked(settings_class, raw, leaves, ignored)  # type: ignore[var-annotated]
    return {name: functools.reduce(getattr, name.split("."), settings) for name in raw if name in right}


def to_yaml(settings: Any, *, with_help: bool = False) -> str:
    """The settings as YAML that ``--config`` reads back; ``with_help`` puts each setting's help above it."""
    lines: list[str] = []
    section: list[str] = []
    for leaf in leaves_of(type(settings)):
        *path, name = leaf.name.split(".")
        value = functools.reduce(getattr, (*path, name), settings)
        same = next((depth for depth, (a, b) in enumerate(zip(path, section, strict=False)) if a != b), len(section))
        lines += [f"{'  ' * depth}{path[depth]}:" for depth in range(min(same, len(path)), len(path))]
        section = path
        indent = "  " * len(path)
        if with_help and leaf.help:
            lines.append(f"{indent}# {leaf.help}")
        written = dump_yaml(value, default_flow_style=True, allow_unicode=True, width=10**6)
        lines.append(f"{indent}{name}: {written.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"


class _CommandLine:
    """What an argv says: values of settings, configuration files, and the two questions it may ask."""

    def __init__(self, leaves: _Leaves, positionals: Sequence[str], argv: Sequence[str]):
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

    def raw_values(self, faults: Faults) -> dict[str, _Given]:
        """The values of the files in their order, and over them those of the flags."""
        raw: dict[str, _Given] = {}
        for path in self.config_files:
            raw |= _flattened(_read_config(Path(expanded_path(path)), faults), self._leaves, path, faults)
        faults.found.extend(self.faults)
        return raw | {name: _Given(value) for name, value in self.values.items()}

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
        before = self.values.get(leaf.name, _MISSING)
        is_nullable_text = leaf.takes_text and type(None) in leaf.types and not leaf.verbatim
        if is_nullable_text and value == "None":
            self.faults.append(f"{leaf.name} is 'None': write null for no value")
        elif before is _MISSING:
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
        default, annotation = _default(field, section), field_types(settings_class)[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(annotation):
            yield from leaves_of(annotation, f"{name}.", None if default is _MISSING else default)
        else:
            yield Leaf(name, annotation, default, settings_class, field.metadata.get("verbatim", False))


def _default(field: dataclasses.Field, section: Any) -> Any:
    """What a field holds where nothing is given, within the object that its section is by default, if there is one."""
    if section is not None:
        return getattr(section, field.name)
    return field.default if field.default_factory is _MISSING else field.default_factory()


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


def _flattened(document: YamlDocument, leaves: _Leaves, origin: str, faults: Faults) -> dict[str, _Given]:
    """The settings of a document by their dotted names, without those that are among the faults already."""
    flat: dict[str, _Given] = {}
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
                flat[name] = _Given(value, place, *_as_written(name, value, document))
            elif name in sections and isinstance(value, dict):
                walk(value, f"{name}.")
            elif name in sections:
                faults.add(f"{name} is {_shown(value)}: must be a section, with settings under it ({place})")
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


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _suggestion(name: str, leaves: _Leaves) -> str:
    if name in leaves.gone:
        return f": {leaves.gone[name]}"
    same_end = [leaf for leaf in leaves if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same_end or difflib.get_close_matches(name, leaves, n=1, cutoff=0.6)
    if not near:
        ends = {leaf.rpartition(".")[2]: leaf for leaf in leaves}
        near = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], ends, n=1, cutoff=0.7)]
    return f": did you mean {near[0]}?" if near else "; --help lists them"


def _checked(
    settings_class: type[SettingsType], raw: Mapping[str, _Given], leaves: _Leaves, faults: Faults
) -> tuple[SettingsType, set[str]]:
    """The settings with the values that are of their types, whose names come second; what else is given is a fault."""
    values: dict[str, Any] = {}
    for name, given in raw.items():
        try:
            value = _read(leaves[name], given.value, faults)
            if value is not WRONG:
                values[name] = _with_expanded_paths(value, leaves[name].type, field_types(leaves[name].owner))
        except ValueError as error:
            faults.add(f"{name} is {_shown(given.value)}: {error}{given.at}")
    missing = [leaf for leaf in leaves.values() if leaf.default is _MISSING and leaf.name not in raw]
    settings, wrong = checked(_built(settings_class, values))
    out_of_range = []
    for fault in wrong:
        name = ".".join(fault.path)
        if fault.is_of_type:
            out_of_range.append(fault)
        elif name in values:
            del values[name]
            leaf, given = leaves[name], raw[name]
            is_quotable = given.quotable and leaf.takes_text
            hint = f"; put it in quotes if it is text: '{given.quotable}'" if is_quotable else ""
            faults.add(f"{name} is {given.shown or _shown(given.value)}: must be {fault.allowed}{hint}{given.at}")
    for leaf in missing:
        faults.add(f"{leaf.name} is missing: {leaf.help}")
    for fault in out_of_range:
        faults.require_type(".".join(fault.path), fault.value, fault.allowed)
    if faults.found:
        settings = _built(settings_class, values)
    without = [name for name, leaf in leaves.items() if leaf.default is _MISSING and name not in values]
    collect_relations(settings, faults, [tuple(name.split(".")) for name in without])
    return settings, set(values)


def _read(leaf: Leaf, value: Any, faults: Faults) -> Any:
    """A value as it is meant for a setting: text that stands for a number, a list or a mapping is one. WRONG and faults,
    where YAML would misread it."""
    if leaf.takes_text and isinstance(value, str):
        return [value] if leaf.is_list else value
    if leaf.takes_texts and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    if isinstance(value, str):
        before, text, tree = len(faults.found), value, None
        with contextlib.suppress(yaml.YAMLError):  # what is no YAML is no number either
            tree = parse_yaml(text, faults, name=leaf.name).tree
        if len(faults.found) > before:
            return WRONG
        is_literal = any(text in typing.get_args(kind) for kind in leaf.types if typing.get_origin(kind) is Literal)
        value = text if is_literal or (tree is None and text not in ("null", "~")) else tree
        if leaf.is_list and not isinstance(value, list | dict):
            value = [value]
    return _with_numbers(value, leaf.types)


def _with_numbers(value: Any, kinds: Sequence[Any]) -> Any:
    """A value with the texts in it that stand for numbers, where its type has numbers, as these: YAML 1.1 leaves 1e3."""
    if isinstance(value, list):
        inner = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        return [_with_numbers(each, _members(inner)) for each in value]
    if isinstance(value, dict):
        of, to = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is dict), (Any, Any))
        keys = [_with_numbers(key, (of,)) for key in value]
        if len(set(keys)) < len(keys):
            return value  # with keys of other types
        return {key: _with_numbers(each, _members([to])) for key, each in zip(keys, value.values(), strict=True)}
    if isinstance(value, str) and "n" not in value.lower():  # inf and nan
        for kind in (int, float) if str not in kinds else ():
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(value)
    return value


def _members(annotations: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(plain_type(each) for annotation in annotations for each in alternatives(plain_type(annotation)))


def _built(settings_class: Any, values: Mapping[str, Any], prefix: str = "", section: Any = None) -> Any:
    """An instance from the values by dotted name; the rest is as in ``section``, or has its defaults, or is None."""
    arguments = {}
    for field in dataclasses.fields(settings_class):
        name, default = prefix + field.name, _default(field, section)
        if dataclasses.is_dataclass(annotation := field_types(settings_class)[field.name]):
            inner = None if default is _MISSING else default
            arguments[field.name] = _built(annotation, values, f"{name}.", inner)
        else:
            arguments[field.name] = values.get(name, None if default is _MISSING else default)
    return settings_class(**arguments)


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


def _with_expanded_paths(value: Any, annotation: Any, section: Mapping[str, Any]) -> Any:
    """A value with its paths expanded, those in a list or in a mapping too, whose keys are settings of the section."""
    if isinstance(value, list):
        return [_with_expanded_paths(each, annotation, section) for each in value]
    if isinstance(value, dict):
        return {key: _with_expanded_paths(each, section.get(key), section) for key, each in value.items()}
    return expanded_path(value) if isinstance(value, str) and holds_paths(annotation) else value


def _print_help(settings_class: Any, prog: str, description: str, positionals: Sequence[str]) -> None:
    usage = " ".join([prog, *(name.upper() for name in positionals), "[--config FILE ...] [--SETTING VALUE ...]"])
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description, add_help=False)
    groups: dict[str, Any] = {"": parser.add_argument_group("settings")}
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file with settings; several are read in order")
    general.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("--help", action="store_true", help="print this text and exit")
    for leaf in leaves_of(settings_class):
        section, _, end = leaf.name.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(f"section {section}")
        has_place = leaf.name in positionals
        about = [] if has_place else [type_in_words(leaf.type)]
        if leaf.default is not _MISSING and not (has_place and not leaf.default):
            shown = dump_yaml(leaf.default, default_flow_style=True).removesuffix("...\n").strip()
            about.append(f"default: {shown}")
        text = (f"{leaf.help} ({'; '.join(about)})" if about else leaf.help).replace("%", "%%")
        name = leaf.name if has_place else f"--{leaf.name}"
        groups[section].add_argument(name, metavar=end.upper(), help=text)
    parser.print_help()
