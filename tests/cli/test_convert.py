import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bdh.cli.main import main

FIXTURE = Path(__file__).parent.parent / "fixtures" / "tiny.safetensors"


@pytest.fixture
def reference(tmp_path) -> Path:
    """A checkpoint as the published code writes it."""
    with safe_open(FIXTURE, "pt") as file:
        weights = {k.removeprefix("weights."): file.get_tensor(k) for k in file.keys() if k.startswith("weights.")}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    path = tmp_path / "reference.pt"
    torch.save({"model": weights, "config": config, "iters": 3}, path)
    return path


def test_there_and_back_is_bit_equal(reference, tmp_path):
    assert main(["convert", str(reference), str(tmp_path / "model")]) == 0
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "back.pt"), "--to-reference"]) == 0
    before, after = (torch.load(p, weights_only=True) for p in (reference, tmp_path / "back.pt"))
    assert before["config"] == after["config"]
    assert before["model"].keys() == after["model"].keys()
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])


def test_a_bare_state_dict_needs_the_number_of_passes(reference, tmp_path, capsys):
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(reference, weights_only=True)["model"], bare)
    assert main(["convert", str(bare), str(tmp_path / "model")]) == 2
    assert "n_layer" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
    assert main(["convert", str(bare), str(tmp_path / "model"), "--n_layer", "2"]) == 0


def test_the_converted_folder_generates(reference, tmp_path, capsys):
    assert main(["convert", str(reference), str(tmp_path / "model")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "model"), "--prompt", "a", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_tokenizer_file_is_stored_with_the_model(reference, tmp_path):
    from bdh.tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for number, name in enumerate(("tokenizer", "tokenizer/tokenizer.json")):
        out = tmp_path / f"model{number}"
        assert main(["convert", str(reference), str(out), "--tokenizer", str(tmp_path / name)]) == 0
        assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "case", ["missing", "cut off", "there already", "contradiction", "no dropout", "other vocabulary"]
)
def test_bad_input_gets_status_2_and_writes_nothing(reference, tmp_path, capsys, case):
    from bdh.tokenizer import byte_tokenizer

    argv, message, out = [], "", tmp_path / "model"
    if case == "missing":
        reference.unlink()
        message = f"there is no checkpoint file {reference}"
    elif case == "cut off":
        reference.write_bytes(reference.read_bytes()[:-1000])
        message = "not a complete PyTorch checkpoint"
    elif case == "there already":
        out.mkdir()
        (out / "precious").touch()
        message = "exists already"
    elif case == "contradiction":
        argv, message = ["--n_layer", "3"], "n_layer is 3, but the checkpoint's configuration says 2"
    elif case == "no dropout":
        checkpoint = torch.load(reference, weights_only=True)
        checkpoint["config"]["dropout"] = None
        torch.save(checkpoint, reference)
        message = "the checkpoint's configuration is wrong: Field 'dropout' with value None"
    else:
        byte_tokenizer(special_tokens=True).save_pretrained(tmp_path / "tokenizer")
        argv, message = ["--tokenizer", str(tmp_path / "tokenizer")], "vocabulary of 256, the tokenizer"
    assert main(["convert", str(reference), str(out), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or [path.name for path in out.iterdir()] == ["precious"]
