"""The memory that a process can still have, read from made-up control groups and from this machine."""

import mmap
import subprocess
import sys

import psutil
import pytest
import torch

from bdh.memory import Cgroups, available_bytes, available_in_cgroups, peak_bytes, reset_peak, used_bytes

CPU = torch.device("cpu")
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@pytest.fixture
def groups(tmp_path):
    """Makes groups: the path of each, its limit, use and cached files; and the file of a process in them."""

    def make(version: int, membership: str, **limits: tuple) -> Cgroups:
        for name, (limit, used, cached) in limits.items():
            folder = tmp_path / name.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            limit_file, used_file, cached_name = FILES[version]
            (folder / limit_file).write_text(f"{limit}\n")
            (folder / used_file).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\n{cached_name} {cached}\n")
        path = tmp_path / "membership"
        path.write_text(membership)
        return Cgroups(tmp_path / "fs", path)

    return make


def test_each_group_around_the_process_limits_it(groups):
    made = groups(2, "0::/a/b/c\n", fs__a=(1000, 400, 0), fs__a__b=("max", 300, 0), fs__a__b__c=(700, 300, 50))
    assert sorted(available_in_cgroups(made)) == [450, 600]
    assert available_bytes(CPU, cgroups=made) == 450


def test_version_1_is_read_too(groups):
    membership = "9:cpu,cpuacct:/x\n4:memory:/job/task\n0::/\n"
    made = groups(1, membership, fs__memory__job=(5000, 1000, 0), fs__memory__job__task=(9000, 2000, 500))
    assert sorted(available_in_cgroups(made)) == [4000, 7500]


def test_groups_of_version_2_beside_those_of_version_1_lie_in_unified(groups):
    made = groups(2, "4:memory:/x\n0::/job\n", fs__unified__job=(5000, 1000, 0))
    assert available_in_cgroups(made) == [4000]


def test_a_path_of_the_host_leaves_the_root_that_is_mounted(groups):
    assert available_in_cgroups(groups(2, "0::/docker/1234\n", fs=(800, 200, 0))) == [600]
    assert available_in_cgroups(groups(2, "0::/../../other\n", fs=(800, 300, 0))) == [500]


def test_a_group_beyond_its_limit_leaves_nothing(groups):
    assert available_bytes(CPU, cgroups=groups(2, "0::/\n", fs=(800, 900, 0))) == 0


def test_without_groups_the_machine_limits(groups, tmp_path):
    assert available_in_cgroups(groups(2, "")) == []
    nowhere = Cgroups(tmp_path / "none", tmp_path / "none")
    assert available_in_cgroups(nowhere) == []
    assert available_bytes(CPU, cgroups=nowhere) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_processes_of_one_machine_share_what_is_available(groups):
    made = groups(2, "0::/\n", fs=(9000, 1000, 0))
    assert available_bytes(CPU, num_processes=4, cgroups=made) == 2000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_limit_of_addresses_is_this_process_alone():
    code = """
import resource, torch, psutil
from bdh.memory import available_bytes
most = psutil.Process().memory_info().vms + (1 << 28)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(available_bytes(torch.device("cpu"), num_processes=4))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == pytest.approx(1 << 28, rel=0.05)


def test_use_and_peak_follow_what_is_held():
    reset_peak(CPU)
    before = used_bytes(CPU)
    # Not of the allocator, which may have as much left from earlier tests.
    held = torch.frombuffer(mmap.mmap(-1, 40 << 20), dtype=torch.uint8).fill_(1)
    during = used_bytes(CPU)
    assert during - before > held.nbytes * 0.9
    del held
    peak = peak_bytes(CPU)
    assert peak is not None
    assert before + (38 << 20) < peak < during + (40 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_memory_of_a_gpu_goes_and_comes_back():
    device = torch.device("cuda")
    held = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    full, used = available_bytes(device), used_bytes(device)
    del held
    assert available_bytes(device) - full == pytest.approx(1 << 28, rel=0.1)
    assert used - used_bytes(device) == 1 << 28
