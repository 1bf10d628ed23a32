import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bdh.cli.main import main
from bdh.monitor import read_metrics
from benchmarks.forked import ForkServer

TINY = {
    "model.n_layer": 2,
    "model.n_embd": 16,
    "model.n_head": 2,
    "model.mlp_internal_dim_multiplier": 8,
    "model.dropout": 0.1,
    "train.block_size": 32,
    "train.batch_size": 4,
    "train.max_steps": 12,
    "train.warmup_steps": 2,
    "train.learning_rate": 0.01,
    "train.eval_every_steps": 4,
    "train.eval_windows": 4,
    "train.sample_every_steps": 6,
    "train.sample_max_new_tokens": 8,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 100,
    "monitor.log_every_steps": 1,
    "monitor.backends": "console,jsonl",
}


def write_text(path: Path) -> Path:
    """Words in an order that a model can learn something of."""
    words = random.Random(5).choices(
        ["the", "cat", "dog", "sat", "on", "a", "mat", "and", "ate", "some", "fish"], k=3000
    )
    path.write_text(" ".join(words))
    return path


@pytest.fixture
def text_file(tmp_path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def fork_server():
    with ForkServer() as server:
        yield server


@pytest.fixture
def train(text_file, tmp_path, monkeypatch):
    """Runs `bdh train` on the text with a tiny model; returns the exit status."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))

    def run(run_dir: Path, *more: str, **overrides) -> int:
        settings = {**TINY, "data.source": text_file, "run_dir": run_dir, **overrides}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return main(["train", *flags, *more])

    return run


def losses(run_dir: Path, key: str = "train/loss") -> list[float]:
    return [row[key] for row in read_metrics(run_dir / "metrics.jsonl") if key in row]


def weights(run_dir: Path) -> dict:
    return load_file(run_dir / "model" / "model.safetensors")


def samples(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
