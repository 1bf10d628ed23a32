"""`import bdh` makes transformers' auto classes know the model, and costs nothing."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from bdh import BDHConfig, BDHForCausalLM
from bdh.tokenizer import byte_tokenizer
from bdh.train.export import export_model
from benchmarks.forked import ForkServer


@pytest.fixture(scope="module")
def fork_server():
    """With what takes long of the imports of transformers: neither that nor bdh."""
    with ForkServer("torch._dynamo", "torch.distributed.tensor", "scipy.optimize") as server:
        yield server


@pytest.fixture
def printed(fork_server, tmp_path):
    """What a program prints, to whose questions nobody answers."""

    def run(code: str, *arguments: str) -> str:
        started = fork_server.start(["-c", code, *arguments], {"HF_MODULES_CACHE": str(tmp_path / "modules")})
        assert started.wait(120) == 0, started.said()
        return started.wrote()

    return run


def test_saved_and_loaded_is_bit_equal(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BDHForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loading_takes_a_dtype(model, tokens, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    # bfloat16 keeps 8 bits of each weight and activation; the logits of this model are of size 1 to 5.
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens).logits, atol=0.5, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM, AutoConfig\nimport bdh",
        "from bdh import BDH\nfrom transformers import AutoModelForCausalLM, AutoConfig",  # bdh.model.modeling first
        "from bdh import BDHModel\nfrom transformers import AutoModelForCausalLM, AutoConfig",  # bdh.model.modeling first
    ],
)
def test_the_auto_classes_know_it_whatever_is_imported_first(printed, model, tmp_path, imports):
    model.save_pretrained(tmp_path)
    code = f"""import sys
assert not {{"bdh", "transformers"}} & set(sys.modules)
{imports}
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
from transformers import AutoModel, AutoModelForSequenceClassification
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForSequenceClassification.from_pretrained({str(tmp_path)!r})).__name__)"""
    assert printed(code).split() == ["BDHConfig", "BDHForCausalLM", "BDHModel", "BDHForSequenceClassification"]


def test_importing_bdh_loads_no_heavy_library():
    code = "import sys, bdh; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_pushed_to_the_hub_is_what_is_saved(model, monkeypatch, tmp_path):
    """The method is transformers' own; what it would send is kept here instead."""
    sent = {}

    def commit(self, repo_id, operations, **_):
        sent.update({each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations})

    repository = SimpleNamespace(repo_id="somebody/hatchling")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **_: repository)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    model.push_to_hub("somebody/hatchling")
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items() <= sent.items()


def test_unknown_names_are_attribute_errors():
    import bdh

    with pytest.raises(AttributeError, match="no attribute 'Hatchling'"):
        bdh.Hatchling  # noqa: B018


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    config = BDHConfig(vocab_size=256, n_embd=8, n_head=1, n_layer=1, mlp_internal_dim_multiplier=2)
    export_model(BDHForCausalLM(config), byte_tokenizer(), folder, "")
    return folder


WITHOUT_BDH = """
import builtins, sys
folder, copied = sys.argv[1:3]

def refuse(*_):
    raise SystemExit("asked")

answer, builtins.input = builtins.input, refuse
from transformers import AutoModelForCausalLM, AutoTokenizer
assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=False)) == 256
assert "bdh" not in sys.modules
builtins.input = answer
assert len(AutoTokenizer.from_pretrained(folder)) == 256

def refused(**arguments):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except (ValueError, ImportError) as error:
        return str(error)

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "bdh":
            raise ModuleNotFoundError("No module named 'bdh'", name=name)

assert "trust_remote_code=True" in refused()
sys.meta_path.insert(0, NotInstalled())
assert "pip install bdh" in refused(trust_remote_code=True)
del sys.meta_path[0]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(copied)
print("printed", type(model).__module__, type(model).__name__)
"""


@pytest.mark.slow
def test_without_importing_bdh_the_tokenizer_loads_and_the_model_says_what_to_do(printed, exported, tmp_path):
    """Nothing is asked where no code is to be trusted; where bdh is not installed, the error says so."""
    out = printed(WITHOUT_BDH, str(exported), str(tmp_path / "copied"))
    assert out.rpartition("printed")[2].split() == ["bdh.model.modeling", "BDHForCausalLM"]
    # With the stub, and no copies of the package's modules.
    assert sorted(p.name for p in (tmp_path / "copied").glob("*.py")) == ["bdh_auto.py"]
    assert (tmp_path / "copied" / "config.json").read_text() == (exported / "config.json").read_text()


@pytest.mark.slow
def test_after_import_bdh_no_one_is_asked(printed, exported, tmp_path):
    code = """
import bdh, sys, transformers
from transformers import Trainer, AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
folder, copied = sys.argv[1:3]
for trust in (None, False, True):
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)) is bdh.BDHForCausalLM
assert type(AutoModel.from_pretrained(folder)) is bdh.BDHModel
assert type(AutoModelForSequenceClassification.from_pretrained(folder)) is bdh.BDHForSequenceClassification
AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copied)
print("printed", AutoConfig.from_pretrained(copied).auto_map["AutoModelForCausalLM"])
pipeline("text-generation", folder)
"""
    out = printed(code, str(exported), str(tmp_path / "copied"))
    assert out.rpartition("printed")[2].split() == ["bdh_auto.BDHForCausalLM"]


def test_folders_without_the_stub_load_as_before(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "bdh_auto.py").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.auto_map == model.config.auto_map
