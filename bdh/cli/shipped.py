"""The configurations that come with the package, each under the name of its file."""

from pathlib import Path

import bdh
from bdh.validation import expanded_path
from bdh.words import nearest


def shipped_configs() -> dict[str, Path]:
    """Their files by name: in an installed package in a folder of its own, in a checkout beside it."""
    package = Path(bdh.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((each for each in folders if each.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_file(given: str) -> Path:
    """The file that ``--config`` means: a path, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(expanded_path(given))
    if path.is_file():
        return path
    shipped = shipped_configs()
    if given in shipped:
        return shipped[given]
    near = nearest(path.stem, shipped)
    hint = f"did you mean {near}, which comes with bdh?" if near else f"bdh comes with {', '.join(shipped)}"
    raise FileNotFoundError(f"there is no configuration file {path}; {hint}")
