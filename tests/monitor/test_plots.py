import json

import pytest

from bdh.monitor.plots import plot_loss


def a_run(folder, rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_picture_is_drawn(tmp_path):
    rows = [{"step": s, "train/loss": 3 / s} for s in (1, 2, 3)] + [{"step": 3, "val/loss": 1.1}]
    plot_loss([a_run(tmp_path / "a", rows), a_run(tmp_path / "b", rows[:3])], tmp_path / "out" / "loss.png")
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        plot_loss([tmp_path], tmp_path / "loss.png")


def test_a_run_without_a_step_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no train/loss"):
        plot_loss([a_run(tmp_path / "a", [])], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
