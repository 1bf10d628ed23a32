"""What a dry run says of memory and time, and what the settings of the layer refuse before the first step."""

import pytest

from bdh.cli.main import main
from bdh.train.forecast import Forecast, Line
from bdh.train.stored import stored_settings

from .conftest import losses


def made(**changes):
    fields = {
        "parts": {"weights": 10**6},
        "memory": Line(1e9, 1e8),
        "available": 3 * 10**9,
        "seconds": Line(0.1, 0.05),
        "rows": 16,
        "passes": 2,
        "update_seconds": 0.3,
        "tokens_per_row": 128,
        "processes": 2,
        "steps": 100,
        "evaluated_rows": 60,
        "measured_rows": [4, 8],
    }
    return Forecast(**{**fields, **changes})


def test_a_line_goes_through_its_points():
    line = Line.through((8, 1.4), (4, 1.0))
    assert (line.fixed, line.each) == pytest.approx((0.6, 0.1))
    assert line.at(16) == pytest.approx(2.2)
    assert line.most(2.2 + 1e-9) == 16
    assert line.most(0.5) == 0
    assert Line.through((4, 2.0), (4, 2.0)).at(8) == pytest.approx(4.0)  # one point: all of it grows
    assert Line.through((4, 2.0), (8, 1.9)).at(100) == pytest.approx(2.0)  # noise: it does not shrink


def test_sums():
    found = made()
    assert found.peak == pytest.approx(2.6e9)
    assert found.fits
    assert not made(available=2 * 10**9).fits
    assert made(memory=None).fits  # nobody knows otherwise
    assert not made(seconds=None).fits  # there was no room for a single block
    assert found.step_seconds == pytest.approx(2 * 0.9 + 0.3)
    assert found.run_seconds == pytest.approx(100 * 2.1 + 60 * 0.05 / 3)
    assert found.tokens_per_second == pytest.approx(16 * 2 * 128 * 2 / 2.1)


def test_a_dry_run_tells_memory_and_time_and_writes_nothing(train, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(folder, "--dry_run", "true") == 0
    shown = capsys.readouterr()
    assert not folder.exists()
    for name in ("weights", "optimizer", "peak memory", "tokens/s", "for 12 steps", "measured"):
        assert name in shown.out
    assert "kernels" in shown.err  # the banner's layer
    # Nor does it change the run that follows.
    assert train(folder) == 0
    assert train(tmp_path / "other") == 0
    assert losses(folder) == losses(tmp_path / "other")


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.carry_state": "true"},
        {"train.dtype": "bfloat16"},
        {"train.gradient_accumulation_steps": 2, "train.ema_decay": 0.9},
        {"train.layer_path": "plain", "train.recompute": "pass"},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_a_dry_run_takes_all_settings(train, tmp_path, capsys, overrides):
    assert train(tmp_path / "run", "--dry_run", "true", **overrides) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_a_dry_run_that_does_not_fit_says_what_would(train, tmp_path, monkeypatch, capsys):
    """The machine's memory is the one thing that is made up here."""
    monkeypatch.setattr("bdh.train.forecast.available_memory_bytes", lambda device: 10**8)
    assert train(tmp_path / "run", "--dry_run", "true", **{"train.recompute": "none"}) == 1
    out = capsys.readouterr().out
    assert "it does not fit" in out
    for help_ in ("--train.recompute pass", "--train.tokens_per_block 16", "--train.block_size 16"):
        assert help_ in out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.memory_budget_gb": 0.000001}, "train.memory_budget_gb is 1,000 bytes"),
        (
            {"train.layer_path": "kernels", "train.dtype": "float64"},
            "train.layer_path is 'kernels', which cannot run here",
        ),
        ({"train.recompute": "none", "train.memory_budget_gb": 0.0002}, "train.recompute is none, which needs"),
        ({"train.rows_per_block": 5}, "train.rows_per_block is 5: must be at most train.batch_size, 4"),
        ({"train.tokens_per_block": 33}, "train.tokens_per_block is 33: must be at most train.block_size, 32"),
        ({"train.memory_budget_gb": -1}, "train.memory_budget_gb is -1.0: must be above 0"),
        ({"train.gradient_checkpointing": "true"}, "train.recompute: pass does what it did"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_layer_cannot_do_is_refused_before_the_first_step(train, tmp_path, capsys, overrides, said):
    assert train(tmp_path / "run", **overrides) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_budget_that_is_refused_names_one_that_is_not(train, tmp_path, capsys):
    assert train(tmp_path / "run", **{"train.memory_budget_gb": 0.000001}) == 2
    least = capsys.readouterr().err.split("at least ")[1].split("(")[1].split(" GB")[0]
    assert train(tmp_path / "run", **{"train.memory_budget_gb": least, "train.max_steps": 2}) == 0


def test_how_the_layer_is_computed_changes_rounding_only(train, tmp_path):
    quiet = {"model.dropout": 0.0}
    assert train(tmp_path / "auto", **quiet) == 0
    for number, overrides in enumerate(
        (
            {"train.layer_path": "plain"},
            {"train.layer_path": "plain", "train.recompute": "pass"},
            {"train.layer_path": "torch", "train.rows_per_block": 3, "train.tokens_per_block": 10},
            {"train.recompute": "none"},
        )
    ):
        folder = tmp_path / str(number)
        assert train(folder, **quiet, **overrides) == 0
        # Sums of float32 in another order, carried through 12 optimizer steps.
        assert losses(folder) == pytest.approx(losses(tmp_path / "auto"), rel=1e-4)


def test_a_run_of_before_goes_on_with_what_its_setting_is_called_now(train, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, **{"train.recompute": "pass", "train.stop_at_step": 5}) == 0
    path = folder / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if "recompute" not in line]
    path.write_text("\n".join(lines).replace("train:\n", "train:\n  gradient_checkpointing: true\n"))
    assert stored_settings(folder)["train"]["recompute"] == "pass"
    assert main(["train", "--run_dir", str(folder), "--resume"]) == 0
    assert len(losses(folder)) == 12
