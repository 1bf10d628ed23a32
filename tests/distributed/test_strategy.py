import pytest

from bdh.distributed.config import DistributedConfig
from bdh.distributed.world import World, choose_strategy
from bdh.validation import Faults, collect_faults


def chosen(strategy: str, size: int, device: str = "cpu") -> str:
    return choose_strategy(DistributedConfig(strategy=strategy), World(size=size, device_type=device))


def test_auto_is_ddp_for_several_and_nothing_for_one():
    assert chosen("auto", 1) == "none"
    assert chosen("auto", 2) == "ddp"
    assert chosen("fsdp", 2) == "fsdp"
    assert chosen("fsdp", 1, "cuda") == "fsdp"


@pytest.mark.parametrize(
    ("strategy", "size", "message"),
    [
        ("none", 2, "2 processes were started, each of which would train its own model: set ddp or fsdp"),
        ("ddp", 1, r"'ddp' with one process: set none, or start more with torchrun"),
        ("fsdp", 1, "'fsdp' with one process and no accelerator.*set none, or start more processes with torchrun"),
    ],
)
def test_what_does_not_go_with_the_number_of_processes_is_refused(strategy, size, message):
    with pytest.raises(ValueError, match=message):
        chosen(strategy, size)


def test_only_fsdp_casts():
    faults = Faults()
    collect_faults(DistributedConfig(strategy="ddp", reduce_dtype="bfloat16", timeout_minutes=0), faults)
    told = str(faults.found)
    assert "reduce_dtype" in told
    assert "timeout_minutes" in told
