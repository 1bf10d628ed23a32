"""`import bdh` makes transformers' auto classes know the model, and costs nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from bdh import BDHForCausalLM


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


@pytest.mark.parametrize(
    "imports",
    [
        "import bdh\nfrom transformers import AutoModelForCausalLM, AutoConfig",
        "from transformers import AutoModelForCausalLM, AutoConfig\nimport bdh",
        "import bdh, transformers\nfrom transformers import Trainer, AutoModelForCausalLM, AutoConfig",
        "from bdh import BDH\nfrom transformers import AutoModelForCausalLM, AutoConfig",
        "from bdh import BDHModel\nfrom transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_the_auto_classes_know_it_whatever_is_imported_first(model, tmp_path, imports):
    model.save_pretrained(tmp_path)
    code = f"""{imports}
print(type(AutoConfig.from_pretrained({str(tmp_path)!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
from transformers import AutoModel
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["BDHConfig", "BDHForCausalLM", "BDHModel"]


def test_importing_bdh_loads_no_heavy_library():
    code = "import sys, bdh; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_can_be_pushed_to_the_hub(model):
    """Not tried, for want of a network: the method is transformers' own."""
    assert callable(model.push_to_hub)


def test_unknown_names_are_attribute_errors():
    import bdh

    with pytest.raises(AttributeError, match="no attribute 'Hatchling'"):
        bdh.Hatchling  # noqa: B018


WITHOUT_BDH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, copied = sys.argv[1:3]
def refused(**arguments):
    try:
        AutoModelForCausalLM.from_pretrained(folder, **arguments)
    except (ValueError, ImportError) as error:
        return str(error)
size = len(AutoTokenizer.from_pretrained(folder))
print("\\nprinted", size)
"""


def run_without_bdh(code: str, folder, tmp_path) -> list[str]:
    """What a program prints in which nothing of bdh was imported, and nobody answers questions."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_BDH + code, str(folder), str(tmp_path / "copied")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, env=environment, timeout=120
    )
    return done.stdout.rpartition("printed")[2].split()  # before it stands what transformers asks


@pytest.fixture
def exported(byte_model, tokenizer, tmp_path):
    from bdh.train.export import export_model

    export_model(byte_model, tokenizer, tmp_path / "exported", "")
    return tmp_path / "exported"


def test_without_importing_bdh_the_error_says_what_to_do(exported, tmp_path):
    code = """
assert "trust_remote_code=True" in refused()
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print("printed", type(model).__module__, type(model).__name__)
model.save_pretrained(copied)
"""
    assert run_without_bdh(code, exported, tmp_path) == ["bdh.model.modeling", "BDHForCausalLM"]
    # With the stub, and no copies of the package's modules.
    assert sorted(p.name for p in (tmp_path / "copied").glob("*.py")) == ["bdh_auto.py"]
    assert (tmp_path / "copied" / "config.json").read_text() == (exported / "config.json").read_text()


def test_the_tokenizer_alone_loads_without_bdh_and_asks_nothing_where_no_code_is_to_be_trusted(exported):
    code = """
import builtins, sys
def refuse(*_):
    raise SystemExit("asked")
builtins.input = refuse
from transformers import AutoTokenizer
print(len(AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)), "bdh" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(exported)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["256", "False"]


def test_where_bdh_is_not_installed_the_error_says_so(exported, tmp_path):
    code = """
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == "bdh":
            raise ModuleNotFoundError("No module named 'bdh'", name=name)
sys.meta_path.insert(0, NotInstalled())
print("printed", refused(trust_remote_code=True))
"""
    assert "pip install bdh" in " ".join(run_without_bdh(code, exported, tmp_path))


def test_after_import_bdh_no_one_is_asked(exported, tmp_path):
    code = """
import bdh
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline
for trust in (None, False, True):
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)) is bdh.BDHForCausalLM
assert type(AutoModel.from_pretrained(folder)) is bdh.BDHModel
assert type(AutoModelForSequenceClassification.from_pretrained(folder)) is bdh.BDHForSequenceClassification
AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copied)
print("printed", AutoConfig.from_pretrained(copied).auto_map["AutoModelForCausalLM"])
pipeline("text-generation", folder)
"""
    assert run_without_bdh(code, exported, tmp_path) == ["bdh_auto.BDHForCausalLM"]


@pytest.mark.parametrize("name", ["backbone", "modeling"])
def test_any_of_its_modules_can_be_imported_first(name):
    code = f"""import bdh.model.{name}
from transformers import AutoModel, AutoModelForSequenceClassification
assert bdh.BDHConfig in AutoModel._model_mapping
assert bdh.BDHConfig in AutoModelForSequenceClassification._model_mapping"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_without_the_stub_load_as_before(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "bdh_auto.py").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.config.auto_map == model.config.auto_map
