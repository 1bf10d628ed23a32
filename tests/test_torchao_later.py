"""`import bdh` keeps transformers from importing torchao, which works as ever once it is needed."""

import sys
from types import ModuleType

import pytest

from bdh.torchao_later import torchao_put_off
from benchmarks.forked import ForkServer

SUPPORT = "torchao.prototype.safetensors.safetensors_support"

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def printed():
    """Runs a program in a process that has nothing of transformers, peft or torchao yet, and returns what it prints."""
    with ForkServer("torch._dynamo", "datasets") as server:

        def run(program: str) -> str:
            process = server.start(["-c", program])
            status, said = process.wait(), process.said()
            assert status == 0, said
            assert "torchao" not in said
            assert "register_constant" not in said
            return process.wrote()

        yield run


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import bdh; from transformers import AutoModelForCausalLM, Trainer; AutoModelForCausalLM._model_mapping.keys()",
        "from bdh import BDHForCausalLM",
        "import bdh; import sentence_transformers",
        "import bdh.bench.decode",
        "import bdh.evaluate.harness",
    ],
)
def test_after_bdh_nothing_imports_it_and_nothing_is_said(printed, imports):
    program = f"{imports}\nimport sys\nprint([name for name in sys.modules if name.startswith('torchao')])"
    assert printed(program).splitlines() == ["[]"]


@pytest.mark.slow
def test_transformers_saves_and_loads_with_it_once_it_is_needed(printed, tmp_path):
    """The quantizer of transformers has a name of torchao's that was put off."""
    program = f"""
import logging, sys
logging.disable()
import bdh, torch
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig
assert "torchao" not in sys.modules
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained({str(tmp_path / "plain")!r})
from torchao.quantization import Int8WeightOnlyConfig
how = TorchAoConfig(Int8WeightOnlyConfig())
model = LlamaForCausalLM.from_pretrained({str(tmp_path / "plain")!r}, quantization_config=how)
model.save_pretrained({str(tmp_path / "int8")!r})
again = LlamaForCausalLM.from_pretrained({str(tmp_path / "int8")!r})
ids = torch.arange(8)[None]
print(torch.equal(model(ids).logits, again(ids).logits), type(again.model.layers[0].mlp.up_proj.weight).__module__)
"""
    assert printed(program).splitlines()[-1].startswith("True torchao.")


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        """
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict as later
from torchao.utils import TorchAOBaseTensor

assert not issubclass(int, TorchAOBaseTensor)
assert "torchao" not in sys.modules
around.__exit__(None, None, None)
assert not {SUPPORT, "torchao.utils"} & sys.modules.keys()
later({})
assert "torchao" in sys.modules
""",
        """
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

assert "torchao" in sys.modules
support = sys.modules[SUPPORT]
assert support.unflatten_tensor_state_dict is unflatten_tensor_state_dict
assert support.__file__ is not None
around.__exit__(None, None, None)
assert sys.modules[SUPPORT] is support
""",
    ],
    ids=["it is called", "another name is wanted"],
)
def test_it_is_imported_when_a_function_is_called_or_another_name_is_wanted(printed, program):
    """As another version of transformers may want one."""
    begin = f"""
import logging, sys
from bdh.torchao_later import torchao_put_off
logging.disable()
SUPPORT = {SUPPORT!r}
around = torchao_put_off()
around.__enter__()
"""
    printed(begin + program)


def test_torchao_that_is_imported_already_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    before = set(sys.modules)
    with torchao_put_off():
        assert set(sys.modules) == before
