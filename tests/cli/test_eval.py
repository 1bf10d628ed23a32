import json
import math
import shutil

import numpy as np
import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.cli.main import main
from bdh.cli.settings import to_yaml
from bdh.data.config import DataConfig
from bdh.evaluate.loss import evaluate_text
from bdh.extras import install_command
from bdh.tokenizer import byte_tokenizer
from bdh.train.config import RunSettings
from bdh.train.models import load_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def evaluated(capsys, *argv) -> dict:
    assert main(["eval", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("part", "text"), [("validation", TEXT[-180:]), ("train", TEXT[:-180]), ("all", TEXT)], ids=["val", "train", "all"]
)
def test_figures_are_those_of_the_part_that_is_asked_for(model_folder, text_file, capsys, part, text):
    figures = evaluated(capsys, model_folder, "--data.source", text_file, "--part", part, "--block_size", 32)
    model, _ = load_model(str(model_folder))
    tokens = np.frombuffer(text.encode(), np.uint8)
    expected = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=32)
    assert figures["tokens"] == len(text) - 1
    assert figures["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(expected.loss / math.log(2), rel=1e-6)


def test_a_part_that_is_not_measured_may_be_of_any_length(model_folder, tmp_path, capsys):
    """Of a text whose validation part had less than two tokens, not even all of it was measured."""
    path = tmp_path / "short.txt"
    for text, status in (("ten tokens", 0), ("ab", 0), ("a", 2)):
        path.write_text(text)
        assert main(["eval", str(model_folder), "--data.source", str(path), "--part", "all", "--json"]) == status
        shown = capsys.readouterr()
        if status == 0:
            assert json.loads(shown.out)["tokens"] == len(text) - 1
    assert "part all, has 1 token: at least 2 are needed to predict one" in shown.err
    path.write_text("ten tokens")
    assert evaluated(capsys, model_folder, "--data.source", path, "--part", "train")["tokens"] == 8
    assert main(["eval", str(model_folder), "--data.source", str(path)]) == 2
    assert "part validation, has 1 token: at least 2 are needed" in capsys.readouterr().err


def test_strides_and_the_carried_state(model_folder, text_file, capsys):
    common = (model_folder, "--data.source", text_file, "--block_size", 32)
    plain, stride, carried = (evaluated(capsys, *common, *more) for more in ((), ("--stride", 8), ("--carry_state",)))
    assert plain["tokens"] == stride["tokens"] == carried["tokens"]
    assert len({plain["loss"], stride["loss"], carried["loss"]}) == 3


def test_the_loss_of_each_block_of_stretches_and_streams_side_by_side(model_folder, text_file, capsys):
    common = (model_folder, "--data.source", text_file, "--block_size", 8, "--carry_state")
    whole, blocks, streams, stretches = (
        evaluated(capsys, *common, *more) for more in ((), ("--blocks", 5), ("--streams", 3), ("--blocks", 1))
    )
    assert whole["tokens"] == blocks["tokens"] == streams["tokens"] == 179
    assert len({whole["loss"], blocks["loss"], streams["loss"], stretches["loss"]}) == 4
    assert len(blocks["loss_by_block"]) == 5
    # Within the first block nothing is carried yet: it is what windows read from nothing are, but for the last one.
    assert blocks["loss_by_block"][0] == pytest.approx(stretches["loss"], rel=0.05)
    assert {f"loss_at/{2**i}" for i in range(6)} <= set(blocks)
    assert main(["eval", *map(str, common), "--blocks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "block 1 " in shown
    assert "block 2 " in shown
    assert "stretches of 2" in shown


def test_a_window_over_one_long_text(model_folder, text_file, capsys):
    common = ("eval", str(model_folder), "--data.source", str(text_file), "--block_size", "18", "--carry_state")
    losses = {}
    for window in ("4", "1000", None):
        assert main([*common, "--blocks", "10", "--json", *(["--window", window] if window else [])]) == 0
        shown = capsys.readouterr()
        figures = json.loads(shown.out)
        losses[window] = figures["loss"]
        assert len(figures["loss_by_block"]) == 10
        (line,) = [line for line in shown.err.splitlines() if line.startswith("reading by ")]
        assert (f"a window of {int(window or 0):,} tokens" in line) == (window is not None)
    assert losses["1000"] == pytest.approx(losses[None], abs=1e-5)  # the text has 180 tokens
    assert abs(losses["4"] - losses[None]) > 1e-4
    assert main([*common, "--window", "4"]) == 0
    assert "18 tokens, the state carried on, attending to the last 4\n" in capsys.readouterr().out


def test_documents_are_told_apart_on_request(tmp_path, model_folder, capsys):
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40)))
    argv = ["eval", str(model_folder), "--data.source", str(source), "--data.pack", "documents"]
    assert main(argv) == 2
    assert "data.pack is 'documents', but the tokenizer has no <eos>" in capsys.readouterr().err
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 260}
    BDHForCausalLM(BDHConfig(**sizes)).save_pretrained(tmp_path / "m")
    byte_tokenizer(special_tokens=True).save_pretrained(tmp_path / "m")
    common = (tmp_path / "m", "--data.source", source, "--block_size", 16, "--part", "all", "--carry_state")
    apart, through = (evaluated(capsys, *common, "--data.pack", pack) for pack in ("documents", "stream"))
    assert through["tokens"] - apart["tokens"] == 39  # the first tokens of all documents but the first


def test_the_block_size_is_the_trained_one_or_512_where_it_is_unknown(model_folder, text_file, capsys):
    common = (model_folder, "--data.source", text_file)
    assert evaluated(capsys, *common) == evaluated(capsys, *common, "--block_size", 512)
    path = model_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"train_block_size": 24}))
    assert evaluated(capsys, *common) == evaluated(capsys, *common, "--block_size", 24)
    assert main(["eval", *map(str, common), "--stride", "25"]) == 2
    assert "stride is 25: must be within 1 and block_size, 24" in capsys.readouterr().err


def test_bits_per_byte_count_the_bytes_of_the_part(tmp_path, capsys):
    """A text whose two parts are of unequal density: words that the tokenizer knows, then letters it has to spell."""
    from bdh.model import BDHConfig, BDHForCausalLM
    from bdh.tokenizer import train_tokenizer

    known, spelled = "the quick brown fox " * 100, "QZ" * 500
    (tmp_path / "text.txt").write_text(known)
    (tmp_path / "val.txt").write_text(spelled)
    tokenizer = train_tokenizer([known], "bpe", 300)
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "mlp_internal_dim_multiplier": 4, "vocab_size": len(tokenizer)}
    BDHForCausalLM(BDHConfig(**shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = ("--data.source", tmp_path / "text.txt", "--data.val_source", tmp_path / "val.txt")
    for part, text in (("train", known), ("validation", spelled), ("all", known + spelled)):
        figures = evaluated(capsys, tmp_path / "model", *source, "--part", part)
        num_tokens = figures["tokens"] + 1  # the first one is not predicted
        bits = figures["loss"] / math.log(2) * num_tokens / len(text)
        assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_lines_for_people(model_folder, text_file, capsys):
    assert main(["eval", str(model_folder), "--data.source", str(text_file)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("perplexity", "bits per byte", "accuracy", "nats per byte"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stride", "64", "--block_size", "32"], "stride is 64: must be within 1 and block_size, 32"),
        (["--stride", "8", "--carry_state"], "left out with carry_state"),
        (["--blocks", "4"], "blocks is 4: must be given with carry_state"),
        (["--window", "4"], "window is 4: must be given with carry_state"),
        (["--window", "0", "--carry_state"], "window is 0: must be at least 1"),
        (["--window", "4", "--carry_state", "--needle"], "window is 4: must be given with carry_state, and without"),
        (["--streams", "4"], "streams is 4: must be given with carry_state"),
        (
            ["--streams", "4", "--blocks", "2", "--carry_state"],
            "blocks is 2: must be given with carry_state, and without",
        ),
        (["--part", "test"], "part is 'test': must be one of validation, train, all"),
        (["--data.source", "/nowhere/x.txt"], "/nowhere/x.txt"),
    ],
)
def test_bad_input_gets_status_2_and_says_why(model_folder, text_file, capsys, argv, message):
    assert main(["eval", str(model_folder), "--data.source", str(text_file), *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def task_file(tmp_path):
    rows = [{"question": f"{n} and", "choices": ["one", "two"], "answer": n % 2} for n in range(6)]
    (tmp_path / "sums.json").write_text("\n".join(map(json.dumps, rows)))
    fields = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "sums.json")},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "sums.yaml").write_text(json.dumps(fields))  # JSON is YAML
    return tmp_path / "sums.yaml"


@pytest.mark.slow
def test_tasks_as_a_table_and_as_json(model_folder, task_file, capsys):
    assert main(["eval", str(model_folder), "--tasks", str(task_file)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "metric", "value", "±", "error", "documents"]
    assert row.split()[:2] == ["sums", "acc"]
    figures = evaluated(capsys, model_folder, "--tasks", "sums", "--include_path", task_file.parent, "--limit", 4)
    (score,) = figures["scores"]
    assert (score["task"], score["metric"], score["num_samples"]) == ("sums", "acc", 4)
    assert figures["cut_contexts"] == 0


def test_contexts_that_are_cut_are_announced(model_folder, task_file, capsys):
    argv = ["eval", str(model_folder), "--tasks", str(task_file)]
    assert main([*argv, "--block_size", "4"]) == 0
    assert "12 texts were longer than 4 tokens" in capsys.readouterr().err
    assert main([*argv, "--carry_state"]) == 0
    assert "longer than" not in capsys.readouterr().err


def test_a_missing_harness_is_refused_with_the_line_that_installs_it(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", str(model_folder), "--tasks", "hellaswag"]) == 2
    assert install_command("eval") in capsys.readouterr().err


def test_a_task_that_is_not_there_gets_status_2(model_folder, task_file, capsys):
    assert main(["eval", str(model_folder), "--tasks", str(task_file.with_name("no.yaml"))]) == 2
    assert "no.yaml to read tasks from" in capsys.readouterr().err


def test_recall_as_a_table_and_as_json(model_folder, text_file, capsys):
    argv = ("--needle", "--data.source", text_file, "--needle_distances", "[64, 200]", "--needle_trials", "3")
    figures = evaluated(capsys, model_folder, *argv)
    assert [(each["distance"], each["trials"]) for each in figures["recall"]] == [(64, 3), (200, 3)]
    assert all(each["log_probability"] < 0 for each in figures["recall"])
    assert evaluated(capsys, model_folder, *argv) == figures
    assert main(["eval", str(model_folder), *map(str, argv)]) == 0
    header, near, far, below = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["distance", "recalled", "guessed"]
    assert (near.split()[0], far.split()[0]) == ("64", "200")
    assert below.startswith("3 facts in ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--needle", "--tasks", "x"], "needle is True: must be left out with tasks"),
        (["--needle", "--needle_distances", "[0]"], "needle_distances is [0]"),
        (["--needle", "--needle_trials", "0"], "needle_trials is 0: must be at least 1"),
        (["--tasks", "x", "--limit", "0"], "limit is 0: must be at least 1"),
    ],
)
def test_bad_input_for_tasks_and_needles_gets_status_2(model_folder, capsys, argv, message):
    assert main(["eval", str(model_folder), *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def stored_run(tmp_path, model_folder):
    """Makes a run's folder of the model that says which data it was trained on."""

    def make(**data):
        run = tmp_path / "run"
        shutil.copytree(model_folder, run / "model")
        (run / "checkpoints").mkdir()
        (run / "config.yaml").write_text(to_yaml(RunSettings(data=DataConfig(**data))))
        return run / "model"

    return make


def test_the_held_out_text_of_a_run_is_what_its_training_held_out(stored_run, text_file, tmp_path, capsys):
    model = stored_run(source=str(text_file), val_fraction=0.05)
    assert evaluated(capsys, model)["tokens"] == len(TEXT) * 0.05 - 1
    assert evaluated(capsys, model, "--data.source", text_file)["tokens"] == len(TEXT) * 0.05 - 1
    assert evaluated(capsys, model, "--data.val_fraction", 0.5)["tokens"] == len(TEXT) * 0.5 - 1
    assert main(["eval", str(model), "--data.val_fraction", "0.5"]) == 0
    assert capsys.readouterr().err.startswith(f"data settings of {tmp_path / 'run'}: source {text_file}\n")


def test_another_text_than_the_run_s_has_only_the_share_of_the_run(stored_run, text_file, tmp_path, capsys):
    (other := tmp_path / "other.txt").write_text("Something else. " * 100)
    model = stored_run(source=str(other), val_source=str(other), val_fraction=0.2)
    assert evaluated(capsys, model, "--data.source", text_file)["tokens"] == len(TEXT) * 0.2 - 1


def test_a_source_of_a_run_s_mix_is_split_as_its_entry_says(stored_run, text_file, tmp_path, capsys):
    (other := tmp_path / "other.txt").write_text("Something else. " * 100)
    model = stored_run(mix=[{"source": str(other), "weight": 2}, {"source": str(text_file), "val_fraction": 0.25}])
    assert main(["eval", str(model)]) == 2
    assert "measure its sources one by one, with data.source" in capsys.readouterr().err
    assert evaluated(capsys, model, "--data.source", text_file)["tokens"] == len(TEXT) * 0.25 - 1
    assert evaluated(capsys, model, "--data.source", other)["tokens"] == 160 - 1
