"""What the control groups of Linux, by which containers are limited, leave of the memory."""

from contextlib import suppress
from pathlib import Path

_ROOT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of each version: where its groups lie, limit and use, and in memory.stat the cached files that nobody needs just now.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_in_containers(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> list[int]:
    """Bytes that are free within each limit that holds for this process: its group's, and those of the groups around it.

    Args:
        root: where the groups are mounted.
        membership: the file that names this process's group in each hierarchy.
    """
    found = []
    for version, folder in _folders(root, membership):
        limit_file, used_file, cached = _FILES[version]
        with suppress(OSError, ValueError):  # not there, or "max": no limit
            limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
            found.append(limit - max(0, used - _statistic(folder / "memory.stat", cached)))
    return found


def _folders(root: Path, membership: Path) -> list[tuple[int, Path]]:
    """The version and folder of every group that this process is in, from the outermost inwards."""
    paths = {1: "/", 2: "/"}
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                paths[2] = path
            elif "memory" in controllers.split(","):
                paths[1] = path
    # In a container the path may be the host's, of which only the innermost folder is mounted, as the root: so that is
    # always looked at. Beside groups of version 1, those of version 2 lie in "unified".
    tops = [(1, root / "memory"), (2, root), (2, root / "unified")]
    found = []
    for version, top in tops:
        found.append((version, top))
        parts = [part for part in paths[version].split("/") if part]
        if ".." not in parts:  # outside of what this process may see
            found += [(version, top.joinpath(*parts[: depth + 1])) for depth in range(len(parts))]
    return found


def _statistic(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        facts = dict(line.split() for line in path.read_text().splitlines())
        return int(facts.get(name, 0))
    return 0
