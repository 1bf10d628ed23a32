"""What is wrong with a command line is reported before PyTorch and other large packages are imported."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bdh.cli.generate import GenerateSettings
from bdh.extras import install_command
from bdh.serve.config import PACKAGES

LARGE = ["torch", "transformers", "datasets", "numba", "torchao", "numpy", "fastapi", "matplotlib"]
# Runs command lines one after the other: each is a few milliseconds, as nothing large is imported for it.
RUN_ALL = f"""
import contextlib, io, json, sys
from bdh.cli.main import main
for line in json.load(sys.stdin):
    shown = io.StringIO()
    before = set(sys.modules)
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(line)
        except SystemExit as ended:
            status = ended.code
    loaded = [name for name in {LARGE} if name in set(sys.modules) - before]
    print(json.dumps([status, shown.getvalue(), loaded]))
"""
NO_MODEL = "there is no folder nowhere (and a model of the hub"
# Command line, status, what is said. {folder} is an empty folder, {run} a run with a checkpoint of step 3, {early} one without
# any, {model} an export, {port} a taken port.
LINES = [
    *((f"{command} --help", 0, "") for command in ("train", "eval", "generate", "chat", "serve", "convert", "export")),
    *((f"{command} --help", 0, "") for command in ("tokenizer train", "average", "plot", "runs", "bench")),
    *((f"train --help {rest}", 0, "") for rest in ("--config nowhere", "--run_dir nowhere --resume")),
    ("train --data.source ./nowhere --run_dir {run} --tokenizer.path ./nowhere --print_config", 0, ""),
    ("eval nowhere --tasks nowhere.yaml --print_config", 0, ""),
    ("serve nowhere --port {port} --auth.keys_file nowhere --print_config", 0, ""),
    ("eval nowhere", 2, NO_MODEL),
    ("eval {folder}", 2, "holds no model"),
    ("eval {model} --checkpoint 3", 2, "is not a run: leave it out"),
    ("eval {model} --base {model}", 2, "is not a folder of adapters: leave it out"),
    ("eval {run} --checkpoint 7", 2, "there is no checkpoint of step 7 in {run}/checkpoints: there are 3"),
    ("eval {run} --checkpoint best", 2, "has no 'best'"),
    ("eval {run}/checkpoints/step-0000009", 2, "there is no checkpoint of step 9"),
    ("eval {model} --device gpu", 2, "device is 'gpu': must be auto, cpu, cuda, cuda:N or mps"),
    ("eval {model} --data.source nowhere.txt", 2, "data.source 'nowhere.txt': there is no such file or folder"),
    ("eval {model} --data.val_source ./nowhere", 2, "data.val_source './nowhere': there is no such file or folder"),
    ("eval {model} --tasks nowhere.yaml", 2, "there is no nowhere.yaml to read tasks from"),
    ("eval {model} --batch_sise 3", 2, "did you mean batch_size?"),
    ("generate nowhere --prompt x", 2, NO_MODEL),
    ("generate {model} --prompts_file nowhere", 2, "nowhere"),
    (
        "generate {model} --prompt x --output nowhere/a.jsonl",
        2,
        "output is 'nowhere/a.jsonl': must be a file in a folder",
    ),
    ("chat nowhere", 2, NO_MODEL),
    ("chat {model} --load nowhere", 2, "there is no snapshot file nowhere"),
    ("serve nowhere", 2, NO_MODEL),
    (
        "serve {model} --port {port}",
        2,
        "cannot listen on 127.0.0.1:{port}: another program uses this port: choose another with --port N",
    ),
    ("serve {model} --port 70000", 2, "port is 70000"),
    ("serve {model} --auth.keys_file nowhere", 2, "auth.keys_file is 'nowhere': there is no such file"),
    ("serve {model} --chat_template nowhere", 2, "chat_template is 'nowhere': there is no such file"),
    ("serve {model} --telemetry", 2, "telemetry is true, but its endpoint is not set: set"),
    ("convert nowhere.pt {folder}/out", 2, "there is no checkpoint file nowhere.pt"),
    ("convert {model} {folder}/out", 2, "{model} is a folder, not a checkpoint file"),
    ("convert {model}/config.json {model}", 2, "exists already"),
    ("convert {model}/config.json {folder}/out --tokenizer ./nowhere", 2, "tokenizer.path is './nowhere'"),
    ("convert nowhere {folder}/out --to-reference", 2, NO_MODEL),
    ("export nowhere {folder}/out", 2, "there is no folder nowhere"),
    ("export {run} {folder}/out --checkpoint 7", 2, "there is no checkpoint of step 7"),
    ("export {run} {bad}/out", 2, "{bad}/out cannot be written: {bad} is a file"),
    ("export {run} {model}", 2, "exists already and is not empty"),
    ("average {model} nowhere --out {folder}/out", 2, NO_MODEL),
    ("average {model} --out {model}", 2, "exists already and is not empty: choose another --out"),
    ("plot nowhere", 2, "nowhere holds no run: it has no metrics.jsonl"),
    ("train --resume", 2, "--resume needs --run_dir, the folder of the run to continue"),
    ("runs nowhere", 2, "there is no folder nowhere"),
    ("bench decode --model nowhere", 2, NO_MODEL),
    ("bench decode --n_head 3", 2, "3"),
    ("bench train --config configs/small.yaml --rouns 3", 2, "did you mean rounds?"),
    ("tokenizer train --out {model}", 2, "exists already and is not empty: choose another --out"),
    ("tokenizer train --out {folder}/out --data.source ./nowhere", 2, "data.source './nowhere'"),
    ("train --config nowhere.yaml", 2, "there is no configuration file nowhere.yaml"),
    ("train --config {bad}", 2, "bad.yaml"),
    ("train --data.source ./nowhere", 2, "data.source './nowhere': there is no such file or folder"),
    ("train --tokenizer.path ./nowhere", 2, "tokenizer.path is './nowhere': there is no such folder"),
    ("train --tokenizer.chat_template nowhere", 2, "tokenizer.chat_template is 'nowhere'"),
    ("train --train.init_from nowhere", 2, f"train.init_from is 'nowhere': {NO_MODEL}"),
    ("train --train.init_from {folder}", 2, "train.init_from is '{folder}': {folder} holds no model"),
    ("train --run_dir {run}", 2, "{run} already holds a run, which is never overwritten"),
    ("train --run_dir {early}", 2, "{early} already holds a run; there is no complete checkpoint in"),
    ("train --run_dir {early} --resume", 2, "cannot be continued; remove {early}, or train with another --run_dir"),
    ("train --run_dir {bad}", 2, "run_dir is '{bad}': must be a folder, not a file"),
    ("train --run_dir {folder} --resume", 2, "there is no run to resume in {folder}"),
    ("train --run_dir {run} --resume --resume_step 7", 2, "there is no checkpoint of step 7"),
    (
        "train --run_dir {run} --resume --model.n_layer 9",
        2,
        "model.n_layer: 6 in the run, 9 now; leave out the --config",
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By command line: the status, the standard error, the large packages that it imported; and the places named."""
    from bdh.cli.settings import to_yaml
    from bdh.train.config import RunSettings

    folder = tmp_path_factory.mktemp("early")
    places = {name: folder / name for name in ("folder", "run", "early", "model")}
    for name in ("folder", "early"):
        places[name].mkdir()
    (places["early"] / "config.yaml").write_text(to_yaml(RunSettings()))
    checkpoint = places["run"] / "checkpoints" / "step-0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (places["run"] / "config.yaml").write_text(to_yaml(RunSettings()))
    places["model"].mkdir()
    (places["model"] / "config.json").write_text("{}")
    places["bad"] = folder / "bad.yaml"
    places["bad"].write_text("train: [")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {**places, "port": taken.getsockname()[1]}
        lines = [line.format(**names).split() for line, _, _ in LINES]
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL], input=json.dumps(lines), capture_output=True, text=True, check=True
        )
    found = map(json.loads, done.stdout.splitlines())
    return dict(zip((line for line, _, _ in LINES), found, strict=True)), names


@pytest.mark.parametrize(("line", "status", "message"), LINES, ids=[line for line, _, _ in LINES])
def test_what_needs_no_model_is_checked_before_pytorch_is_imported(results, line, status, message):
    found, names = results
    has, shown, loaded = found[line]
    assert message.format(**names) in shown
    assert (has, loaded) == (status, [])


def test_a_server_asks_for_packages_of_its_extra_alone():
    """It asked for one that the extra does not have any more: after `pip install bdh[serve]` it did not start."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extra = tomllib.loads(text)["project"]["optional-dependencies"]["serve"]
    assert set(PACKAGES) <= {re.split("[<>=]", each)[0].replace("-", "_") for each in extra}


def test_the_package_that_a_form_needs_is_asked_for_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    settings = GenerateSettings(model="some/model", prompt="x", regex="a")
    with pytest.raises(ImportError, match=re.escape(install_command("serve"))):
        settings.check_available()
