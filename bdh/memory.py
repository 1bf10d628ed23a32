"""Available and used memory: of a GPU, of the machine, and within the limits of containers (cgroups)."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class Cgroups(NamedTuple):
    """The paths where Linux shows control groups, which limit containers, and the file with this process's groups."""

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")


_THIS_PROCESS = Cgroups()
# For each version: the files with limit and usage, and the entry of memory.stat that counts reclaimable cached files.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes(device: torch.device, num_processes: int = 1, cgroups: Cgroups = _THIS_PROCESS) -> int:
    """Returns the number of bytes that this process can still allocate on a device.

    On a GPU it is what PyTorch can allocate there, and otherwise the minimum of what the machine, each enclosing
    container and ``ulimit -v`` allow.

    Args:
        device: the device.
        num_processes: the number of processes on this machine, including this one, that share the memory of the machine
            and containers.
        cgroups: the paths of the control groups.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    shared = [psutil.virtual_memory().available, *available_in_cgroups(cgroups)]
    if device.type == "mps":
        shared.append(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    own = [max(0, min(shared)) // num_processes]
    with suppress(AttributeError, ImportError):  # psutil supports process limits only on Linux
        import resource

        most = psutil.Process().rlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:  # limits the address space, of which a process has more than it uses
            own.append(max(0, most - psutil.Process().memory_info().vms))
    return min(own)


def available_in_cgroups(cgroups: Cgroups = _THIS_PROCESS) -> list[int]:
    """Returns the bytes that the limits of this process's group and of enclosing ones leave; empty without limits."""
    found = []
    for version, folder in _groups(cgroups):
        limit_file, used_file, cached = _FILES[version]
        with suppress(OSError, ValueError):  # a missing file, or "max", means no limit
            limit, used = (int((folder / name).read_text()) for name in (limit_file, used_file))
            found.append(limit - max(0, used - _statistic(folder / "memory.stat", cached)))
    return found


def _groups(cgroups: Cgroups) -> Iterator[tuple[int, Path]]:
    """Yields the version and folder of every group that contains this process, from the outermost inwards."""
    paths = {1: "/", 2: "/"}
    with suppress(OSError):
        for line in cgroups.membership.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0" and not controllers:
                paths[2] = path
            elif "memory" in controllers.split(","):
                paths[1] = path
    # In a container the path can be that of the host, of which only the innermost folder is mounted, as the root. The
    # root is therefore always read. Groups of version 2 beside those of version 1 are in "unified".
    for version, top in [(1, cgroups.root / "memory"), (2, cgroups.root), (2, cgroups.root / "unified")]:
        yield version, top
        parts = [part for part in paths[version].split("/") if part]
        if ".." not in parts:  # ".." leads outside of what this process can see
            yield from ((version, top.joinpath(*parts[: depth + 1])) for depth in range(len(parts)))


def _statistic(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        return int(dict(line.split() for line in path.read_text().splitlines()).get(name, 0))
    return 0


def used_bytes(device: torch.device) -> int:
    """Returns the bytes in use: those of tensors on a GPU, and otherwise those of the whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int | None:
    """Returns the maximum of :func:`used_bytes` so far, or None if the system does not record it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # only Linux has this file; its ru_maxrss can be that of a parent process before exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Resets the maximum of :func:`peak_bytes`, if the system can: on a GPU, and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def give_back_free_memory() -> None:
    """Returns freed memory that the C library has kept to the system, so that it does not count as used."""
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
