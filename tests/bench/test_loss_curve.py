"""benchmarks/loss_curve.py says in a line what it cannot compare, before a run is opened."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def loss_curve(monkeypatch):
    spec = importlib.util.spec_from_file_location("loss_curve", ROOT / "benchmarks" / "loss_curve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "open_run", lambda settings: pytest.fail("a run was opened"))
    monkeypatch.chdir(ROOT)
    return module


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "missing.yaml"], "there is no configuration file missing.yaml"),
        (["--foo", "3"], "--foo is not a setting"),
        (["--step", "5"], "--step is not a setting"),
        (["--config", "configs/long.yaml"], "train.carry_state is True: must be false"),
        (["--data.pack", "documents"], "data.pack is 'documents': must be another"),
        (["--model.dropout", "0.1"], "model.dropout is 0.1: must be 0"),
        (["--steps", "0"], "--steps is 0: must be at least 1"),
        (["--steps", "many"], "argument --steps"),
    ],
)
def test_what_cannot_be_compared_is_an_error_of_one_line(loss_curve, capsys, argv, said):
    assert loss_curve.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {said}")
    assert shown.err.count("\n") == 1
