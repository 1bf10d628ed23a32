"""How the packages of an extra are installed beside this installation, for messages that miss one."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from importlib.metadata import Distribution

_CHECKOUT = Path(__file__).parents[1]


def install_command(extra: str) -> str:
    """The command that installs an extra, from the checkout, the wheel or the repository that this installation is of.

    "bdh[serve]" is asked of an index, and bdh is on none.
    """
    from importlib.metadata import PackageNotFoundError, distribution  # 10 ms that --help does not need

    try:
        source = _source(distribution("bdh"), extra)
    except PackageNotFoundError:  # imported from a checkout that is not installed
        source = f"{_CHECKOUT}[{extra}]" if (_CHECKOUT / "pyproject.toml").is_file() else f"bdh[{extra}]"
    return f"pip install {shlex.quote(source)}"


def _source(installed: "Distribution", extra: str) -> str:
    """What pip is to install, as it recorded where it had the package from (PEP 610); of an index it records nothing."""
    record = json.loads(installed.read_text("direct_url.json") or "{}")
    url = record.get("url", "")
    if "vcs_info" in record:
        return f"bdh[{extra}] @ {record['vcs_info']['vcs']}+{url}"
    if not url.startswith("file:"):
        return f"bdh[{extra}] @ {url}" if url else f"bdh[{extra}]"
    path = Path(unquote(urlsplit(url).path))
    if not path.exists():  # it is somewhere else now, and known by its name
        path = Path(path.name if path.suffix == ".whl" else ".")
    return f"{path}[{extra}]"
