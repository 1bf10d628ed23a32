"""W&B and Trackio, for real: W&B offline, Trackio in its local database."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from bdh.monitor import Monitor, MonitorConfig

from .readers import trackio_rows, wandb_runs


def opened(run_dir, name, *, start_step=0, settings=None, **config) -> tuple[Monitor, io.StringIO]:
    run_dir.mkdir(exist_ok=True)
    shown = io.StringIO()
    console = Console(file=shown, soft_wrap=True)
    config = MonitorConfig(backends=[name], **{"wandb_mode": "offline", **config})
    return Monitor(run_dir, config, total_steps=9, start_step=start_step, settings=settings, console=console), shown


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_numbers_texts_histograms_and_the_configuration_arrive(tmp_path, trackio_folder, name):
    settings = {"train": {"learning_rate": 0.5, "sample_prompts": ["a", "b"]}}
    monitor, shown = opened(tmp_path / "run", name, settings=settings, project=f"all-{name}", run_name="one")
    with monitor:
        monitor.log(3, {"train/loss": 2.5, "train/mfu": math.nan})
        monitor.log_text(3, "samples/0", "The <b>\nend")
        monitor.log_histogram(3, "weights/a", torch.linspace(-1, 1, 100))
        monitor.log(3, {"val/loss": 1.25})
        monitor.log(4, {"train/loss": 2.0})
    assert "incomplete" not in shown.getvalue()
    if name == "wandb":
        (run,) = wandb_runs(tmp_path / "run")
        assert (run["project"], run["name"]) == ("all-wandb", "one")
        assert run["config"]["train"] == settings["train"]
        (first, values), (second, later) = run["history"]
        html = next((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/html/**/*.html"))
        assert html.read_text() == "<pre>The &lt;b&gt;\nend</pre>"
        assert sum(values["weights/a/values"]) == 100
    else:
        rows = trackio_rows(trackio_folder, "all-trackio")
        (_, run_name, first, values), (_, _, second, later) = rows
        assert run_name.startswith("one-")
        assert "The <b>" in values["samples/0"]["_value"]
        assert sum(values["weights/a"]["values"]) == 100
        import trackio

        (run,) = trackio.Api().runs("all-trackio")
        assert run.config["train"] == settings["train"]
    assert (first, second) == (3, 4)
    assert (values["train/loss"], values["val/loss"], later["train/loss"]) == (2.5, 1.25, 2.0)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_is_the_same_run_with_each_step_once(tmp_path, trackio_folder, name):
    monitor, shown = opened(tmp_path / "run", name, project=f"on-{name}")
    with monitor:
        for step in (10, 20, 30):
            monitor.log(step, {"train/loss": float(step)})
    assert "already" not in shown.getvalue()
    monitor, shown = opened(tmp_path / "run", name, project=f"on-{name}", start_step=20)
    with monitor:
        for step in (30, 40):
            monitor.log(step, {"train/loss": float(step)})
    assert "has the steps up to 30 already" in shown.getvalue()
    monitor, shown = opened(tmp_path / "run", name, project=f"on-{name}", start_step=40)
    with monitor:
        monitor.log(50, {"train/loss": 50.0})
    assert "already" not in shown.getvalue()
    if name == "wandb":
        runs = wandb_runs(tmp_path / "run")
        ids = {run["id"] for run in runs}
        history = [(step, values["train/loss"]) for run in runs for step, values in run["history"]]
    else:
        rows = trackio_rows(trackio_folder, "on-trackio")
        ids = {run_id for run_id, _, _, _ in rows}
        history = [(step, values["train/loss"]) for _, _, step, values in rows]
    assert len(ids) == 1
    assert history == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0), (50, 50.0)]


def test_two_runs_of_one_name_do_not_mix_in_trackio(tmp_path, trackio_folder):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        monitor, _ = opened(tmp_path / folder / "run", "trackio", project="names")
        with monitor:
            monitor.log(1, {"x": value})
    monitor, _ = opened(tmp_path / "a" / "run", "trackio", project="names", start_step=1)
    with monitor:
        monitor.log(2, {"x": 1.0})
    rows = trackio_rows(trackio_folder, "names")
    assert len({run_id for run_id, *_ in rows}) == 2
    assert [(step, values["x"]) for run_id, _, step, values in rows if run_id == rows[0][0]] == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("damaged", ['{"id": ', "3", "[1]", '{"id": 3}', '{"id": "a", "last_step": "4"}'])
def test_a_damaged_memory_is_named_and_the_training_goes_on(tmp_path, damaged):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb.json").write_text(damaged)
    monitor, shown = opened(tmp_path / "run", "wandb")
    with monitor:
        monitor.log(1, {"x": 1.0})
    assert "W&B cannot be opened" in shown.getvalue()
    assert "wandb.json does not hold the id of the run" in shown.getvalue()
    assert (tmp_path / "run" / "wandb.json").read_text() == damaged


def test_the_memory_holds_steps_that_are_sent_as_a_whole(tmp_path):
    """After a kill between two values of a step, that step is taken again."""
    monitor, _ = opened(tmp_path / "run", "wandb")
    memory = tmp_path / "run" / "wandb.json"
    with monitor:
        monitor.log(1, {"x": 1.0})
        assert json.loads(memory.read_text())["last_step"] == -1
        monitor.log(2, {"x": 1.0})
        assert json.loads(memory.read_text())["last_step"] == 1
    assert json.loads(memory.read_text())["last_step"] == 2
