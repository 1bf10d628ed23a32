"""The limits of containers, read from made-up control groups."""

import pytest
import torch

from bdh.train import speed
from bdh.train.containers import free_in_containers

FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


@pytest.fixture
def groups(tmp_path):
    """Makes groups: the path of each, its limit, use and cached files; and the file of a process in them."""

    def make(version: int, membership: str, **limits: tuple) -> list[int]:
        for name, (limit, used, cached) in limits.items():
            folder = tmp_path / name.replace("__", "/")
            folder.mkdir(parents=True, exist_ok=True)
            limit_file, used_file, cached_name = FILES[version]
            (folder / limit_file).write_text(f"{limit}\n")
            (folder / used_file).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 1\n{cached_name} {cached}\n")
        path = tmp_path / "membership"
        path.write_text(membership)
        return free_in_containers(tmp_path / "fs", path)

    return make


def test_each_group_around_the_process_limits_it(groups):
    found = groups(2, "0::/a/b/c\n", fs__a=(1000, 400, 0), fs__a__b=("max", 300, 0), fs__a__b__c=(700, 300, 50))
    assert sorted(found) == [450, 600]


def test_version_1_is_read_too(groups):
    membership = "9:cpu,cpuacct:/x\n4:memory:/job/task\n0::/\n"
    found = groups(1, membership, fs__memory__job=(5000, 1000, 0), fs__memory__job__task=(9000, 2000, 500))
    assert sorted(found) == [4000, 7500]


def test_a_path_of_the_host_leaves_the_root_that_is_mounted(groups):
    assert groups(2, "0::/docker/1234\n", fs=(800, 200, 0)) == [600]
    assert groups(2, "0::/../../other\n", fs=(800, 300, 0)) == [500]


def test_without_groups_nothing_limits(groups, tmp_path):
    assert groups(2, "") == []
    assert free_in_containers(tmp_path / "none", tmp_path / "none") == []


def test_processes_of_one_machine_share_what_is_free(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(speed, "free_in_containers", lambda: [8 * 10**6])
    monkeypatch.setattr(speed, "used_memory_bytes", lambda device: 5 * 10**6)
    assert speed.available_memory_bytes(cpu) == 13 * 10**6
    assert speed.available_memory_bytes(cpu, processes=4) == 7 * 10**6
