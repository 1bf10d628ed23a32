import io
import json
import math
import re
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bdh.extras import install_command
from bdh.monitor import Monitor, MonitorConfig, chosen_backends, cut_back, read_metrics
from bdh.monitor import monitor as monitor_module
from tests.clock import time_with


def quiet() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True)


def opened(run_dir, *, start_step=0, console=None, **config) -> Monitor:
    if (
        start_step
    ):  # TensorBoard orders files by the second in which they were opened, and then by a number without zeros
        time.sleep(1.01 - time.time() % 1)
    return Monitor(run_dir, MonitorConfig(**config), total_steps=100, start_step=start_step, console=console or quiet())


def test_metrics_come_back_from_both_files(tmp_path):
    with opened(tmp_path) as monitor:
        monitor.log(10, {"train/loss": 2.5, "train/tokens": 640})
        monitor.log(20, {"train/loss": 2.25, "val/loss": 2.0})
        monitor.log_text(20, "samples/0", "The snake\nis long")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 2.5), (20, 2.25)]
    assert rows[1]["val/loss"] == 2.0

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 2.5), (20, 2.25)]
    assert "samples/0/text_summary" in events.Tags()["tensors"]


def test_a_run_that_goes_on_drops_what_it_will_do_again(tmp_path):
    with opened(tmp_path) as monitor:
        for step in (10, 20, 30):
            monitor.log(step, {"train/loss": float(step)})
    with opened(tmp_path, start_step=20) as monitor:
        monitor.log(30, {"train/loss": -1.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 10.0), (20, 20.0), (30, -1.0)]


def test_texts_of_any_characters_are_cut_back_by_their_lines(tmp_path):
    """Line separators of Unicode are no ends of lines in JSON lines."""
    path = tmp_path / "samples.jsonl"
    texts = ["a\u2028b", "c\x85d", "ü\n"]
    lines = [json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n" for step, text in enumerate(texts)]
    path.write_text("".join(lines) + '{"step": 1, "te', encoding="utf-8")
    cut_back(path, 1)
    assert path.read_text(encoding="utf-8") == lines[0] + lines[1]
    cut_back(tmp_path / "nowhere.jsonl", 1)
    assert not (tmp_path / "nowhere.jsonl").exists()


def test_an_empty_file_has_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 3.0}\n{"step": 2, "trai')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with opened(tmp_path, start_step=1, backends=["console", "jsonl"]) as monitor:
        monitor.log(2, {"train/loss": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_what_is_not_finite_is_null_in_valid_json(tmp_path):
    with opened(tmp_path, backends=["console", "jsonl"]) as monitor:
        monitor.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        read_metrics(path)


def test_without_a_terminal_lines_are_printed(tmp_path):
    console = quiet()
    with opened(tmp_path, console=console, backends=["console", "jsonl"], log_every_steps=2) as monitor:
        for step in range(1, 101):
            monitor.progress(step, loss=1.5, tokens_per_second=2000.0)
    assert console.file.getvalue().count("step ") == 5  # every tenth logged step, as the setting's help says
    assert "step 100/100: loss 1.5000, 2,000 tokens/s" in console.file.getvalue()


def test_without_a_terminal_slow_steps_are_shown_too(tmp_path, monkeypatch):
    """A large model on a CPU said nothing for a hundred steps, which were hours."""
    now = 0.0
    monkeypatch.setattr(monitor_module, "time", time_with(monotonic=lambda: now))
    console = quiet()
    with opened(tmp_path, console=console, backends=["console"], log_every_steps=2) as monitor:
        for step in range(1, 8):
            now += 90 if step < 3 else 25
            monitor.progress(step, loss=1.5, tokens_per_second=2000.0)
    shown = console.file.getvalue()
    assert [step for step in range(1, 8) if f"step {step}/100: loss 1.5000" in shown] == [1, 2, 5]
    assert "step 1/100: loss 1.5000, 2,000 tokens/s, 02:28:30 left" in shown


def test_the_bar_shows_loss_speed_and_time_left(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with opened(tmp_path, console=console, backends=["console", "jsonl"]) as monitor:
        monitor.progress(50, loss=1.5, tokens_per_second=2000.0)
        monitor.message("a [line] above the bar")
    shown = console.file.getvalue()
    assert "loss nan" not in shown  # before the first step
    assert "loss 1.5000" in shown
    assert "2,000 tokens/s" in shown
    assert "a [line] above the bar" in shown


def test_a_writer_that_the_disk_refuses_is_left_out_and_named_at_the_end(tmp_path):
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        from pathlib import Path
        from bdh.monitor import Monitor, MonitorConfig
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, {2**40}))
        with Monitor(Path({str(tmp_path)!r}), MonitorConfig(backends=["console", "jsonl"]), total_steps=9) as monitor:
            for step in range(200):
                monitor.log(step, {{"train/loss": 1.0}})
            print("went on")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "went on" in done.stdout
    assert done.stderr.count("metrics.jsonl cannot be written") == 1
    assert "metrics.jsonl is incomplete" in done.stderr


def test_only_the_backends_that_are_named_write(tmp_path):
    with opened(tmp_path, backends=["jsonl"]) as monitor:
        monitor.log(1, {"a": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_auto_adds_to_what_is_named_and_takes_tensorboard_where_it_is(monkeypatch):
    assert chosen_backends(MonitorConfig()) == ["console", "jsonl", "tensorboard"]
    assert chosen_backends(MonitorConfig(backends=["wandb, auto"])) == ["console", "jsonl", "tensorboard", "wandb"]
    monkeypatch.setattr("bdh.monitor.config.importlib.util.find_spec", lambda name: None)
    assert chosen_backends(MonitorConfig()) == ["console", "jsonl"]


def test_a_missing_tensorboard_is_announced_with_auto(tmp_path, monkeypatch):
    monkeypatch.setattr("bdh.monitor.config.importlib.util.find_spec", lambda name: None)
    console = quiet()
    opened(tmp_path, console=console).close()
    assert "No TensorBoard files" in console.file.getvalue()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_backend_whose_package_is_missing_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr("bdh.monitor.config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"names {name}, but .* missing: {re.escape(install_command('monitor'))}"):
        opened(tmp_path, backends=["auto", name])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"monitor\.backends is 'mlflow': must be one of auto, console, jsonl"):
        opened(tmp_path, backends=["auto", "mlflow"])


def test_histograms_reach_tensorboard_thinned_out(tmp_path):
    with opened(tmp_path) as monitor:
        monitor.log_histogram(3, "weights/a", torch.linspace(-1, 1, 1_000_000, dtype=torch.bfloat16))
        monitor.log_histogram(3, "weights/b", torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True))
        monitor.log_histogram(3, "weights/none", torch.empty(0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["histograms"]) == {"weights/a", "weights/b"}
    large, small = (events.Histograms(f"weights/{name}")[0] for name in "ab")
    assert large.step == 3
    assert 60_000 < large.histogram_value.num <= 65_537
    assert (small.histogram_value.num, small.histogram_value.min, small.histogram_value.max) == (4, 1, 4)
