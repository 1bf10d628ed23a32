import json
import re
import subprocess
import sys
import time

import pytest

from bdh.cli.main import main
from bdh.locks import Lock
from bdh.monitor.history import summarize_runs


def made(folder, *, rate=0.001, steps=(10, 20), max_steps=20, age=9_000.0):
    (folder / "checkpoints" / "step-0000020").mkdir(parents=True)
    settings = {"train": {"max_steps": max_steps, "learning_rate": rate}, "data": {"source": ["a", "b"]}}
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    rows = []
    for step in steps:
        rows.append(
            {"step": step, "time": time.time() - age, "train/loss": 3 - step / 10, "train/tokens_per_second": 50.0}
        )
        rows.append({"step": step, "time": time.time() - age, "val/loss": abs(step - 10) + 1.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_state_and_figures_of_each_run(tmp_path):
    made(tmp_path / "a")
    made(tmp_path / "deep" / "b", steps=(10,))
    (made(tmp_path / "c", steps=(10,), age=5) / "lock").write_text("")  # not even its owner is written yet
    made(tmp_path / "d", steps=())
    (made(tmp_path / "full", age=5) / "checkpoints" / "step-0000020").rmdir()
    (tmp_path / "no_run").mkdir()
    found = {run.folder.relative_to(tmp_path).as_posix(): run for run in summarize_runs(tmp_path)}
    assert list(found) == ["a", "c", "d", "deep/b", "full"]
    states = ["finished", "active", "stopped", "stopped", "finished, not saved"]
    assert [run.state for run in found.values()] == states
    a, empty = found["a"], found["d"]
    assert (a.step, a.max_steps, a.train_loss, a.best_val_loss, a.tokens_per_second) == (20, 20, 1.0, 1.5, 50.0)
    assert a.seconds_since_logged == pytest.approx(9_000, abs=100)
    assert (empty.step, empty.train_loss, empty.best_val_loss, empty.seconds_since_logged) == (0, None, None, None)


def test_a_run_is_active_as_long_as_a_process_holds_it_and_not_after_it_was_killed(tmp_path):
    """A run whose steps took more than two minutes was called stopped, and a killed one active for two minutes."""
    slow = made(tmp_path / "slow", steps=(10,), age=9_000)
    killed = made(tmp_path / "killed", steps=(10,), age=0)
    code = "import sys; from pathlib import Path; from bdh.locks import Lock\n"
    code += "with Lock(Path(sys.argv[1]), 'it'): print(flush=True); sys.stdin.readline()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(killed / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder, Lock(slow / "lock", "it"):
        holder.stdout.readline()
        assert [run.state for run in summarize_runs(tmp_path)] == ["active", "active"]
        holder.kill()
        holder.wait()
        assert [run.state for run in summarize_runs(tmp_path)] == ["stopped", "active"]
    assert [run.state for run in summarize_runs(tmp_path)] == ["stopped", "stopped"]


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path):
    made(tmp_path / "a")
    (made(tmp_path / "b") / "lock").mkdir()
    assert [(run.state, "lock" in (run.fault or "")) for run in summarize_runs(tmp_path)] == [
        ("finished", False),
        ("unreadable", True),
    ]


def test_differences_are_from_what_most_runs_have(tmp_path):
    for name, rate in (("a", 0.001), ("b", 0.002), ("c", 0.001)):
        made(tmp_path / name, rate=rate)
    assert [run.differences for run in summarize_runs(tmp_path)] == [{}, {"train.learning_rate": 0.002}, {}]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_differences_are_not_wider_than_the_terminal(tmp_path, capsys, monkeypatch, is_terminal):
    """A run with other settings than the rest got a line of several hundred characters, which the terminal broke in words."""
    for name in ("a", "b"):
        made(tmp_path / name)
    others = {f"other_setting_number_{index}": index for index in range(9)}
    settings = {"train": {"max_steps": 20, "learning_rate": 0.001}, "data": {"source": ["a", "b"], **others}}
    (made(tmp_path / "c") / "config.yaml").write_text(json.dumps(settings))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    assert main(["runs", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "other_setting" in line]
    assert re.findall(r"data\.(\w+)=", " ".join(lines)) == list(others)
    assert (len(lines) > 1, max(map(len, lines)) <= 80) == (is_terminal, is_terminal)


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path, capsys):
    made(tmp_path / "a")
    (made(tmp_path / "b") / "config.yaml").write_text("train: [1")
    (made(tmp_path / "bb") / "config.yaml").write_text("train: {seed: 1}\ntrain: {rate: 1}\nmodel:\n")
    (made(tmp_path / "c") / "metrics.jsonl").write_text("{}x\n{}\n")
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if not line.startswith(" ")] == [
        ["run", "state"],
        ["a", "finished"],
        ["b", "unreadable"],
        ["bb", "unreadable"],
        ["c", "unreadable"],
    ]
    assert "config.yaml, line 1 is not YAML" in lines[3]
    assert re.search(r"train is given twice: give it once \(.*lines 1 and 2\); model has no value", lines[5])
    assert "metrics.jsonl, line 1, is not JSON" in lines[7]


def test_the_table_has_the_figures_and_the_differences_below(tmp_path, capsys):
    made(tmp_path / "a")
    made(tmp_path / "b", rate=0.5)
    assert main(["runs", str(tmp_path)]) == 0
    _, first, second, below = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "finished", "20/20", "1.0000", "1.5000", "50", "2", "h", "ago"]
    assert second.startswith("b ")
    assert below == "    train.learning_rate=0.5"


def test_a_setting_that_is_not_set_is_a_dash(tmp_path, capsys):
    """It was Python's None."""
    made(tmp_path / "a")
    made(tmp_path / "b", rate=None)
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "    train.learning_rate=-"


def test_json_has_one_object_a_run(tmp_path, capsys):
    made(tmp_path / "a")
    assert main(["runs", str(tmp_path / "a"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["folder"], row["state"], row["step"]) == (str(tmp_path / "a"), "finished", 20)


@pytest.mark.parametrize(("name", "message"), [("none", "there is no folder"), (".", "holds no run")])
def test_no_runs_are_said_with_status_2(tmp_path, capsys, name, message):
    assert main(["runs", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
