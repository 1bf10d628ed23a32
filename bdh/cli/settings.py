"""Reads YAML files and flags into a dataclass of settings, and reports all faults at once.

A settings class is a dataclass. Its fields are values or sections, which are dataclasses too. The names of a section's
fields begin with that of the section and a dot. The docstring under a field is its help text. :mod:`bdh.validation`
checks the values with pydantic. The value of a flag is not parsed as YAML if the setting takes text: a prompt `# x`
would be empty, and a prompt `12` a number.
"""

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bdh.cli.leaves import Leaf, default_of, help_parser, in_a_line, leaves_of, members
from bdh.cli.shipped import config_file
from bdh.text_files import WRONG, YamlDocument, lines_in_words, parse_yaml, read_yaml
from bdh.validation import (
    Faults,
    Settings,
    SettingsType,
    checked,
    collect_relations,
    expanded_path,
    field_types,
    holds_paths,
)
from bdh.words import nearest


def verbatim(default: Any) -> Any:
    """Returns a field of text or None whose flag takes even `null` as text. For other fields, `null` means None."""
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
    """Returns the settings that a command line gives.

    ``base`` overrides the defaults, the files of ``--config`` override ``base`` in their order, and flags override the
    files, wherever they are on the command line. ``--help`` and ``--print_config`` print and exit.

    Args:
        settings_class: the class of the settings.
        argv: the arguments after the command's name.
        prog: the name of the command, for the help.
        description: the description of the command, for the help.
        positionals: the fields that are positional arguments. The last one may be a list, which takes all that remain.
        base: nested settings, as a YAML file would contain them.
        check_available: whether to call :meth:`Settings.check_available`, which checks that files, packages and the
            like that the settings name are available.

    Raises:
        OSError, ImportError: a configuration file, or what a setting names, is missing.
        ValueError: lists all unknown settings, values of a wrong type, and values out of range.
        SystemExit: with status 0, after ``--help`` or ``--print_config``.
    """
    leaves, faults = Leaves(settings_class), Faults()
    command_line = CommandLine(leaves, positionals, argv)
    if command_line.wants_help:
        help_parser(settings_class, leaves, prog, description, positionals).print_help()
        raise SystemExit(0)
    given = leaves.given_in(YamlDocument(base or {}), "the run's stored configuration", faults)
    settings, _ = _checked(leaves, given | command_line.given(faults), faults)
    faults.raise_if_any()
    if command_line.wants_config:
        print(to_yaml(settings, with_help=True), end="")
        raise SystemExit(0)
    if check_available and isinstance(settings, Settings):
        settings.check_available()
    return settings


class Command:
    """A command. Call it with the arguments after its name; it returns the exit status.

    Args:
        run: the function ``run_NAME`` that runs it.
        settings_class: the class of its settings.
        positionals: the settings that are positional arguments.
        description: the description in the help; by default the docstring of ``run``.
        prog: the name in the help; by default ``bdh NAME``.
    """

    def __init__(
        self,
        run: Callable[[Sequence[str]], int],
        settings_class: type[Settings],
        positionals: Sequence[str] = (),
        description: str | None = None,
        prog: str | None = None,
    ):
        functools.update_wrapper(self, run)
        self._run, self.settings_class, self.positionals = run, settings_class, positionals
        self.prog = f"bdh {run.__name__.removeprefix('run_')}" if prog is None else prog
        self.description = " ".join((run.__doc__ or "").split()) if description is None else description

    def __call__(self, argv: Sequence[str]) -> int:
        return self._run(argv)

    def parse(self, argv: Sequence[str], **options: Any) -> Any:
        """Calls :func:`parse_settings` with this command's settings, name and description."""
        return parse_settings(
            self.settings_class,
            argv,
            prog=self.prog,
            description=self.description,
            positionals=self.positionals,
            **options,
        )


def command(
    *positionals: str, base: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None
) -> Callable[[Callable[[Any], int]], Command]:
    """A decorator that turns a function ``run_NAME(settings)`` into the command ``bdh NAME``.

    The docstring of the function is the description in the help.

    Args:
        positionals: the settings that are positional arguments.
        base: returns nested settings that override the defaults, or None, for the settings of the command line.
    """

    def made(run: Callable[[Any], int]) -> Command:
        settings_class = run.__annotations__["settings"]

        @functools.wraps(run)
        def run_argv(argv: Sequence[str]) -> int:
            stored = None
            if base is not None and not {"-h", "--help"} & set(argv):
                stored = base(given_settings(settings_class, argv, positionals))
            return run(made_command.parse(argv, base=stored))

        made_command = Command(run_argv, settings_class, positionals)
        return made_command

    return made


def takes(settings_class: type[Settings], *positionals: str, **texts: str) -> Callable[[Any], Command]:
    """A decorator that turns a function of the arguments, which calls :meth:`Command.parse` itself, into a command.

    Args:
        settings_class: the class of the settings.
        positionals: the settings that are positional arguments.
        texts: ``description`` and ``prog``, as for :class:`Command`.
    """
    return lambda run: Command(run, settings_class, positionals, **texts)


def given_settings(settings_class: type, argv: Sequence[str], positionals: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the values that files and flags of a command line give, by dotted name.

    Invalid ones are left out: ``parse_settings`` reports them.

    Raises:
        FileNotFoundError: a configuration file is missing.
        ValueError: a configuration file is not YAML.
    """
    ignored, leaves = Faults(), Leaves(settings_class)
    given = CommandLine(leaves, positionals, argv).given(ignored)
    settings, right = _checked(leaves, given, ignored)
    return {name: functools.reduce(getattr, name.split("."), settings) for name in given if name in right}


def to_yaml(settings: Any, *, with_help: bool = False) -> str:
    """Returns the settings as YAML that ``--config`` can read. ``with_help`` adds each setting's help above it."""
    lines: list[str] = []
    section: list[str] = []
    for leaf in leaves_of(type(settings)):
        *path, name = leaf.name.split(".")
        value = functools.reduce(getattr, (*path, name), settings)
        pairs = enumerate(zip(path, section, strict=False))
        same = next((depth for depth, (a, b) in pairs if a != b), min(len(path), len(section)))
        lines += [f"{'  ' * depth}{path[depth]}:" for depth in range(same, len(path))]
        section, indent = path, "  " * len(path)
        if with_help and leaf.help:
            lines.append(f"{indent}# {leaf.help}")
        lines.append(f"{indent}{name}: {in_a_line(value, allow_unicode=True)}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Given:
    """A value that was given for a setting, before conversion."""

    value: Any
    place: str = ""
    """The file and line, in parentheses."""
    shown: str = ""
    """The spelling in the file, if Python would show the value differently."""
    quotable: str = ""
    """The spelling of what would be text if it were quoted."""


class Leaves(dict[str, Leaf]):
    """All settings of a class by their dotted names."""

    def __init__(self, settings_class: Any):
        super().__init__((leaf.name, leaf) for leaf in leaves_of(settings_class))
        self.settings_class = settings_class
        self.sections = {name.rpartition(".")[0] for name in self} - {""}

    def given_in(self, document: YamlDocument, origin: str, faults: Faults) -> dict[str, Given]:
        """Returns the settings in a document by their dotted names, without those that have a fault already."""
        found: dict[str, Given] = {}

        def walk(branch: Mapping[Any, Any], prefix: str) -> None:
            for key, value in branch.items():
                name = f"{prefix}{key}"
                lines = document.lines.get(name, [])
                place = f" ({origin}, line {lines[-1]})" if lines else f" ({origin})"
                if name in self.sections and isinstance(value, dict):
                    walk(value, f"{name}.")
                elif key is WRONG or _holds_wrong(value):
                    continue
                elif name in self:
                    if name in found:
                        where = f"{origin}, {lines_in_words(sorted(lines))}" if lines else origin
                        faults.add(f"{name} is given twice: give it once ({where})")
                    found[name] = Given(value, place, *_as_written(name, value, document))
                elif name in self.sections:
                    faults.add(f"{name} is {_shown(value)}: must be a section, with settings under it{place}")
                else:
                    faults.add(f"{name} is not a setting{self.suggestion(name)}{place}")

        walk(document.tree, "")
        return found

    def suggestion(self, name: str) -> str:
        """Returns the end of the error for an unknown name: the name that was probably meant, if one is similar."""
        if hint := dict(_removed(self.settings_class)).get(name):
            return f": {hint}"
        end, ends = name.rpartition(".")[2], {leaf.rpartition(".")[2]: leaf for leaf in self}
        near = next((leaf for leaf in self if leaf.rpartition(".")[2] == end), None)
        near = near or next((ends[each] for each in ends if "_" in each and _initials(each) == end), None)
        if not near and (section := nearest(name, self.sections, 0.8)):
            return f": did you mean the section {section}?"
        near = near or nearest(name, self) or ends.get(nearest(end, ends, 0.7) or "")
        return f": did you mean {near}?" if near else "; --help lists them"


class CommandLine:
    """The content of a command line: values, configuration files, and whether help or the settings are requested."""

    def __init__(self, leaves: Leaves, positionals: Sequence[str], argv: Sequence[str]):
        self.wants_help = self.wants_config = False
        self._leaves, self._faults = leaves, Faults()
        self._values: dict[str, Any] = {}
        self._files: list[str] = []
        by_place: list[str] = []
        arguments = list(argv)
        while arguments:
            argument = arguments.pop(0)
            if argument == "--":
                by_place += arguments
                break
            flag = argument.partition("=")[0]
            if argument == "-h" or flag == "--help":
                self.wants_help = True
            elif flag in ("--print_config", "--print-config"):
                self.wants_config = True
            elif argument.startswith("--"):
                self._option(argument, arguments)
            elif argument.startswith("-") and len(argument) > 1 and not argument[1].isdigit():
                self._faults.add(f"{argument} is not a setting: settings start with two dashes")
            else:
                by_place.append(argument)
        for name in positionals:
            num_taken = len(by_place) if leaves[name].item_types else 1
            for value in by_place[:num_taken]:
                self._give(leaves[name], value)
            by_place = by_place[num_taken:]
        for argument in by_place:
            meant = f"did you mean --config {argument}?" if argument.endswith((".yaml", ".yml")) else ""
            self._faults.add(f"{argument!r} is not expected here: {meant or 'settings start with two dashes'}")

    def given(self, faults: Faults) -> dict[str, Given]:
        """Returns the given values. Later files override earlier ones, and flags override all files."""
        found: dict[str, Given] = {}
        for path in self._files:
            found |= self._leaves.given_in(_read_config(config_file(path), faults), path, faults)
        faults.found += self._faults.found
        return found | {name: Given(value) for name, value in self._values.items()}

    def _option(self, argument: str, rest: list[str]) -> None:
        written, equals, value = argument[2:].partition("=")
        name = written.replace("-", "_")
        leaf = self._leaves.get(name)
        follows = bool(rest) and not rest[0].startswith("--")
        if not equals and leaf is not None and leaf.types == (bool,):
            value = rest.pop(0) if follows and rest[0].lower() in ("true", "false", "yes", "no") else "true"
        elif not equals and follows:
            value = rest.pop(0)
        elif not equals and (leaf is not None or name == "config"):
            self._faults.add(f"--{written} is given without a value")
            return
        if name == "config":
            self._files.append(value)
        elif leaf is None:
            switch = self._leaves.get(positive := name.replace("no_", "", 1))
            is_switch = positive != name and switch is not None and switch.types == (bool,)
            hint = f": write --{positive} false" if is_switch else self._leaves.suggestion(name)
            self._faults.add(f"--{written} is not a setting{hint}")
        else:
            self._give(leaf, value)

    def _give(self, leaf: Leaf, value: str) -> None:
        """Records a value. A setting that takes a list can be given several times, any other only once."""
        before = self._values.get(leaf.name, MISSING)
        is_nullable_text = leaf.takes_text and type(None) in leaf.types and not leaf.verbatim
        if is_nullable_text and value == "None":
            self._faults.add(f"{leaf.name} is 'None': write null for no value")
        elif before is MISSING:
            self._values[leaf.name] = None if is_nullable_text and value == "null" else value
        elif leaf.item_types:
            self._values[leaf.name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            of_several = f"{leaf.name}s_file"
            instead = f", or several in a file with --{of_several}" if of_several in self._leaves else ""
            self._faults.add(f"{leaf.name} is given twice, as {before!r} and {value!r}: give it once{instead}")


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))


def _removed(settings_class: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the settings of earlier versions by their dotted names, with the hints in ``REMOVED`` of each section."""
    yield from ((f"{prefix}{name}", hint) for name, hint in getattr(settings_class, "REMOVED", {}).items())
    for name, annotation in field_types(settings_class).items():
        if dataclasses.is_dataclass(annotation):
            yield from _removed(annotation, f"{prefix}{name}.")


def _read_config(path: Path, faults: Faults) -> YamlDocument:
    document = read_yaml(path, faults)
    if document.tree is None:
        raise ValueError(f"{path} is empty: a configuration file holds at least one setting")
    if not isinstance(document.tree, dict):
        raise ValueError(f"{path} holds a {type(document.tree).__name__}: must hold settings, as `name: value`")
    return document


def _as_written(name: str, value: Any, document: YamlDocument) -> tuple[str, str]:
    """Returns the spelling of a value, and that of the part of it which would be text if quoted; else empty strings."""
    if len(document.lines.get(name, ())) > 1:
        return "", ""  # it is not known which of them is meant
    shown = document.written.get(name, "") if value is not None else ""
    items = [document.written.get(f"{name}[{index}]") for index in range(len(value) if isinstance(value, list) else 0)]
    return shown, shown or next(filter(None, items), "")


def _holds_wrong(value: Any) -> bool:
    if isinstance(value, dict):
        return any(key is WRONG or _holds_wrong(inner) for key, inner in value.items())
    return value is WRONG or (isinstance(value, list) and any(map(_holds_wrong, value)))


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _checked(leaves: Leaves, given: Mapping[str, Given], faults: Faults) -> tuple[Any, set[str]]:
    """Returns the settings with the given values that match their types, and the names of these.

    Values that do not match are recorded as faults.
    """
    values: dict[str, Any] = {}
    for name, each in given.items():
        try:
            value = _read(leaves[name], each.value, faults)
            if value is not WRONG:
                values[name] = _with_expanded_paths(value, leaves[name].type, field_types(leaves[name].owner))
        except ValueError as error:
            faults.add(f"{name} is {_shown(each.value)}: {error}{each.place}")
    settings, wrong = checked(_built(leaves.settings_class, values))
    for fault in wrong:
        if not fault.is_of_type and values.pop(name := ".".join(fault.path), MISSING) is not MISSING:
            each = given[name]
            is_quotable = each.quotable and leaves[name].takes_text
            hint = f"; put it in quotes if it is text: '{each.quotable}'" if is_quotable else ""
            faults.add(f"{name} is {each.shown or _shown(each.value)}: must be {fault.allowed}{hint}{each.place}")
    required = [leaf for leaf in leaves.values() if leaf.default is MISSING]
    for leaf in required:
        if leaf.name not in given:
            faults.add(f"{leaf.name} is missing: {leaf.help}")
    for fault in wrong:
        if fault.is_of_type:
            faults.require_type(".".join(fault.path), fault.value, fault.allowed)
    if faults.found:
        settings = _built(leaves.settings_class, values)
    collect_relations(settings, faults, [tuple(leaf.name.split(".")) for leaf in required if leaf.name not in values])
    return settings, set(values)


def _read(leaf: Leaf, value: Any, faults: Faults) -> Any:
    """Converts a value for a setting: text can be the YAML of a number, a list or a mapping.

    Returns WRONG, and records faults, if YAML would misread it.
    """
    if leaf.takes_text and isinstance(value, str):
        return [value] if leaf.is_list else value
    if leaf.takes_texts and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return value
    if isinstance(value, str):
        before, text, tree = len(faults.found), value, None
        with contextlib.suppress(yaml.YAMLError, RecursionError):  # invalid YAML is not a number either
            tree = parse_yaml(text, faults, name=leaf.name).tree
        if len(faults.found) > before:
            return WRONG
        is_literal = any(text in typing.get_args(kind) for kind in leaf.types if typing.get_origin(kind) is Literal)
        value = text if is_literal or (tree is None and text not in ("null", "~")) else tree
        if leaf.is_list and not isinstance(value, list | dict):
            value = [value]
    return _with_numbers(value, leaf.types)


def _with_numbers(value: Any, kinds: Sequence[Any]) -> Any:
    """Converts texts within a value to numbers where the type has numbers, since YAML 1.1 reads 1e3 as text."""
    if isinstance(value, list):
        inner = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        return [_with_numbers(each, members(inner)) for each in value]
    if isinstance(value, dict):
        of, to = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is dict), (Any, Any))
        keys = [_with_numbers(key, (of,)) for key in value]
        if len(set(keys)) < len(keys):
            return value  # converted keys would collide
        return {key: _with_numbers(each, members([to])) for key, each in zip(keys, value.values(), strict=True)}
    if isinstance(value, str) and "n" not in value.lower():  # neither inf nor nan
        for kind in (int, float) if str not in kinds else ():
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    return kind(value)
    return value


def _built(settings_class: Any, values: Mapping[str, Any], prefix: str = "", section: Any = None) -> Any:
    """Returns an instance with these values, by dotted name.

    All others are those of ``section`` if it is given, and otherwise the defaults, or None without a default.
    """
    arguments = {}
    for field in dataclasses.fields(settings_class):
        name, default = prefix + field.name, default_of(field, section)
        default = None if default is MISSING else default
        if dataclasses.is_dataclass(annotation := field_types(settings_class)[field.name]):
            arguments[field.name] = _built(annotation, values, f"{name}.", default)
        else:
            arguments[field.name] = values.get(name, default)
    return settings_class(**arguments)


def _with_expanded_paths(value: Any, annotation: Any, section: Mapping[str, Any]) -> Any:
    """Expands paths in a value, including those in lists, and in mappings whose keys are settings of the section."""
    if isinstance(value, list):
        return [_with_expanded_paths(each, annotation, section) for each in value]
    if isinstance(value, dict):
        return {key: _with_expanded_paths(each, section.get(key), section) for key, each in value.items()}
    if not (isinstance(value, str) and holds_paths(annotation)):
        return value
    if not value:  # such as an unset variable of the shell
        raise ValueError("must not be empty")
    return expanded_path(value)
