"""The configurations that come with the package, by the names of their files."""

from pathlib import Path

import bdh
from bdh.validation import expanded_path
from bdh.words import nearest


def shipped_configs() -> dict[str, Path]:
    """Returns the configuration files by name.

    An installed package contains their folder. In a checkout, it is beside the package.
    """
    package = Path(bdh.__file__).parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((each for each in folders if each.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_file(given: str) -> Path:
    """Returns the file for a value of ``--config``: a path, or the name of a configuration of the package.

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
