"""From YAML files and flags to a dataclass of settings, with every fault reported at once.

A settings class is a dataclass whose fields are values, or dataclasses: sections, whose fields are named with a
dot. The docstring under a field is its help text. `jsonargparse` converts and checks each value; this module
decides which of several values of a field counts, and gathers what is wrong: left to itself, `jsonargparse` stops at
the first fault, and lets a file that stands behind a flag override it. Text is kept from it too, since it would read
it as YAML: a prompt of `# x` would be nothing, and one of `1e3` a number.
"""

import argparse
import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser

from bdh.path_text import expanded_path, holds_paths, with_expanded_paths
from bdh.validation import Faults, Settings, collect_faults
from bdh.yaml_files import WRONG, YamlDocument, dump_yaml, lines_in_words, parse_yaml, read_yaml

SettingsType = TypeVar("SettingsType")
_MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class _Leaf:
    """One setting."""

    name: str
    """With its section: data.source."""
    type: Any
    default: Any
    help: str
    is_path: bool
    verbatim: bool
    """Whether even the flag's value `null` is text."""


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


class _Leaves(dict[str, _Leaf]):
    """All settings of a class by their names, and what it says of those that are gone: its sections' ``gone``."""

    def __init__(self, settings_class: Any):
        super().__init__((leaf.name, leaf) for leaf in _leaves(settings_class))
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
    values = _all_converted(raw, leaves, faults)
    required = [leaf for leaf in leaves.values() if leaf.default is _MISSING]
    for leaf in required:
        if leaf.name not in raw:
            faults.add(f"{leaf.name} is missing: {leaf.help}")
    settings = _built(settings_class, values, fill_missing=bool(faults.found))
    collect_faults(settings, faults, with_top=all(leaf.name in values for leaf in required))
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
    leaves = _Leaves(settings_class)
    ignored = Faults()
    return _all_converted(_CommandLine(leaves, (), argv).raw_values(ignored), leaves, ignored)


def to_yaml(settings: Any, *, with_help: bool = False) -> str:
    """The settings as YAML that ``--config`` reads back; ``with_help`` puts each setting's help above it."""
    lines: list[str] = []
    section: list[str] = []
    for leaf in _leaves(type(settings)):
        *path, name = leaf.name.split(".")
        value = settings
        for part in (*path, name):
            value = getattr(value, part)
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
        is_switch = leaf is not None and leaf.type is bool
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

    def _give(self, leaf: _Leaf, value: str) -> None:
        """A list grows with each value; anything else is given once."""
        before = self.values.get(leaf.name, _MISSING)
        is_nullable_text = _holds_text(leaf.type) and _takes_null(leaf.type) and not leaf.verbatim
        if is_nullable_text and value == "None":
            self.faults.append(f"{leaf.name} is 'None': write null for no value")
        elif before is _MISSING:
            self.values[leaf.name] = None if is_nullable_text and value == "null" else value
        elif _takes_list(leaf.type):
            self.values[leaf.name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            self.faults.append(f"{leaf.name} is given twice, as {before!r} and {value!r}: give it once")

    def _take_places(self, positionals: Sequence[str], by_place: list[str]) -> None:
        for name in positionals:
            leaf = self._leaves[name]
            num_taken = len(by_place) if _takes_list(leaf.type) else 1
            for value in by_place[:num_taken]:
                self._give(leaf, value)
            by_place = by_place[num_taken:]
        for argument in by_place:
            self.faults.append(f"{argument!r} is not expected here: settings start with two dashes")


def _leaves(settings_class: Any, prefix: str = "", section: Any = None) -> Iterator[_Leaf]:
    """The settings of a class. Those of a section have the defaults of ``section``, the object that its field makes."""
    hints = typing.get_type_hints(settings_class)
    marked = typing.get_type_hints(settings_class, include_extras=True)
    helps = _helps(settings_class)
    for field in dataclasses.fields(settings_class):
        default = _default(field, section)
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], f"{prefix}{field.name}.", None if default is _MISSING else default)
            continue
        yield _Leaf(
            prefix + field.name,
            hints[field.name],
            default,
            helps.get(field.name, ""),
            is_path=holds_paths(marked[field.name]),
            verbatim=field.metadata.get("verbatim", False),
        )


def _default(field: dataclasses.Field, section: Any) -> Any:
    """What a field holds where nothing is given, within the object that its section is by default, if there is one."""
    if section is not None:
        return getattr(section, field.name)
    return field.default if field.default_factory is _MISSING else field.default_factory()


def _gone(settings_class: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are no more, by their dotted names, each with what is said of it."""
    yield from ((f"{prefix}{name}", hint) for name, hint in getattr(settings_class, "gone", {}).items())
    hints = typing.get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _gone(hints[field.name], f"{prefix}{field.name}.")


def _helps(settings_class: Any) -> dict[str, str]:
    """The docstrings under the fields, those of the classes above included."""
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


def _all_converted(raw: Mapping[str, _Given], leaves: Mapping[str, _Leaf], faults: Faults) -> dict[str, Any]:
    """The values in the types of their settings; those that cannot be are left out, and are faults."""
    values = {}
    for name, given in raw.items():
        value = _converted(leaves[name], given, faults)
        if value is _MISSING:
            continue
        try:
            values[name] = with_expanded_paths(name, value, lambda each: each in leaves and leaves[each].is_path)
        except ValueError as error:
            faults.add(f"{name} is {_shown(value)}: {error}{f' ({given.place})' if given.place else ''}")
    return values


def _converted(leaf: _Leaf, given: _Given, faults: Faults) -> Any:
    """A value in the type of its setting, or MISSING and a fault."""
    value = given.value
    is_list_only = typing.get_origin(leaf.type) is list
    if _holds_text(leaf.type) and isinstance(value, str):
        return [value] if is_list_only else value
    if list[str] in _alternatives(leaf.type) and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if value is None and _takes_null(leaf.type):
        return None
    if isinstance(value, str) and (value := _parsed(leaf.name, value, faults)) is _MISSING:
        return _MISSING
    if is_list_only and isinstance(value, str):
        value = [value]  # one value need not be written as a list
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=leaf.type)
    try:
        # jsonargparse takes null for every setting, and true, or 1.5, for the whole number 1 where they are keys.
        if value is not None and _keys_fit(leaf.type, value):
            return parser.parse_object({"value": value}).value
    except (ArgumentError, OverflowError):
        pass
    place = f" ({given.place})" if given.place else ""
    hint = f"; put it in quotes if it is text: '{given.quotable}'" if given.quotable and _holds_text(leaf.type) else ""
    faults.add(f"{leaf.name} is {given.shown or _shown(given.value)}: must be {_in_words(leaf.type)}{hint}{place}")
    return _MISSING


def _parsed(name: str, text: str, faults: Faults) -> Any:
    """A list or mapping that a text is as YAML, else the text; MISSING and faults, if YAML would misread it."""
    before = len(faults.found)
    tree = None
    with contextlib.suppress(yaml.YAMLError):  # what is no YAML is no number either
        tree = parse_yaml(text, faults, name=name).tree
    if len(faults.found) > before:
        return _MISSING
    return tree if isinstance(tree, list | dict) else text


def _keys_fit(annotation: Any, value: Any) -> bool:
    """Whether the names in a mapping are of its type, and stay different in it."""
    if typing.get_origin(annotation) is not dict or not isinstance(value, dict):
        return True
    if typing.get_args(annotation)[0] is not int:
        return all(isinstance(key, str) for key in value)
    keys = [str(key) for key in value]
    return all(key.removeprefix("-").isdecimal() for key in keys) and len(set(map(int, keys))) == len(keys)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; else the type alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _takes_null(annotation: Any) -> bool:
    return any(each in (Any, None, type(None)) for each in _alternatives(annotation))


def _takes_list(annotation: Any) -> bool:
    return any(typing.get_origin(each) is list for each in _alternatives(annotation))


def _holds_text(annotation: Any) -> bool:
    """Whether a value may be any text, or a list of texts."""
    return any(each in (str, list[str]) for each in _alternatives(annotation))


def _in_words(annotation: Any) -> str:
    """What a type allows, for a person."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_in_words(argument) for argument in arguments)
    if annotation == list[str]:
        return "a list of texts: a flag for each, or [a, b] in a file"
    if origin is list:
        return "a list, as [a, b]"
    if origin is dict:
        of, to = map(_in_words, arguments)
        return f"a mapping, as {{name: value}}, from {of} to {to}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(annotation, str(annotation))


def _built(
    settings_class: Any, values: Mapping[str, Any], *, fill_missing: bool, prefix: str = "", section: Any = None
) -> Any:
    """An instance from the values by dotted name; the rest is as in ``section``, or has its defaults."""
    hints = typing.get_type_hints(settings_class)
    arguments = {}
    for field in dataclasses.fields(settings_class):
        name, default = prefix + field.name, _default(field, section)
        if dataclasses.is_dataclass(hints[field.name]):
            inner = None if default is _MISSING else default
            arguments[field.name] = _built(
                hints[field.name], values, fill_missing=fill_missing, prefix=f"{name}.", section=inner
            )
        elif name in values:
            arguments[field.name] = values[name]
        elif default is not _MISSING:
            arguments[field.name] = default
        elif fill_missing:
            arguments[field.name] = None  # it is among the faults; the others are still to be found
    return settings_class(**arguments)


def _print_help(settings_class: Any, prog: str, description: str, positionals: Sequence[str]) -> None:
    usage = " ".join([prog, *(name.upper() for name in positionals), "[--config FILE ...] [--SETTING VALUE ...]"])
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description, add_help=False)
    groups: dict[str, Any] = {"": parser.add_argument_group("settings")}
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file with settings; several are read in order")
    general.add_argument("--print_config", action="store_true", help="print the resulting configuration and exit")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("--help", action="store_true", help="print this text and exit")
    for leaf in _leaves(settings_class):
        section, _, end = leaf.name.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(f"section {section}")
        has_place = leaf.name in positionals
        about = [] if has_place else [_in_words(leaf.type)]
        if leaf.default is not _MISSING and not (has_place and not leaf.default):
            shown = dump_yaml(leaf.default, default_flow_style=True).removesuffix("...\n").strip()
            about.append(f"default: {shown}")
        text = (f"{leaf.help} ({'; '.join(about)})" if about else leaf.help).replace("%", "%%")
        name = leaf.name if has_place else f"--{leaf.name}"
        groups[section].add_argument(name, metavar=end.upper(), help=text)
    parser.print_help()
