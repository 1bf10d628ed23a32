"""How much memory there is: of a GPU, of the machine, and of the containers (cgroups) around this process."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Cgroups(NamedTuple):
    """Where Linux shows the control groups, by which containers are limited, and what names this process's groups."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")


_THIS_PROCESS = Cgroups()
# Of each version: the files with limit and use, and the entry of memory.stat that counts cached files nobody needs now.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes(device: torch.device, num_processes: int = 1, cgroups: Cgroups = _THIS_PROCESS) -> int:
    """Bytes that this process can still allocate on a device.

    On a GPU that is what PyTorch can get of it; else the least of what the machine, each container around the process and
    ``ulimit -v`` leave.

    Args:
        num_processes: on this machine, this one among them, that share what machine and containers leave.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    shared = [psutil.virtual_memory().available, *available_in_cgroups(cgroups)]
    if device.type == "mps":
        shared.append(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    own = [max(0, min(shared)) // num_processes]
    with suppress(AttributeError, ImportError):  # psutil has limits of processes on Linux only
        import resource

        most = psutil.Process().rlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:  # of addresses, of which a process has more than it uses
            own.append(max(0, most - psutil.Process().memory_info().vms))
    return min(own)


def available_in_cgroups(cgroups: Cgroups = _THIS_PROCESS) -> list[int]:
    """Bytes that each limit leaves: the limits of this process's group, and of those around it. Empty without limits."""
    found = []
    for version, folder in _groups(cgroups):
        limit_file, used_file, cached = _FILES[version]
        with suppress(OSError, ValueError):  # not there, or "max": no limit
            limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
            found.append(limit - max(0, used - _statistic(folder / "memory.stat", cached)))
    return found


def _groups(cgroups: Cgroups) -> Iterator[tuple[int, Path]]:
    """The version and folder of every group that this process is in, from the outermost inwards."""
    paths = {1: "/", 2: "/"}
    with suppress(OSError):
        for line in cgroups.membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                paths[2] = path
            elif "memory" in controllers.split(","):
                paths[1] = path
    # In a container the path may be the host's, of which only the innermost folder is mounted, as the root: so that is
    # always read. Beside groups of version 1, those of version 2 lie in "unified".
    for version, top in [(1, cgroups.root / "memory"), (2, cgroups.root), (2, cgroups.root / "unified")]:
        yield version, top
        parts = [part for part in paths[version].split("/") if part]
        if ".." not in parts:  # outside of what this process may see
            yield from ((version, top.joinpath(*parts[: depth + 1])) for depth in range(len(parts)))


def _statistic(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(line.split() for line in path.read_text().splitlines()).get(name, 0))
    return 0


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int | None:
    """The most of :func:`used_bytes` so far. None where the system does not record it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # not Linux, where ru_maxrss may be that of a parent process, from before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Lets :func:`peak_bytes` count from now on, where the system can do that: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def give_back_free_memory() -> None:
    """What the C library has kept of what was freed counts as used, and would for another step, which need not have it."""
    with suppress(OSError, AttributeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)
