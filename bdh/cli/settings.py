"""From YAML files and flags to a dataclass of settings, with every fault reported at once.

A settings class is a dataclass whose fields are values, or dataclasses: sections, whose fields are named with a dot. The
docstring under a field is its help text. Pydantic checks the values, by :mod:`bdh.validation`.
"""

import argparse
import contextlib
import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from bdh.cli.arguments import (
    MISSING,
    CommandLine,
    Given,
    Leaf,
    Leaves,
    default_of,
    expanded_path,
    flattened,
    holds_paths,
    leaves_of,
    shown_value,
)
from bdh.text_files import WRONG, YamlDocument, dump_yaml, parse_yaml
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
    command_line = CommandLine(leaves := Leaves(settings_class), positionals, argv)
    if command_line.wants_help:
        _print_help(settings_class, prog, description, positionals)
        raise SystemExit(0)

    faults = Faults()
    stored = YamlDocument(base or {})
    raw = flattened(stored, leaves, "the run's stored configuration", faults)
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
    ignored, leaves = Faults(), Leaves(settings_class)
    raw = CommandLine(leaves, (), argv).raw_values(ignored)
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


def _checked(
    settings_class: type[SettingsType], raw: Mapping[str, Given], leaves: Leaves, faults: Faults
) -> tuple[SettingsType, set[str]]:
    """The settings with the values that are of their types, whose names come second; what else is given is a fault."""
    values: dict[str, Any] = {}
    for name, given in raw.items():
        try:
            value = _read(leaves[name], given.value, faults)
            if value is not WRONG:
                values[name] = _with_expanded_paths(value, leaves[name].type, field_types(leaves[name].owner))
        except ValueError as error:
            faults.add(f"{name} is {shown_value(given.value)}: {error}{given.at}")
    missing = [leaf for leaf in leaves.values() if leaf.default is MISSING and leaf.name not in raw]
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
            faults.add(f"{name} is {given.shown or shown_value(given.value)}: must be {fault.allowed}{hint}{given.at}")
    for leaf in missing:
        faults.add(f"{leaf.name} is missing: {leaf.help}")
    for fault in out_of_range:
        faults.require_type(".".join(fault.path), fault.value, fault.allowed)
    if faults.found:
        settings = _built(settings_class, values)
    without = [name for name, leaf in leaves.items() if leaf.default is MISSING and name not in values]
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
        name, default = prefix + field.name, default_of(field, section)
        if dataclasses.is_dataclass(annotation := field_types(settings_class)[field.name]):
            inner = None if default is MISSING else default
            arguments[field.name] = _built(annotation, values, f"{name}.", inner)
        else:
            arguments[field.name] = values.get(name, None if default is MISSING else default)
    return settings_class(**arguments)


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
        if leaf.default is not MISSING and not (has_place and not leaf.default):
            shown = dump_yaml(leaf.default, default_flow_style=True).removesuffix("...\n").strip()
            about.append(f"default: {shown}")
        text = (f"{leaf.help} ({'; '.join(about)})" if about else leaf.help).replace("%", "%%")
        name = leaf.name if has_place else f"--{leaf.name}"
        groups[section].add_argument(name, metavar=end.upper(), help=text)
    parser.print_help()
