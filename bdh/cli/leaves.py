"""The individual settings of a class, and the help that lists them."""

import argparse
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from bdh.text_files import dump_yaml
from bdh.validation import alternatives, field_helps, field_types, plain_type, type_in_words


@dataclass(frozen=True)
class Leaf:
    """One setting."""

    name: str
    """The name with its section, such as data.source."""
    type: Any
    default: Any
    owner: type
    """The class of the section."""
    verbatim: bool
    """Whether the flag takes even `null` as text."""

    @property
    def help(self) -> str:
        """The docstring under the field, with null instead of None, as it is written in settings."""
        return re.sub(r"\bNone\b", "null", field_helps(self.owner).get(self.name.rpartition(".")[2], ""))

    @functools.cached_property
    def types(self) -> tuple[Any, ...]:
        """The types that a value can have: several if the type is a union."""
        return members([self.type])

    @property
    def item_types(self) -> list[Any]:
        """The types of the items, for each type of list that a value can have."""
        return [typing.get_args(each)[0] for each in self.types if typing.get_origin(each) is list]

    @property
    def takes_texts(self) -> bool:
        return str in map(plain_type, self.item_types)

    @property
    def takes_text(self) -> bool:
        """Whether a value can be any text, or a list of texts."""
        return str in self.types or self.takes_texts

    @property
    def is_list(self) -> bool:
        return len(self.types) == len(self.item_types) == 1


def leaves_of(settings_class: Any, prefix: str = "", section: Any = None) -> Iterator[Leaf]:
    """Yields the settings of a class. If ``section`` is an instance of it, its values are the defaults."""
    for field in dataclasses.fields(settings_class):
        default, annotation = default_of(field, section), field_types(settings_class)[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(annotation):
            yield from leaves_of(annotation, f"{name}.", None if default is MISSING else default)
        else:
            yield Leaf(name, annotation, default, settings_class, field.metadata.get("verbatim", False))


def default_of(field: dataclasses.Field, section: Any) -> Any:
    """Returns a field's value in ``section`` or, if that is None, its own default; MISSING if it has none."""
    if section is not None:
        return getattr(section, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def members(annotations: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the members of unions in these types, without ``Annotated`` metadata."""
    return tuple(plain_type(each) for annotation in annotations for each in alternatives(plain_type(annotation)))


def in_a_line(value: Any, **options: Any) -> str:
    return dump_yaml(value, default_flow_style=True, width=10**6, **options).removesuffix("...\n").strip()


def help_parser(
    settings_class: type,
    leaves: Mapping[str, Leaf],
    prog: str,
    description: str,
    positionals: Sequence[str],
    on_action: Callable[[str, argparse.Action], None] = lambda name, action: None,
) -> argparse.ArgumentParser:
    """Returns a parser with a command's settings and their help. It only prints them, and parses no command line.

    Args:
        settings_class: the class of the settings.
        leaves: its settings by name.
        prog: the name of the command.
        description: the description of the command.
        positionals: the settings that are positional arguments.
        on_action: called with the name of each setting, and with ``config``, and the action that argparse returned.
    """
    places = {
        name: f"{name.upper().removesuffix('S')} ..." if leaves[name].item_types else name.upper()
        for name in positionals
    }
    usage = " ".join([prog, *places.values(), "[--config FILE ...] [--SETTING VALUE ...]"])
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description, add_help=False)
    groups: dict[str, Any] = {"": parser.add_argument_group("settings")}
    general = parser.add_argument_group("general")
    files = "YAML file with settings, or the name of one that comes with bdh, such as tiny; of several, later ones override earlier ones"
    on_action("config", general.add_argument("--config", metavar="FILE", help=files))
    for flag, text in (
        ("--print_config", "print the resulting settings as YAML and exit"),
        ("--debug", "show the traceback of an error"),
        ("--help", "print this text and exit"),
    ):
        general.add_argument(flag, action="store_true", help=text)
    # The command's own settings come before those that it shares with other commands.
    order = {name: place for place, name in enumerate([*positionals, *inspect.get_annotations(settings_class)])}
    for leaf in sorted(leaves.values(), key=lambda leaf: order.get(leaf.name, len(order))):
        section, _, end = leaf.name.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(f"section {section}")
        has_place = leaf.name in positionals
        is_switch = leaf.types == (bool,)  # whose flag needs no value
        about = [] if has_place or is_switch else [type_in_words(leaf.type)]
        if leaf.default is not MISSING and not (has_place and not leaf.default):
            about.append(f"default: {in_a_line(leaf.default)}")
        text = (f"{leaf.help} ({'; '.join(about)})" if about else leaf.help).replace("%", "%%")
        metavar = "[true|false]" if is_switch else places.get(leaf.name, end.upper())
        flag = leaf.name if has_place else f"--{leaf.name}"
        on_action(leaf.name, groups[section].add_argument(flag, metavar=metavar, help=text))
    return parser
