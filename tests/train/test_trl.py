"""TRL's trainers take a model as they take every other: by object and by path, whole and with adapters.

TRL and peft take seconds to import, and are imported where a test of these is run.
"""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdh import BDHConfig, BDHForCausalLM
from bdh.tokenizer import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about each other
QUESTIONS = [f"The {word} of {n}" for n in range(5) for word in ("sum", "square", "half", "root")]
ANSWERS = [f" is {'abcdef'[n % 6] * (3 + n % 4)}" for n in range(20)]
TEXTS = Dataset.from_dict({"text": [q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)]})
PREFERENCES = Dataset.from_dict({"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": [a[::-1] for a in ANSWERS]})
PROMPTS = Dataset.from_dict({"prompt": QUESTIONS})
LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["encoder", "decoder", "encoder_v.0", "encoder_v.1"]}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "mlp_internal_dim_multiplier": 8}
    BDHForCausalLM(BDHConfig(vocab_size=260, dropout=0.1, **sizes)).save_pretrained(folder)
    byte_tokenizer(special_tokens=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["object", "path"])
def model(request, export):
    return export if request.param == "path" else AutoModelForCausalLM.from_pretrained(export)


@pytest.fixture
def settings(tmp_path):
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 1,
    }


def trained(trainer, export, folder):
    """Trains, and returns the losses. What has changed is checked, and that the export is the model."""
    from peft import PeftModel

    tokens = torch.arange(10)[None] + 60
    whole = AutoModelForCausalLM.from_pretrained(export)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    trainer.save_model(folder)
    model = trainer.model.eval()
    if isinstance(model, PeftModel):
        for name, weight in model.get_base_model().named_parameters():
            if "lora" not in name:
                assert torch.equal(weight, whole.get_parameter(name.replace(".base_layer", ""))), name
        again = PeftModel.from_pretrained(whole, folder)
    else:
        changed = [not torch.equal(weight, model.get_parameter(name)) for name, weight in whole.named_parameters()]
        assert all(changed)
        again = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = again.eval()(input_ids=tokens).logits
        # The trainer has turned the state off, without which other sums are rounded.
        torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
        untrained = AutoModelForCausalLM.from_pretrained(export)(tokens).logits
        assert (logits - untrained).abs().max() > 1e-3
    return losses


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "adapters"])
def test_sft(model, lora, export, settings):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(export),
        peft_config=None if lora is None else LoraConfig(**lora),
    )
    losses = trained(trainer, export, settings["output_dir"])
    assert losses[0] == pytest.approx(math.log(260), abs=0.1)  # all tokens alike


@pytest.mark.parametrize("packing", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_sft_without_padding(packing, export, settings):
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(export),
        args=SFTConfig(**settings, **packing),
        train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(export),
    )
    trained(trainer, export, settings["output_dir"])


def test_a_padding_free_batch_has_the_loss_of_the_padded_one(export, settings):
    from trl import SFTConfig, SFTTrainer

    losses = []
    for padding_free in (False, True):
        model = AutoModelForCausalLM.from_pretrained(export, dropout=0.0, initializer_range=0.3)
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings | {"max_steps": 1}, padding_free=padding_free, max_length=None),
            train_dataset=TEXTS,
            processing_class=AutoTokenizer.from_pretrained(export),
        )
        trainer.train()
        losses.append(trainer.state.log_history[0])
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)
    assert losses[1]["grad_norm"] == pytest.approx(losses[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("reference", ["explicit", "implicit", "adapters"])
def test_dpo(model, reference, export, settings):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(export) if reference == "explicit" else None,
        args=DPOConfig(**settings),
        train_dataset=PREFERENCES,
        processing_class=AutoTokenizer.from_pretrained(export),
        peft_config=LoraConfig(**LORA) if reference == "adapters" else None,
    )
    losses = trained(trainer, export, settings["output_dir"])
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)  # the model is its reference yet


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no_reference", "reference"])
def test_grpo(model, beta, export, settings):
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=GRPOConfig(**settings, num_generations=2, max_completion_length=8, beta=beta),
        train_dataset=PROMPTS,
        processing_class=AutoTokenizer.from_pretrained(export),
    )
    trained(trainer, export, settings["output_dir"])
