import shutil

import pytest

from bdh.cli.main import main

SHORT = {
    "max_steps": 4,
    "warmup_steps": 1,
    "eval_every_steps": 4,
    "eval_windows": 2,
    "sample_every_steps": 0,
    "stop_at_step": 2,
}


@pytest.mark.slow
def test_an_interrupted_demo_is_continued_and_a_complete_one_is_used(tmp_path, capfd):
    run = tmp_path / "demo"
    flags = [word for name, value in SHORT.items() for word in (f"--train.{name}", str(value))]
    assert main(["train", "--config", "tiny", "--run_dir", str(run), *flags]) == 0
    shutil.rmtree(run / "model")  # as after a kill, which exports nothing
    capfd.readouterr()
    assert main(["demo", str(run)]) == 0
    shown = capfd.readouterr().out
    assert "was interrupted: continuing it" in shown
    for prompt in ("'The '", "'A class is '", "'If the file '"):
        assert f"--- bdh generate {run}/model --prompt {prompt}" in shown
    assert (run / "loss.png").stat().st_size > 0
    assert "What next" in shown
    assert f"tensorboard --logdir {run}/tensorboard" in shown
    shutil.rmtree(run / "tensorboard")  # as where the package is missing
    assert main(["demo", str(run)]) == 0
    shown = capfd.readouterr().out
    assert "holds a trained model already: using it" in shown
    assert "tensorboard" not in shown


def test_a_fault_of_the_training_ends_the_demo(tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("model: 3\n")
    (tmp_path / "lock").write_text("")
    assert main(["demo", str(tmp_path)]) != 0
    assert "What next" not in capfd.readouterr().out


def test_a_folder_with_files_of_its_owner_is_left_alone(tmp_path, capfd):
    """A folder with a config.yaml and no checkpoint was taken for an interrupted demo, and removed."""
    (tmp_path / "config.yaml").write_text("model: 3\n")
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", str(tmp_path)]) == 2
    assert "already holds a run" in capfd.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
