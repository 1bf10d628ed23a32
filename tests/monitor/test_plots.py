import errno
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bdh.cli.main import main
from bdh.monitor.history import plot_metrics
from bdh.storage import DiskFullError


def a_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ROWS = [{"step": s, "train/loss": 3 / s, "train/mfu": 0.1 * s} for s in (1, 2, 3)] + [{"step": 3, "val/loss": 1.1}]


def has_color(picture, color) -> bool:
    return bool((np.abs(imread(picture)[..., :3] - np.array(color) / 255).max(-1) < 0.02).any())


def test_runs_are_drawn_over_each_other_in_their_own_colours(tmp_path):
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
    one, two = a_run(tmp_path / "a", ROWS), a_run(tmp_path / "b", ROWS)
    plot_metrics([one], tmp_path / "one.png")
    plot_metrics([one, two], tmp_path / "out" / "two.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert has_color(tmp_path / "one.png", blue)
    assert not has_color(tmp_path / "one.png", orange)
    assert has_color(tmp_path / "out" / "two.png", orange)


def test_each_metric_that_is_not_a_loss_has_a_panel(tmp_path):
    run = a_run(tmp_path / "a", ROWS)
    heights = []
    for keys in (["train/loss", "val/loss"], ["train/mfu"], ["train/loss", "train/mfu"]):
        plot_metrics([run], tmp_path / "x.png", keys)
        heights.append(imread(tmp_path / "x.png").shape[0])
    assert heights[0] == heights[1] < heights[2]


def test_the_command_names_its_picture(tmp_path, capsys):
    run = a_run(tmp_path / "a", ROWS)
    assert main(["plot", str(run)]) == 0
    assert (run / "loss.png").exists()
    assert main(["plot", str(run), "--keys", "train/mfu,train/loss"]) == 0
    assert (run / "metrics.png").exists()
    assert main(["plot", str(run), str(a_run(tmp_path / "b", ROWS)), "--output", str(tmp_path / "both")]) == 0
    assert str(tmp_path / "both") in capsys.readouterr().out
    assert (tmp_path / "both").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        plot_metrics([tmp_path], tmp_path / "loss.png")


def test_what_was_not_logged_is_named(tmp_path):
    with pytest.raises(ValueError, match="has not logged a step yet"):
        plot_metrics([a_run(tmp_path / "a", [])], tmp_path / "loss.png")
    run = a_run(tmp_path / "b", ROWS)
    with pytest.raises(ValueError, match="has no val/x: it has train/loss, train/mfu, val/loss"):
        plot_metrics([run], tmp_path / "loss.png", ["val/x"])
    with pytest.raises(ValueError, match="no run has logged val/x: logged are train/loss"):
        plot_metrics([run], tmp_path / "loss.png", ["train/loss", "val/x"])
    assert not (tmp_path / "loss.png").exists()


def test_a_full_disk_leaves_the_picture_before(tmp_path, monkeypatch):
    """It was written over in place."""
    run = a_run(tmp_path / "a", ROWS)
    picture = tmp_path / "p.png"
    picture.write_bytes(b"before")

    def savefig(figure, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(DiskFullError, match=r"the disk is full, .*p\.png could not be written"):
        plot_metrics([run], picture)
    assert picture.read_bytes() == b"before"
