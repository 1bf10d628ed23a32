import importlib.util
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from bdh.cli.main import main
from bdh.extras import install_command
from bdh.monitor import Monitor, MonitorConfig
from bdh.train.checkpoint import Checkpointer
from bdh.train.config import RunSettings
from bdh.train.loop import TrainingStopped, fit
from bdh.train.setup import open_run

from .conftest import TINY, losses, samples, weights, write_text


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    assert losses(one, "val/loss") == losses(other, "val/loss")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert samples(one) == samples(other)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.optimizer": "muon"},
        {"train.dtype": "float16"},
        {"train.gradient_accumulation_steps": 2, "train.schedule": "wsd"},
        {"train.recompute": "pass"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_resume_is_bit_equal(train, tmp_path, overrides):
    """12 steps in one go, and 5 and 7 with dropout on: the same losses, samples and weights."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(straight, **overrides) == 0
    assert train(halves, **overrides, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)


def test_a_streaming_run_resumes_bit_equal(train, tmp_path):
    """In the middle of a pass over the data, with documents waiting in the shuffle buffer."""
    lines = [json.dumps({"text": f"Document {i} says that {i} and {i + 1} are neighbours. " * 3}) for i in range(300)]
    source = tmp_path / "documents.jsonl"
    source.write_text("\n".join(lines))
    streaming = {"data.source": source, "data.streaming": "true", "data.shuffle_buffer_documents": 20}
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(straight, **streaming) == 0
    assert train(halves, **streaming, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)


def test_a_run_whose_folder_stands_in_a_file_resumes_with_its_stored_settings(train, tmp_path):
    straight, halves, path = tmp_path / "straight", tmp_path / "halves", tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(halves)}))
    assert train(straight) == 0
    assert train(halves, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--config", str(path), "--resume"]) == 0
    assert_same_run(straight, halves)


def test_resume_from_an_earlier_checkpoint_is_bit_equal(train, tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    assert train(straight) == 0
    assert train(again) == 0
    assert train(again, "--resume", "--resume_step", "3") == 0
    assert losses(straight) == losses(again)
    assert samples(straight) == samples(again)  # those after the third step are not there twice
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))


def test_evaluating_and_saving_more_often_trains_just_the_same(train, tmp_path):
    assert train(tmp_path / "often", **{"train.eval_every_steps": 1, "checkpoint.every_steps": 1}) == 0
    assert train(tmp_path / "seldom", **{"train.eval_every_steps": 12, "train.sample_every_steps": 0}) == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")


def test_accumulation_of_two_halves_is_one_batch(train, tmp_path):
    quiet = {"model.dropout": 0.0}
    assert train(tmp_path / "whole", **quiet) == 0
    assert train(tmp_path / "halves", **quiet, **{"train.batch_size": 2, "train.gradient_accumulation_steps": 2}) == 0
    # Sums of float32 in another order, carried through 12 optimizer steps.
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_training_learns(train, tmp_path):
    assert train(tmp_path / "run", **{"train.max_steps": 60, "train.eval_every_steps": 60}) == 0
    validation = losses(tmp_path / "run", "val/loss")[-1]
    # 256 equally likely bytes are 5.55 nats, the letters of this text by their frequency alone 2.6.
    assert validation < 2.6


def test_the_folder_holds_what_the_docs_promise(train, tmp_path):
    run = tmp_path / "run"
    assert train(run, **{"monitor.backends": "auto,tensorboard"}) == 0
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "checkpoints/latest",
        "checkpoints/best",
        "checkpoints/step-0000012/manifest.json",
        "model/config.json",
        "model/model.safetensors",
        "model/generation_config.json",
        "model/tokenizer.json",
        "model/README.md",
    ):
        assert (run / name).exists(), name
    settings = yaml.safe_load((run / "config.yaml").read_text())
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["train_block_size"] == settings["train"]["block_size"]
    assert {name: config[name] for name in settings["model"]} == settings["model"] | {"vocab_size": 256}


def test_the_stored_configuration_runs_again_to_the_same_weights(train, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--run_dir", str(second)]) == 0
    assert_same_run(first, second)


def test_the_model_card_has_the_facts_of_the_run(train, tmp_path, text_file):
    run = tmp_path / "run"
    assert train(run) == 0
    card = (run / "model" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    num_parameters = sum(w.numel() for w in weights(run).values())
    for fact in (f"{num_parameters:,} parameters", str(text_file), "12 of 12", f"{12 * 4 * 32:,}"):
        assert fact in card
    assert f"{losses(run, 'val/loss')[-1]:.4f}" in card


def test_export_takes_the_best_or_any_step(train, tmp_path):
    run = tmp_path / "run"
    assert train(run) == 0
    assert main(["export", str(run), str(tmp_path / "last")]) == 0
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert main(["export", str(run), str(tmp_path / "three"), "--checkpoint", "3"]) == 0
    assert main(["export", str(run), str(tmp_path / "best"), "--checkpoint", "best"]) == 0
    assert main(["export", str(run), str(tmp_path / "three"), "--checkpoint", "3"]) == 2  # it is there already
    assert main(["export", str(run), str(tmp_path / "five"), "--checkpoint", "5"]) == 2
    assert not (tmp_path / "five").exists()


def test_a_run_is_never_overwritten(train, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(tmp_path / "run") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.n_layer": 3}, "model.n_layer: 2 in the run, 3 now"),
        ({"data.val_fraction": 0.2}, "data.val_fraction: 0.1 in the run, 0.2 now"),
        ({"train.seed": 3, "model.n_head": 4}, "model.n_head: 2 in the run, 4 now; train.seed"),
        ({"train.batch_size": 8}, "are 8 sequences a step: must be 4, as in the run so far"),
        ({"tokenizer.special_tokens": "true"}, "tokenizer.special_tokens"),
    ],
)
def test_a_resume_with_another_model_or_data_is_refused_by_name(train, tmp_path, capsys, change, named):
    assert train(tmp_path / "run", **{"train.stop_at_step": 5}) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", "--resume", **change) == 2
    assert named in capsys.readouterr().err
    assert train(tmp_path / "run", "--resume") == 0


def test_a_resume_with_another_text_under_the_same_name_is_refused(train, tmp_path, text_file, capsys):
    assert train(tmp_path / "run", **{"train.stop_at_step": 5}) == 0
    text_file.write_text(text_file.read_text()[::-1])
    capsys.readouterr()
    assert train(tmp_path / "run", "--resume") == 2
    assert "has changed since the run was started" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: "", "it has no settings for model, tokenizer, data, train"),
        (lambda text: text[: text.index("data:")], "it has no settings for data, train"),
        (lambda text: text[: text.index("data:") + 5], "it has no settings for data, train"),
        (lambda text: text + "\n]", "expected <block end>, but found ']'"),
        (lambda text: text[: text.index("model:") + 9], "it has no settings for model, tokenizer"),
    ],
    ids=["empty", "cut between", "cut behind a name", "no yaml", "cut in a name"],
)
def test_a_damaged_configuration_of_a_run_is_named(train, tmp_path, capsys, damage, reason):
    """It was an unexpected error, with status 1."""
    path = tmp_path / "run" / "config.yaml"
    assert train(tmp_path / "run", **{"train.stop_at_step": 3}) == 0
    path.write_text(damage(path.read_text()))
    capsys.readouterr()
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume"]) == 2
    shown = capsys.readouterr().err
    assert f"error: {path} is cut off or damaged: " in shown
    assert reason in shown
    assert len(shown.splitlines()) == 1


def test_what_a_stored_configuration_says_twice_or_not_at_all_is_refused(train, tmp_path, capsys):
    """The first of two was dropped; a setting without a value was an unexpected error, or None."""
    path = tmp_path / "run" / "config.yaml"
    assert train(tmp_path / "run", **{"train.stop_at_step": 3}) == 0
    text = path.read_text()
    number = 1 + text[: text.index("  seed: ")].count("\n")
    path.write_text(
        text.replace("  seed: ", "  schedule:\n  seed: 3\n  seed: ", 1).replace("  schedule: cosine\n", "", 1)
    )
    capsys.readouterr()
    number -= text.index("  schedule: cosine") < text.index("  seed: ")
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 settings are wrong:",
        f"  train.schedule has no value: give it one, or null where that is allowed, or leave it out ({path}, line {number})",
        f"  train.seed is given twice: give it once ({path}, lines {number + 1} and {number + 2})",
    ]


@pytest.mark.parametrize("name", ["batch_size", "schedule", "learning_rate", "lora", "device"])
@pytest.mark.parametrize("value", ["", " null"])
def test_a_setting_of_a_run_that_needs_a_value_has_one(tmp_path, capsys, name, value):
    """A blank batch_size was an unexpected error, and a blank schedule trained with "None schedule"."""
    path = tmp_path / "a.yaml"
    path.write_text(f"train:\n  {name}:{value}\n")
    assert main(["train", "--config", str(path), "--run_dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    said = f"train.{name} is null: must be " if value else f"train.{name} has no value: "
    assert line.startswith(f"error: {said}")
    assert line.endswith(f"({path}, line 2)")
    assert not (tmp_path / "run").exists()


def test_resuming_nothing_is_refused(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--resume") == 2
    assert "there is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prolonged_run_goes_on(train, tmp_path):
    assert train(tmp_path / "run") == 0
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume", "--train.max_steps", "15"]) == 0
    assert len(losses(tmp_path / "run")) == 15


def test_bad_settings_write_nothing(train, tmp_path, capsys):
    assert (
        train(
            tmp_path / "run",
            **{"train.learning_rate": -1, "model.n_head": 3, "train.device": "tpu", "train.seed": 2**63},
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert "train.learning_rate is -1: must be above 0" in shown
    assert "model.n_head is 3: must be such that 16 * 8 = 128 neurons" in shown
    assert "train.device is 'tpu'" in shown
    assert f"train.seed is {2**63}: must be " in shown
    assert not (tmp_path / "run").exists()


def test_the_largest_seed_trains_and_samples(train, tmp_path):
    prompts = ("--train.sample_prompts=a", "--train.sample_prompts=b")
    assert train(tmp_path / "run", *prompts, **{"train.seed": 2**63 - 1, "train.max_steps": 2}) == 0
    assert len(samples(tmp_path / "run")) == 2


def test_a_missing_tensorboard_is_told_before_anything_is_written(train, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more)
    )
    assert train(tmp_path / "run", **{"monitor.backends": "tensorboard"}) == 2
    assert install_command("monitor") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_text_shorter_than_a_block_names_both_numbers_and_writes_nothing(train, tmp_path, text_file, capsys):
    text_file.write_text("short")
    assert train(tmp_path / "run") == 2
    shown = capsys.readouterr().err
    assert "33" in shown
    assert not (tmp_path / "run").exists()
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert written == []


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(train, tmp_path, capsys):
    assert train(tmp_path / "run", **{"model.vocab_size": 300}) == 2
    assert (
        "model.vocab_size is 300: must be 256, the number of entries of the tokenizer 'byte'" in capsys.readouterr().err
    )


def test_patience_stops_a_run_that_gets_no_better(train, tmp_path):
    quiet = {"train.patience": 2, "train.eval_every_steps": 1, "train.max_steps": 200, "train.learning_rate": 1e-12}
    assert train(tmp_path / "run", **quiet) == 0
    assert 3 <= len(losses(tmp_path / "run", "val/loss")) < 200


def opened(text_file, folder, **overrides):
    from bdh.cli.settings import parse_settings

    flags = {**TINY, "data.source": text_file, "run_dir": folder, **overrides}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    return open_run(parse_settings(RunSettings, argv, prog="p", description="d"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(text_file, tmp_path, monkeypatch, dtype):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(text_file, tmp_path / "run", **{"train.dtype": dtype})
    with torch.no_grad():
        run.model.lm_head.weight[3, 0] = float("nan")
    before = {name: w.clone() for name, w in run.model.state_dict().items()}
    with (
        Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=12) as monitor,
        pytest.raises(TrainingStopped, match="step 1: the loss is nan"),
    ):
        fit(run, monitor)
    assert all(torch.equal(before[name].nan_to_num(), w.nan_to_num()) for name, w in run.model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_update(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(text_file, tmp_path / "run")
    run.model.decoder.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = run.model.encoder.weight.clone()
    with (
        Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=12) as monitor,
        pytest.raises(TrainingStopped, match="step 1: the gradient's norm is"),
    ):
        fit(run, monitor)
    assert torch.equal(before, run.model.encoder.weight)


def test_a_step_that_is_not_finite_can_be_left_out_and_is_counted(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(text_file, tmp_path / "run", **{"train.on_nonfinite": "skip", "train.max_steps": 4})
    calls, seen = [], []

    def break_once(gradient):
        calls.append(1)
        seen.append(run.model.encoder.weight.detach().clone())
        return gradient * float("nan") if len(calls) == 2 else gradient

    run.model.decoder.weight.register_hook(break_once)
    with Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=4) as monitor:
        assert fit(run, monitor) == "finished"
    assert torch.equal(seen[2], seen[1])  # the second step changed nothing
    assert not torch.equal(seen[1], seen[0])
    assert not torch.equal(seen[3], seen[2])
    assert losses(run.folder, "train/skipped_steps") == [0, 1, 1, 1]
    assert "step 2: the gradient's norm is nan: it did not change the weights" in capsys.readouterr().err
    assert run.checkpointer.load().training["progress"]["skipped_steps"] == 1


def test_a_spike_is_left_out_and_counted_or_stops(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    more = {"train.spike_threshold": 20, "train.max_steps": 34, "train.eval_every_steps": 34}
    for what in ("skip", "stop"):
        run = opened(text_file, tmp_path / what, **more, **{"train.on_nonfinite": what, "train.sample_every_steps": 0})
        calls = []

        def exaggerate_once(gradient, calls=calls):
            calls.append(1)
            return gradient * 1000 if len(calls) == 31 else gradient

        run.model.decoder.weight.register_hook(exaggerate_once)
        with Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=34) as monitor:
            if what == "skip":
                assert fit(run, monitor) == "finished"
                assert losses(run.folder, "train/skipped_steps") == [0] * 30 + [1] * 4
                assert "step 31: the gradient's norm is " in capsys.readouterr().err
                assert run.checkpointer.load().training["progress"]["norm_statistics"]["count"] == 25
            else:
                with pytest.raises(TrainingStopped, match=r"step 31: .* standard deviations above its mean of "):
                    fit(run, monitor)


def test_another_metric_may_make_the_best_checkpoint(train, tmp_path):
    assert train(tmp_path / "run", **{"checkpoint.best_metric": "val/accuracy"}) == 0
    accuracies = losses(tmp_path / "run", "val/accuracy")
    progress = Checkpointer(tmp_path / "run").load().training["progress"]
    assert progress["best_value"] == max(accuracies)
    assert progress["best_step"] == 4 * (1 + accuracies.index(max(accuracies)))
    assert train(tmp_path / "wrong", **{"checkpoint.best_metric": "val/lost"}) == 2
    assert not (tmp_path / "wrong").exists()


def test_a_run_of_steps_that_are_not_finite_stops(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(
        text_file,
        tmp_path / "run",
        **{"train.on_nonfinite": "skip", "train.max_steps": 40, "train.sample_every_steps": 0},
    )
    with torch.no_grad():
        run.model.lm_head.weight[3, 0] = float("nan")
    with (
        Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=40) as monitor,
        pytest.raises(
            TrainingStopped, match="step 26: 26 steps in a row were skipped because of their loss or gradient"
        ),
    ):
        fit(run, monitor)


def test_float16_skips_a_step_whose_gradients_overflow(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(text_file, tmp_path / "run", **{"train.dtype": "float16", "train.max_steps": 3})
    calls = []

    def overflow_once(gradient):
        calls.append(1)
        return gradient * float("inf") if len(calls) == 1 else gradient

    run.model.decoder.weight.register_hook(overflow_once)
    scale = run.loss_scale.value.item()
    with Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=3) as monitor:
        assert fit(run, monitor) == "finished"
    assert run.loss_scale.value.item() == scale / 2
    assert all(torch.isfinite(w).all() for w in run.model.state_dict().values())


def test_a_training_outside_of_the_main_thread_leaves_the_signals_alone(text_file, tmp_path, monkeypatch):
    """Only the main thread can set their handlers: another one got a ValueError."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(text_file, tmp_path / "run", **{"train.max_steps": 2})
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with (
        Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=2) as monitor,
        ThreadPoolExecutor(1) as threads,
    ):
        assert threads.submit(fit, run, monitor).result() == "finished"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def wait_for_checkpoint(process, run_dir):
    for _ in range(1200):
        if (run_dir / "checkpoints" / "latest").exists():
            return
        assert process.poll() is None, process.said()
        time.sleep(0.05)
    pytest.fail("no checkpoint after a minute")


STOPPED = {
    "train.max_steps": 150,
    "train.eval_every_steps": 50,
    "train.sample_every_steps": 50,
    "checkpoint.every_steps": 9,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run that no signal stops."""
    folder = tmp_path_factory.mktemp("straight")
    settings = {**TINY, **STOPPED, "data.source": write_text(folder / "text.txt"), "run_dir": folder / "run"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BDH_CACHE", str(folder / "cache"))
        assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGUSR1, 75),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_end(
    fork_server, straight, tmp_path, text_file, monkeypatch, number, status
):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    stopped = tmp_path / "stopped"
    settings = {**TINY, **STOPPED, "data.source": text_file, "run_dir": stopped}
    arguments = ["train", *(f"--{name}={value}" for name, value in settings.items())]
    process = fork_server.start(arguments, {"BDH_CACHE": str(tmp_path / "cache")})
    wait_for_checkpoint(process, stopped)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    if number != signal.SIGKILL:
        assert "everything is saved" in process.said()
    assert main(["train", "--run_dir", str(stopped), "--resume"]) == 0
    assert losses(straight) == losses(stopped)
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(stopped).values(), strict=True))
