"""What a whole `bdh train` leaves in the loggers."""

import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bdh.cli.main import main
from bdh.train.logged import EVALUATIONS, STEPS

from ..monitor.readers import trackio_rows, wandb_runs

# Of no mix and no moving average, which these runs do not have.
PROMISED = [each for each in (*STEPS, *EVALUATIONS) if not each.name.startswith(("val/SOURCE", "val_ema"))]


def missing_names(logged: set[str]) -> list[str]:
    """Those that the reference promises, and a run has not logged."""
    return [each.name for each in PROMISED if not any(map(each.stands_for, logged))]


def test_the_event_files_hold_every_name_that_the_reference_promises(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, **{"monitor.backends": "tensorboard"}) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = events.Tags()
    assert missing_names(set(tags["scalars"])) == []
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("val/loss")] == [4, 8, 12]
    weights = {f"weights/{name}.weight" for name in ("embed", "encoder", "encoder_v.0", "encoder_v.1", "decoder")}
    activations = {f"val/{kind}/{index}" for kind in ("x", "y", "xy") for index in (0, 1)}
    assert weights | activations <= set(tags["histograms"])
    assert {"samples/0/text_summary", "settings/text_summary"} <= set(tags["tensors"])
    (settings,) = events.Tensors("settings/text_summary")
    assert b"learning_rate: 0.01" in settings.tensor_proto.string_val[0]


@pytest.mark.slow
def test_all_backends_at_once_go_on_with_a_resumed_run(train, tmp_path, trackio_folder):
    run = tmp_path / "run"
    choice = {
        "monitor.backends": "auto,tensorboard,wandb,trackio",
        "monitor.wandb_mode": "offline",
        "monitor.project": "whole",
    }
    assert train(run, **choice, **{"train.stop_at_step": 7}) == 0
    assert main(["train", "--run_dir", str(run), "--resume", "--resume_step", "6"]) == 0
    starts = wandb_runs(run)
    assert len(starts) == 2
    assert len({start["id"] for start in starts}) == 1
    rows = [(step, values) for _, name, step, values in trackio_rows(trackio_folder, "whole")]
    for history in ([row for start in starts for row in start["history"]], rows):
        assert [step for step, _ in history] == list(range(1, 13))
        by_step = dict(history)
        assert missing_names({name for values in by_step.values() for name in values}) == []
        assert [step for step, values in history if "val/loss" in values] == [4, 8, 12]
        assert "samples/0" in {name.removesuffix("/_type") for name in by_step[12]}
    assert starts[1]["config"]["train"]["learning_rate"] == 0.01
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


@pytest.mark.parametrize(
    ("backends", "message"),
    [("auto,mlflow", "monitor.backends is 'mlflow': must be one of auto, "), ("wandb", "names wandb, but the package")],
)
def test_a_backend_that_is_not_there_is_refused_before_the_folder_is_made(
    train, tmp_path, monkeypatch, capsys, backends, message
):
    monkeypatch.setattr("bdh.monitor.config.is_missing", lambda name: name == "wandb")
    assert train(tmp_path / "run", **{"monitor.backends": backends}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_the_backends_were_a_setting_goes_on(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, **{"train.stop_at_step": 5}) == 0
    path = run / "config.yaml"
    path.write_text(re.sub(r"  backends:\n(  - .*\n)+", "  tensorboard: 'off'\n", path.read_text()))
    assert "tensorboard: 'off'" in path.read_text()
    assert main(["train", "--run_dir", str(run), "--resume"]) == 0
    assert not (run / "tensorboard").exists()
