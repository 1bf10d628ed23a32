"""Settings: dataclasses whose fields pydantic checks, and all faults of which are reported at once.

A field's type says what it takes, ranges included: ``Annotated[int, Ge(1)]``, or one of the names below. What depends on
several fields is said in :meth:`Settings.collect_faults`. The classes are plain dataclasses, which check nothing when they
are made: so all that is wrong with nested settings is found together, by ``validated()``, and pydantic is imported only then.
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
"""The type of a setting that is, or may be, a path: ``~`` and ``$VARIABLE`` in it are replaced."""
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allowed(Predicate):
    """Limits a type to the values for which a function is true: ``Annotated[str, Allowed(str.strip, "a name")]``."""

    words: str = ""
    """What is right."""


class Unit(NamedTuple):
    """Names the unit of a type's range in messages."""

    name: str


PositiveSeconds = Annotated[float, Gt(0), Unit("seconds")]
DeviceName = Annotated[
    str, Allowed(re.compile(r"auto|cpu|cuda(:\d+)?|mps").fullmatch, "auto, cpu, cuda, cuda:N or mps")
]
"""A device's name; whether the machine has it, PyTorch alone knows."""


class Faults:
    """Faults found so far. Each one names its field, its value and what is allowed.

    ``with_prefix`` gives a view on the same list whose fields are named under a section:

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
        """Records a fault unless ``is_right``, or the field's own type has one: ``allowed`` says what would be right."""
        if not is_right and self._prefix + field not in self._out_of_range:
            self.found.append(f"{self._prefix}{field} is {value!r}: must be {allowed}")

    def require_one_of(self, field: str, value: Any, allowed: Iterable[Any]) -> None:
        options = list(allowed)
        self.require(value in options, field, value, "one of " + ", ".join(map(str, options)))

    def require_type(self, field: str, value: Any, allowed: str) -> None:
        """Records that a value is not of its field's type; none of the field follows then."""
        self.require(False, field, value, allowed)
        self._out_of_range.add(self._prefix + field)

    def add(self, message: str) -> None:
        self.found.append(message)

    def raise_if_any(self) -> None:
        """Raises one ``ValueError`` that lists all faults, one a line."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        raise ValueError(f"{len(self.found)} settings are wrong:\n" + "\n".join(f"  {f}" for f in self.found))


@contextmanager
def of_setting(name: str, value: object) -> Iterator[None]:
    """Within it, what is wrong with the place that a setting names is an error that names the setting too."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is {value!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}: {error}") from error


class Settings:
    """Base of the dataclasses of settings."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "allow_inf_nan": False,
        "revalidate_instances": "always",
        "arbitrary_types_allowed": True,
    }

    def collect_faults(self, faults: Faults) -> None:
        """Records what is wrong between fields; their types, and the sections inside, are checked apart from that."""

    def check_available(self) -> None:
        """Checks that what the settings name is there: files, folders, packages, a port; also those of all sections inside.

        It needs no large package, so that faults are reported at once. What uses them later checks again, by the same functions.

        Raises:
            OSError, ValueError, ImportError: as the functions that would use what is missing.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            if isinstance(section := getattr(self, field.name), Settings):
                section.check_available()

    def validated(self) -> Self:
        """This object, or a ``ValueError`` that lists all faults, those of its sections among them."""
        faults = Faults()
        collect_faults(self, faults)
        faults.raise_if_any()
        return self


class FieldFault(NamedTuple):
    """A value that is not of its field's type, or out of the range that the type has."""

    path: tuple[str, ...]
    value: Any
    allowed: str
    is_of_type: bool
    """Whether it is only out of range."""


def collect_faults(settings: Any, faults: Faults) -> None:
    """Records every fault of a dataclass of settings and of its sections."""
    _, wrong = checked(settings)
    for fault in wrong:
        *sections, field = fault.path
        functools.reduce(Faults.with_prefix, sections, faults).require_type(field, fault.value, fault.allowed)
    collect_relations(settings, faults, [fault.path for fault in wrong if not fault.is_of_type])


def collect_relations(settings: Any, faults: Faults, unusable: Iterable[tuple[str, ...]] = ()) -> None:
    """Records what the sections' own ``collect_faults`` find, but for those that hold an unusable value."""
    unusable = list(unusable)
    if not unusable and hasattr(settings, "collect_faults"):
        settings.collect_faults(faults)
    for field in dataclasses.fields(settings):
        if dataclasses.is_dataclass(section := getattr(settings, field.name)):
            inside = [path[1:] for path in unusable if path[0] == field.name]
            collect_relations(section, faults.with_prefix(field.name), inside)


def checked(settings: SettingsType) -> tuple[SettingsType, list[FieldFault]]:
    """The settings with whole numbers as floats where their types say so; or as they are, and what is wrong with fields."""
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
    """The types of a class's fields, with what they are annotated with."""
    hints = typing.get_type_hints(settings_class, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings_class)}


@functools.cache
def field_helps(settings_class: type) -> dict[str, str]:
    """The docstrings under the fields, those of the classes above included."""
    found = {}
    for base in reversed(settings_class.__mro__[:-1]):
        for field, below in itertools.pairwise(_class_bodies(base.__module__).get(base.__name__, [])):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    """The statements of each class of a module, which is parsed once for all of them."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {each.name: each.body for each in ast.walk(tree) if isinstance(each, ast.ClassDef)}


def _field(settings_class: type, location: tuple[int | str, ...]) -> tuple[tuple[str, ...], Any]:
    """The names of sections and field, without what follows inside of the value; and the field's type."""
    of: Any = settings_class
    path: list[str] = []
    for name in map(str, location):
        path.append(name)
        of = field_types(of)[name]
        if not dataclasses.is_dataclass(of):
            break
    return tuple(path), of


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; else the type alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def plain_type(annotation: Any) -> Any:
    """A type without what it is annotated with."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def type_in_words(annotation: Any) -> str:
    """What a type allows, ranges apart."""
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
    """What a type's range allows: "at least 1, or null"."""
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
    try:
        expanded = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], path)
    except KeyError as error:
        raise ValueError(f"the environment variable {error.args[0]} is not set") from None
    return text[: -len(path) or None] + os.path.expanduser(expanded)
