import io
import json
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
from transformers import AutoTokenizer

from bdh.cli.main import main


def write_text(path):
    words = [f"word{i % 97} number{i % 89} thing{i % 83}s" for i in range(3000)]
    path.write_text("\n".join(words))
    return path


@pytest.fixture
def text_file(tmp_path):
    return write_text(tmp_path / "text.txt")


KINDS = ["bpe", "wordpiece", "unigram"]
OPTIONS = ["--prompt", "word1 number1", "--seed", "5", "--max_new_tokens", "15"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For each kind, a tokenizer and a run with it."""
    folder = tmp_path_factory.mktemp("kinds")
    text = write_text(folder / "text.txt")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BDH_CACHE", str(folder / "cache"))
        for kind in KINDS:
            train_both(text, kind, folder / kind)
    return folder


def train_both(text, kind, folder):
    out = folder / "tokenizer"
    argv = ["--data.source", str(text), "--kind", kind, "--vocab_size", "320", "--out", str(out)]
    told = io.StringIO()
    with redirect_stdout(told):
        assert main(["tokenizer", "train", *argv]) == 0
    assert "bytes per token on held-out text" in told.getvalue()
    assert len(AutoTokenizer.from_pretrained(out)) <= 320

    flags = {
        "model.n_layer": 2,
        "model.n_embd": 16,
        "model.n_head": 2,
        "model.mlp_internal_dim_multiplier": 8,
        "tokenizer.path": out,
        "data.source": text,
        "train.block_size": 16,
        "train.batch_size": 4,
        "train.max_steps": 10,
        "train.warmup_steps": 1,
        "train.sample_every_steps": 0,
        "monitor.backends": "console,jsonl",
        "run_dir": folder / "run",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 0


@pytest.fixture(scope="module")
def there(folder) -> dict[str, bytes]:
    """What models of all kinds write in a new process: one, as starting it takes longest."""
    code = (
        "import sys; from bdh.cli.main import main\n"
        "for run in sys.argv[1].split(','):\n"
        "    assert main(['generate', run, *sys.argv[2:]]) == 0\n"
        "    sys.stdout.flush(); sys.stdout.buffer.write(bytes(8)); sys.stdout.flush()\n"
    )
    runs = ",".join(str(folder / kind / "run") for kind in KINDS)
    done = subprocess.run([sys.executable, "-c", code, runs, *OPTIONS], capture_output=True, check=True)
    return dict(zip(KINDS, done.stdout.split(bytes(8)), strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trained_with_a_trained_tokenizer_talks_the_same_in_a_new_process(folder, there, capsys, kind):
    run = folder / kind / "run"
    assert main(["generate", str(run / "model"), *OPTIONS]) == 0
    here = capsys.readouterr().out
    assert here == there[kind].decode()  # not text=True, which turns a generated CR into a line end
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["vocab_size"] == len(AutoTokenizer.from_pretrained(run / "model"))
    assert config["eos_token_id"] == AutoTokenizer.from_pretrained(run / "model").eos_token_id


def test_an_existing_folder_is_not_overwritten(text_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(["tokenizer", "train", "--data.source", str(text_file), "--out", str(tmp_path / "out")]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kind", "sentencepiece"], "kind is 'sentencepiece': must be one of bpe, wordpiece, unigram"),
        (["--vocab_size", "100"], "vocab_size is 100"),
        (["--data.source", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_bad_input_gets_status_2_and_writes_nothing(text_file, tmp_path, capsys, argv, message):
    common = ["tokenizer", "train", "--data.source", str(text_file), "--out", str(tmp_path / "out")]
    assert main([*common, *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
