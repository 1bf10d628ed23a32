"""The command that installs an extra, for error messages about missing packages."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from importlib.metadata import Distribution

_CHECKOUT = Path(__file__).parents[1]


def install_command(extra: str) -> str:
    """Returns the command that installs an extra, from the checkout, wheel or repository of this installation.

    For "bdh[serve]" alone, pip would search an index, and bdh is in none.
    """
    from importlib.metadata import PackageNotFoundError, distribution  # takes 10 ms, which --help need not wait for

    try:
        source = _source(distribution("bdh"), extra)
    except PackageNotFoundError:  # imported from a checkout that is not installed
        source = f"{_CHECKOUT}[{extra}]" if (_CHECKOUT / "pyproject.toml").is_file() else f"bdh[{extra}]"
    return f"pip install {shlex.quote(source)}"


def _source(installed: "Distribution", extra: str) -> str:
    """Returns what pip is to install, from its record of the package's origin (PEP 610).

    For a package from an index, pip keeps no record.
    """
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    url = record.get("url", "")
    if "vcs_info" in record:
        return f"bdh[{extra}] @ {record['vcs_info']['vcs']}+{url}"
    if not url.startswith("file:"):
        return f"bdh[{extra}] @ {url}" if url else f"bdh[{extra}]"
    path = Path(unquote(urlsplit(url).path))
    if not path.exists():  # it was moved, so only its name is known
        path = Path(path.name if path.suffix == ".whl" else ".")
    return f"{path}[{extra}]"
