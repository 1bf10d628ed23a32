"""A logger that fails does not end the training, is announced once, and named at the end."""

import io
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
from rich.console import Console

from bdh.monitor import Backend, Monitor, MonitorConfig, read_metrics


def opened(run_dir, *backends, **config) -> tuple[Monitor, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, soft_wrap=True)
    return Monitor(run_dir, MonitorConfig(backends=list(backends), **config), total_steps=9, console=console), shown


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if os.name == "nt" or mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no small disk could be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
@pytest.mark.parametrize(
    ("name", "title"), [("jsonl", "metrics.jsonl"), ("tensorboard", "TensorBoard"), ("wandb", "W&B")]
)
def test_a_full_disk(small_disk, name, title):
    monitor, shown = opened(small_disk, "console", name, wandb_mode="offline")
    with monitor:
        for step in range(1, 4000):
            monitor.log(step, {"train/loss": 1.0, "train/learning_rate": 2.0})
        monitor.message("went on")
    text = shown.getvalue()
    assert "went on" in text
    assert text.count(f"{title} cannot be written") == 1
    assert "No space left on device" in text
    assert text.count(f"{title} is incomplete: it lacks what came at step ") == 1
    if name == "jsonl":
        assert read_metrics(small_disk / "metrics.jsonl")[0]["train/loss"] == 1.0


def test_a_full_disk_under_trackio(small_disk, tmp_path):
    """Trackio writes in a thread, which swallows what the disk says: the end notices what is not there."""
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from bdh.monitor import Monitor, MonitorConfig
        with Monitor(Path({str(tmp_path)!r}), MonitorConfig(backends=["console", "trackio"]), total_steps=9) as monitor:
            for step in range(1, 2000):
                monitor.log(step, {{f"value/{{i}}": float(i) for i in range(20)}})
            monitor.message("went on")
        """
    )
    environment = {**os.environ, "TRACKIO_DIR": str(small_disk)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "went on" in done.stderr
    assert "Trackio is incomplete" in done.stderr


@pytest.mark.parametrize(
    ("name", "title", "place"),
    [
        ("jsonl", "metrics.jsonl", "metrics.jsonl/"),
        ("tensorboard", "TensorBoard", "tensorboard"),
        ("wandb", "W&B", "wandb"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path, name, title, place):
    """Something else is where the logger wants to write: root, too, is refused then."""
    if place.endswith("/"):
        (tmp_path / place).mkdir()
    else:
        (tmp_path / place).write_text("")
    monitor, shown = opened(tmp_path, "console", name, wandb_mode="offline")
    with monitor:
        monitor.log(1, {"train/loss": 1.0})
        monitor.message("went on")
    text = shown.getvalue()
    assert "went on" in text
    assert text.count(f"{title} cannot be opened") == 1
    assert f"{title} is incomplete" in text


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "0123456789012345678901234567890123456789"], ids=["no key", "a key"])
def test_wandb_without_a_server_goes_into_files_within_the_timeout(tmp_path, monkeypatch, key):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    start = time.monotonic()
    monitor, shown = opened(tmp_path, "wandb", wandb_timeout_seconds=2.0)
    with monitor:
        monitor.log(1, {"train/loss": 1.0})
    assert time.monotonic() - start < 30  # 2 for the server, the rest for starting W&B's service twice
    assert shown.getvalue().count("W&B cannot be used online") == 1
    assert f"`wandb sync {tmp_path}/wandb/offline-run-*` sends it" in shown.getvalue().splitlines()[-1]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_backend_that_raises_is_left_out_and_the_others_go_on(tmp_path, monkeypatch):
    class Breaks(Backend):
        title = "the broken one"
        closed = 0

        def log(self, step, values):
            if step == 3:
                raise RuntimeError("no more")

        def close(self):
            Breaks.closed += 1

    monitor, shown = opened(tmp_path, "jsonl")
    monitor.add(Breaks())
    with monitor:
        for step in range(1, 6):
            monitor.log(step, {"train/loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert Breaks.closed == 1
    assert shown.getvalue().splitlines() == [
        "warning: the broken one cannot be written (no more); the training continues without it",
        "warning: the broken one is incomplete: it lacks what came at step 3 or later (no more)",
    ]
