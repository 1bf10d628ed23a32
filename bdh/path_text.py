"""Settings that are paths: ``~`` and ``$VARIABLE`` in them are replaced, whether a file or a flag has them."""

import os
import re
import typing
from collections.abc import Callable
from typing import Annotated, Any

PathText = Annotated[str, "path"]
"""The type of a setting that is, or may be, a path."""
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def holds_paths(annotation: Any) -> bool:
    """Whether a type, as ``typing.get_type_hints(..., include_extras=True)`` gives it, is ``PathText`` or made of it."""
    if typing.get_origin(annotation) is Annotated:
        return "path" in annotation.__metadata__
    return any(holds_paths(each) for each in typing.get_args(annotation))


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
    return text[: -len(path) or None] + os.path.expanduser(_VARIABLE.sub(_value, path))


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]


def with_expanded_paths(name: str, value: Any, is_path: Callable[[str], bool]) -> Any:
    """The value of a setting with its paths expanded, those in a list, or in the entries of a mix, among them.

    Args:
        name: with its section: data.source.
        is_path: whether the setting of a name is one.

    Raises:
        ValueError: as :func:`expanded_path`.
    """
    if isinstance(value, list):
        return [with_expanded_paths(name, each, is_path) for each in value]
    if isinstance(value, dict):  # the keys of an entry are settings of the same section
        section = name.rpartition(".")[0]
        return {key: with_expanded_paths(f"{section}.{key}", each, is_path) for key, each in value.items()}
    return expanded_path(value) if isinstance(value, str) and is_path(name) else value
