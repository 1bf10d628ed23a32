"""What `bdh generate`, `chat` and `serve` import, and from which kinds of names they load."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from bdh import BDHForCausalLM
from bdh.cli.generate import GenerateSettings
from bdh.cli.models import load_for_generation
from bdh.model.network import Network
from bdh.tokenizer import PlainTokenizer

_SLOW = ("transformers", "torch._dynamo", "torch.distributed.tensor", "datasets", "matplotlib")
_PROGRAM = """
import io, sys
from bdh.cli.main import main
folder = sys.argv[1]
assert main(["generate", folder, "--prompt", "x", "--max_new_tokens", "2"]) == 0
assert main(["generate", folder, "--prompt", "x", "--max_new_tokens", "2", "--engine.path", "torch"]) == 0
sys.stdin = io.StringIO("a\\n")
assert main(["chat", folder, "--max_tokens", "2"]) == 0
import asyncio
from bdh.cli.models import load_for_generation
from bdh.cli.serve import ServeCommandSettings
from bdh.serve.server import load
settings = ServeCommandSettings(model=folder)
load(settings, lambda: load_for_generation(settings))
print("SLOW", *(name for name in %r if name in sys.modules))
"""


@pytest.mark.slow
def test_generate_chat_and_serve_never_import_transformers(model_folder):
    program = _PROGRAM % (_SLOW,)
    run = subprocess.run([sys.executable, "-c", program, str(model_folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "SLOW"


@pytest.mark.parametrize(
    ("arguments", "not_needed"),
    [
        (["--help"], "importlib.resources tempfile pathlib difflib yaml"),
        (["train", "--help"], "importlib.resources rich pydantic torch"),
        (["eval", "--modle", "x"], "bdh.serve rich torch"),
    ],
)
def test_what_prints_at_once_imports_no_more_than_it_needs(arguments, not_needed):
    program = f"""
import sys
from bdh.cli.main import main
try:
    main({arguments})
except SystemExit:
    pass
print("IMPORTED", *(name for name in {not_needed.split()} if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "IMPORTED", run.stderr


def test_an_export_is_loaded_as_transformers_does(model_folder):
    model, tokenizer = load_for_generation(GenerateSettings(model=str(model_folder), prompt="a"))
    expected = BDHForCausalLM.from_pretrained(model_folder)
    assert isinstance(model, Network)
    assert not model.training
    assert model.config.name_or_path == str(model_folder)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    assert isinstance(tokenizer, PlainTokenizer)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(model_folder).get_vocab()


def test_a_device_that_is_not_there_is_named(model_folder):
    with pytest.raises(ValueError, match="device is 'cuda:99': this machine and PyTorch build have cpu"):
        load_for_generation(GenerateSettings(model=str(model_folder), prompt="a", device="cuda:99"))
