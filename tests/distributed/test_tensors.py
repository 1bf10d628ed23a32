import pickle

import pytest
import torch

from bdh.distributed.tensors import BackgroundWriter, read_all, read_tensors, stored_shapes, write_tensors
from bdh.distributed.world import World

TENSORS = {
    "weights.a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "weights.b": torch.ones(4, dtype=torch.float64),
    "optimizer.a.step": torch.tensor(3.0),
    "optimizer.a.momentum": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "counts": torch.arange(3),
}


def test_tensors_come_back_by_group_or_into_others(tmp_path):
    write_tensors(tmp_path / "t", TENSORS, World())
    assert stored_shapes(tmp_path / "t") == {name: (t.shape, t.dtype) for name, t in TENSORS.items()}
    weights = read_all(tmp_path / "t", "weights.")
    assert list(weights) == ["a", "b"]
    assert torch.equal(weights["a"], TENSORS["weights.a"])
    wide = torch.zeros(2, 3, dtype=torch.float64)
    read_tensors(tmp_path / "t", {"weights.a": wide})
    assert torch.equal(wide, TENSORS["weights.a"].double())


def test_what_is_not_there_or_of_another_shape_is_named(tmp_path):
    write_tensors(tmp_path / "t", TENSORS, World())
    with pytest.raises(ValueError, match=r"weights.c is not stored; counts is stored as \(3,\)"):
        read_tensors(tmp_path / "t", {"weights.c": torch.zeros(1), "counts": torch.zeros(4)})


def test_a_copy_is_written_in_the_background(tmp_path):
    writer = BackgroundWriter(World())
    tensor = torch.ones(1000, 1000)
    wait = writer.start(tmp_path / "t", {"w": tensor})
    writer.wait_until_copied()
    tensor.zero_()
    wait()
    writer.close()
    assert torch.equal(read_all(tmp_path / "t", "")["w"], torch.ones(1000, 1000))


class _Bomb:
    def __reduce__(self):
        return print, ("boom",)


def test_metadata_that_would_run_code_are_refused_and_run_none(tmp_path, capsys):
    write_tensors(tmp_path, TENSORS, World())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"builtins\.print, which has no place there"):
        read_all(tmp_path, "")
    assert capsys.readouterr().out == ""
