"""Settings: dataclasses whose fields are checked by pydantic, and whose faults are all reported at once.

The type of a field determines its allowed values, including their range: ``Annotated[int, Ge(1)]``, or one of the names
below. :meth:`Settings.collect_faults` checks conditions that depend on several fields. The classes are plain
dataclasses, which check nothing when they are created. ``validated()`` checks nested settings together, so that all
faults are found at once, and imports pydantic only then.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt, Predicate

SettingsType = TypeVar("SettingsType")

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
PathText = Annotated[str, "path"]
"""The type of a setting that is or may be a path, in which ``~`` and ``$VARIABLE`` are replaced."""
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allowed(Predicate):
    """Restricts a type to the values for which a function is true: ``Annotated[str, Allowed(str.strip, "a name")]``."""

    words: str = ""
    """What the allowed values are, for messages."""


class Unit(NamedTuple):
    """The unit of a type's range, for messages."""

    name: str


PositiveSeconds = Annotated[float, Gt(0), Unit("seconds")]
DeviceName = Annotated[
    str, Allowed(re.compile(r"auto|cpu|cuda(:\d+)?|mps").fullmatch, "auto, cpu, cuda, cuda:N or mps")
]
"""The name of a device. Only PyTorch knows whether the machine has it."""


class Faults:
    """Collects faults. Each of them names its field, its value and what is allowed.

    ``with_prefix`` returns a view of the same list, in which the names of fields begin with a section:

        faults = Faults()
        faults.with_prefix("train").require(lr > 0, "learning_rate", lr, "a number above 0")
        faults.raise_if_any()
    """

    def __init__(self, prefix: str = "", found: list[str] | None = None, out_of_range: set[str] | None = None):
        self._prefix = prefix
        self.found: list[str] = [] if found is None else found
        self._out_of_range: set[str] = set() if out_of_range is None else out_of_range

    def with_prefix(self, section: str) -> "Faults":
        return Faults(f"{self._prefix}{section}.", self.found, self._out_of_range)

    def require(self, is_right: bool, field: str, value: Any, allowed: str) -> None:
        """Records a fault unless ``is_right`` is True. A field that has a fault by its type gets no second one.

        Args:
            is_right: whether the value is allowed.
            field: the name of the field.
            value: its value.
            allowed: what would be allowed.
        """
        if not is_right and self._prefix + field not in self._out_of_range:
            self.found.append(f"{self._prefix}{field} is {value!r}: must be {allowed}")

    def require_one_of(self, field: str, value: Any, allowed: Iterable[Any]) -> None:
        options = list(allowed)
        self.require(value in options, field, value, "one of " + ", ".join(map(str, options)))

    def require_type(self, field: str, value: Any, allowed: str) -> None:
        """Records that a value does not match the type of its field. Later faults of this field are not recorded."""
        self.require(False, field, value, allowed)
        self._out_of_range.add(self._prefix + field)

    def add(self, message: str) -> None:
        self.found.append(message)

    def raise_if_any(self) -> None:
        """Raises one ``ValueError`` that lists all faults, one per line, if there are any."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        raise ValueError(f"{len(self.found)} settings are wrong:\n" + "\n".join(f"  {f}" for f in self.found))


@contextmanager
def of_setting(name: str, value: object) -> Iterator[None]:
    """A context that adds the name and value of a setting to ``FileNotFoundError`` and ``ValueError``."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is {value!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}: {error}") from error


class Settings:
    """The base class of settings dataclasses."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "allow_inf_nan": False,
        "revalidate_instances": "always",
        "arbitrary_types_allowed": True,
    }

    def collect_faults(self, faults: Faults) -> None:
        """Records faults that depend on several fields. Types of fields and nested sections are checked separately."""

    def check_available(self) -> None:
        """Checks that the files, folders, packages and ports that the settings and their sections name are available.

        The check imports no large package, so that faults are reported at once. The code that uses them checks again
        later, with the same functions.

        Raises:
            OSError, ValueError, ImportError: as raised by the functions that would use what is missing.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if isinstance(section := getattr(self, field.name), Settings):
                section.check_available()

    def validated(self) -> Self:
        """Returns this object. Raises a ``ValueError`` that lists all faults, including those of its sections."""
        faults = Faults()
        collect_faults(self, faults)
        faults.raise_if_any()
        return self


class FieldFault(NamedTuple):
    """A value that does not match the type of its field, or is outside the range of this type."""

    path: tuple[str, ...]
    value: Any
    allowed: str
    is_of_type: bool
    """Whether the value matches the type and is only out of range."""


def collect_faults(settings: Any, faults: Faults) -> None:
    """Records all faults of a settings dataclass and of its sections."""
    _, wrong = checked(settings)
    for fault in wrong:
        *sections, field = fault.path
        functools.reduce(Faults.with_prefix, sections, faults).require_type(field, fault.value, fault.allowed)
    collect_relations(settings, faults, [fault.path for fault in wrong if not fault.is_of_type])


def collect_relations(settings: Any, faults: Faults, unusable: Iterable[tuple[str, ...]] = ()) -> None:
    """Records the faults that ``collect_faults`` of each section finds, except for sections with an unusable value."""
    unusable = list(unusable)
    if not unusable and hasattr(settings, "collect_faults"):
        settings.collect_faults(faults)
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(section := getattr(settings, field.name)):
            inside = [path[1:] for path in unusable if path[0] == field.name]
            collect_relations(section, faults.with_prefix(field.name), inside)


def checked(settings: SettingsType) -> tuple[SettingsType, list[FieldFault]]:
    """Checks the types and ranges of all fields.

    Returns:
        The settings, with integers converted to float where the type is float, and no faults; or the unchanged
        settings, and the faults of their fields.
    """
    from pydantic import ValidationError

    settings_class: Any = type(settings)
    try:
        return _validator(settings_class).validate_python(settings), []
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    kinds: dict[tuple[str, ...], set[str]] = {}
    annotations: dict[tuple[str, ...], Any] = {}
    for each in errors:
        path, annotation = _field(settings_class, each["loc"])
        kinds.setdefault(path, set()).add(each["type"])
        annotations[path] = annotation
    found = []
    for path, types_of_errors in kinds.items():
        value, annotation, is_of_type = functools.reduce(getattr, path, settings), annotations[path], True
        if "finite_number" in types_of_errors:
            allowed = "a finite number" if isinstance(value, float) else "of finite numbers only"
        elif types_of_errors & _RANGE_ERRORS:
            allowed = range_in_words(annotation)
        else:
            allowed, is_of_type = type_in_words(annotation), False
        found.append(FieldFault(path, value, allowed, is_of_type))
    return settings, found


_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "predicate_failed"}


@functools.cache
def _validator(settings_class: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(settings_class)


@functools.cache
def field_types(settings_class: type) -> dict[str, Any]:
    """Returns the types of a class's fields, including their ``Annotated`` metadata."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_class)}


@functools.cache
def field_helps(settings_class: type) -> dict[str, str]:
    """Returns the docstrings under the fields of a class, including inherited ones."""
    found = {}
    for base in reversed(settings_class.__mro__[:-1]):
        for field, below in itertools.pairwise(_class_bodies(base.__module__).get(base.__name__, [])):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """Returns the statements of each class in a module, which is parsed only once."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {each.name: each.body for each in ast.walk(tree) if isinstance(each, ast.ClassDef)}


def _field(settings_class: type, location: tuple[int | str, ...]) -> tuple[tuple[str, ...], Any]:
    """Returns the path of the field at a location, and the field's type.

    The path contains the names of the sections and the field, but no positions within the field's value.
    """
    of: Any = settings_class
    path: list[str] = []
    for name in map(str, location):
        path.append(name)
        of = field_types(of)[name]
        if not dataclasses.is_dataclass(of):
            break
    return tuple(path), of


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself if it is not a union."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def plain_type(annotation: Any) -> Any:
    """Returns a type without its ``Annotated`` metadata."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def type_in_words(annotation: Any) -> str:
    """Describes the values that a type allows, except for their range."""
    annotation = plain_type(annotation)
    origin, arguments = typing.get_origin(annotation), tuple(map(plain_type, typing.get_args(annotation)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(type_in_words, arguments))
    if origin is list:
        return "a list of texts: a flag for each, or [a, b] in a file" if arguments == (str,) else "a list, as [a, b]"
    if origin is dict:
        of, to = map(type_in_words, arguments)
        return f"a mapping, as {{name: value}}, from {of} to {to}"
    if dataclasses.is_dataclass(annotation):
        return f"a {annotation.__name__}"  # type: ignore[union-attr]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(annotation, str(annotation))


def range_in_words(annotation: Any) -> str:
    """Describes the range of a type, for example "at least 1, or null"."""
    if len(members := alternatives(annotation)) > 1:
        return ", or ".join(map(range_in_words, members))
    if typing.get_origin(annotation) is list:
        return f"a list of {range_in_words(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is not Annotated:
        return type_in_words(annotation)
    kind, *limits = typing.get_args(annotation)
    words = [each.words for each in limits if isinstance(each, Allowed)]
    bounds = {
        kind: getattr(each, kind.__name__.lower()) for kind in (Ge, Gt, Le, Lt) for each in limits if type(each) is kind
    }
    if Ge in bounds and Le in bounds:
        words.append(f"{bounds[Ge]} to {bounds[Le]}")
    else:
        names = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
        words += [f"{names[kind]} {bound}" for kind, bound in bounds.items()]
    unit = next((f" {each.name}" for each in limits if isinstance(each, Unit)), "")
    return f"{' and '.join(words)}{unit}" if words else type_in_words(kind)


def holds_paths(annotation: Any) -> bool:
    """Whether a type is ``PathText`` or contains it."""
    if typing.get_origin(annotation) is Annotated:
        return "path" in annotation.__metadata__
    return any(map(holds_paths, typing.get_args(annotation)))


def expanded_path(text: str) -> str:
    """Replaces ``~`` and ``$VARIABLE`` or ``${VARIABLE}`` in a path, or in each of several paths separated by commas.

    A path that exists as it is written is not changed, and neither is a ``$`` without the name of a variable after it.

    Raises:
        ValueError: a variable is not set.
    """
    if os.path.lexists(text):
        return text
    if "," in text:
        return ",".join(map(expanded_path, text.split(",")))
    path = text.lstrip()  # "a, ~/b"
    try:
        expanded = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set") from None
    return text[: -len(path) or None] + os.path.expanduser(expanded)
