"""torchao and bitsandbytes quantize the model while it is loaded; it generates, is saved, and is loaded by a fresh process."""

import io
import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from bdh import BDHConfig, BDHForCausalLM
from bdh.cli.main import main
from bdh.generate.advance import Advancer, StepInput
from bdh.model.conversion import average_weights
from bdh.model.fingerprint import fingerprint
from bdh.quantize import quantize
from bdh.tokenizer import byte_tokenizer
from bdh.unneeded_lines import hide_unneeded_lines

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

# By how much of their standard deviation the logits of the model below differ from float32's, in the mean. Its layer steps
# are few and its weights random: it is for finding what is broken, and a trained model differs less.
ALLOWED = {
    "torchao int8 weight-only": 0.03,
    "torchao int8 dynamic": 0.04,
    "torchao int4": 0.35,
    "bitsandbytes int8": 0.04,
    "bitsandbytes nf4": 0.35,
    "bitsandbytes fp4": 0.45,
}
IN_A_FRESH_PROCESS = """
import json, logging, sys
logging.disable()
import bdh
import torch
from transformers import AutoModelForCausalLM
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(97, 117)[None]
    text = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    found[name] = [text[0].tolist(), model(ids).logits.tolist()]
print(json.dumps(found))
"""


def config_of(name, **options):
    if name == "torchao int8 weight-only":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "torchao int8 dynamic":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    if name == "torchao int4":
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    if name == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind = name.removeprefix("bitsandbytes ")
    compute = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **(compute | options))


@pytest.fixture(scope="module", autouse=True)
def quiet():
    hide_unneeded_lines()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small model of bytes, and its folder."""
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 2, "mlp_internal_dim_multiplier": 16, "vocab_size": 256}
    model = BDHForCausalLM(BDHConfig(**sizes, initializer_range=0.1)).eval()
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def quantized(plain, tmp_path_factory):
    """By format: the model as it was loaded, and the folder that it was saved in."""
    found = {}
    for name in ALLOWED:
        model = AutoModelForCausalLM.from_pretrained(plain[1], quantization_config=config_of(name))
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        found[name] = model, folder
    return found


@pytest.fixture(scope="module")
def loaded_again(quantized):
    folders = json.dumps({name: str(folder) for name, (_, folder) in quantized.items()})
    run = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS, folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALLOWED)
def test_it_generates_and_a_fresh_process_continues_from_the_saved_one_with_the_same_tokens(
    plain, quantized, loaded_again, name
):
    model, _ = quantized[name]
    ids = torch.arange(97, 117)[None]
    with torch.no_grad():
        logits, expected = model(ids).logits, plain[0](ids).logits
    assert logits.isfinite().all()
    difference = (logits - expected).std() / expected.std()
    assert 0.001 < difference < ALLOWED[name]
    text = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    again, its_logits = loaded_again[name]
    assert text[0].tolist() == again
    torch.testing.assert_close(torch.tensor(its_logits), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALLOWED)
def test_the_layer_is_converted_and_the_ends_are_not(quantized, name):
    library = name.split()[0]
    model, _ = quantized[name]
    of_layer = [model.encoder, *model.encoder_v, model.decoder]
    for module in of_layer:
        classes = {type(module).__module__, type(module.weight).__module__}
        assert any(each.startswith(library) for each in classes)
    for module in (model.embed, model.lm_head):
        assert type(module.weight) is torch.nn.Parameter
        assert module.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchao int8 weight-only", "torchao int8 dynamic", "bitsandbytes int8", "bitsandbytes nf4"]
)
def test_in_bfloat16_the_logits_are_finite_and_close(plain, name):
    """What users of quantized models complain of is NaN."""
    ids = torch.arange(97, 117)[None]
    options = {"bnb_4bit_compute_dtype": torch.bfloat16} if name == "bitsandbytes nf4" else {}
    config = config_of(name, **options)
    model = AutoModelForCausalLM.from_pretrained(plain[1], quantization_config=config, dtype=torch.bfloat16)
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), plain[0](ids).logits
    assert logits.isfinite().all()
    assert (logits - expected).std() / expected.std() < ALLOWED[name] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8 weight-only", "bitsandbytes int8"])
def test_commands_take_its_folder_and_say_which_path_runs(quantized, name, tmp_path, capsys, monkeypatch):
    library = name.split()[0]
    folder = str(quantized[name][1])
    assert main(["generate", folder, "--prompt", "abc", "--max_new_tokens", "3"]) == 0
    reason = (
        f"a layer is quantized by {library}, which the kernels cannot read: int8 and int4 of bdh quantize are faster"
    )
    shown = capsys.readouterr().err
    assert f"steps by torch on cpu, weights {library}, dense recurrent steps ({reason})" in shown
    (tmp_path / "a.txt").write_text("A text. " * 20)
    assert main(["eval", folder, f"--data.source={tmp_path / 'a.txt'}", "--part=all"]) == 0
    assert "Failed to load" not in shown + capsys.readouterr().err
    for command in (["generate", folder, "--prompt=abc", "--engine.weights=int8"], ["chat", folder, "--weights=int8"]):
        assert main(command) == 2
        assert f"the model's weights are stored in another format, {library}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8 weight-only", "bitsandbytes int8", "bitsandbytes nf4"])
def test_a_chat_with_it_is_saved_and_continued_and_the_plain_model_refuses_it(
    plain, quantized, name, tmp_path, capsys, monkeypatch
):
    def chat(folder, *lines):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return main(["chat", str(folder), "--temperature=0", "--max_tokens=4"]), capsys.readouterr()

    folder, file = quantized[name][1], tmp_path / "saved"
    saved, once = chat(folder, "hi", f"/save {file}", "ho")
    loaded, again = chat(folder, f"/load {file}", "ho")
    assert saved == loaded == 0
    assert again.out.splitlines()[-1] == once.out.splitlines()[-1]
    status, shown = chat(plain[1], f"/load {file}")
    assert status == 2
    assert "snapshot of another model" in shown.err


@pytest.mark.slow
def test_batches_of_the_engine_are_finite_and_those_of_each_alone(quantized):
    """A row's scale in dynamic quantization is that of a token, not of a batch."""
    advancer = Advancer(quantized["torchao int8 dynamic"][0])
    states = [advancer.new_state() for _ in range(3)]
    texts = [[97, 98, 99], [100], [101, 102]]
    together = advancer.advance([StepInput(state, text) for state, text in zip(states, texts, strict=True)])
    for text, logits in zip(texts, together, strict=True):
        (alone,) = advancer.advance([StepInput(advancer.new_state(), text)])
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_int4_weight_only_of_torchao_runs_on_no_cpu(plain, caplog):
    """So int4 of torchao is here what it can do on one: codes of 4 bits that are stored in 8."""
    from torchao.quantization import Int4WeightOnlyConfig

    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="plain_int32"))
    with (
        caplog.at_level(logging.CRITICAL, "transformers"),
        pytest.raises(RuntimeError, match="conversion of the weights"),
    ):
        AutoModelForCausalLM.from_pretrained(plain[1], quantization_config=config)


@pytest.mark.slow
def test_int4_of_torchaos_prototypes_cannot_be_saved(plain, tmp_path):
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    config = TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32))
    model = AutoModelForCausalLM.from_pretrained(plain[1], quantization_config=config)
    with torch.no_grad():
        assert model(torch.arange(97, 117)[None]).logits.isfinite().all()
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        model.save_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("repacks", [False, True])
def test_4_bit_weights_of_bitsandbytes_are_the_same_when_they_are_saved_after_their_use(plain, tmp_path, repacks):
    """Once it has repacked them for processors with bfloat16 in AVX-512, it changes them when they are saved. Where this
    fails with ``repacks`` it has been mended: take :func:`bdh.model.quantization.keep_as_saved` away."""
    from bitsandbytes.functional import dequantize_4bit, has_avx512bf16

    model = AutoModelForCausalLM.from_pretrained(plain[1], quantization_config=config_of("bitsandbytes nf4"))

    def decoder_of(model):
        weight = model.decoder.weight
        return dequantize_4bit(weight.data, weight.quant_state)

    for module in model.modules():
        if repacks and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
    before = decoder_of(model)
    with torch.no_grad():
        model(torch.arange(97, 117)[None])
    model.save_pretrained(tmp_path)
    after = decoder_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    difference = (after - before).norm() / before.norm()
    assert difference == 0 if not (repacks and has_avx512bf16()) else difference > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ALLOWED)
def test_snapshots_know_the_model(quantized, name, tmp_path):
    """A tensor of torchao has no bytes of its own to compute a fingerprint of."""
    model, folder = quantized[name]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert fingerprint(model) == fingerprint(again)
    others = {fingerprint(other) for its_name, (other, _) in quantized.items() if its_name != name}
    # Weight-only and dynamic have the same codes and scales.
    assert len({fingerprint(model)} & others) <= (name.startswith("torchao int8"))
    advancer = Advancer(model)
    assert advancer.weight_format == name.split()[0]
    with pytest.raises(ValueError, match=f"must be left out: .* stored in another format, {name.split()[0]}"):
        Advancer(model, weights="int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8 weight-only", "bitsandbytes int8", "bitsandbytes nf4"])
def test_what_needs_plain_weights_refuses_it_by_name(plain, quantized, name, tmp_path, capsys):
    library, (model, folder) = name.split()[0], quantized[name]
    out = str(tmp_path / "out")
    for command in (
        ["bench", "decode", "--quick", f"--model={folder}"],
        ["quantize", str(folder), out],
        ["average", str(plain[1]), str(folder), f"--out={out}"],
        ["average", str(folder), str(folder), f"--out={out}"],
        ["convert", str(folder), out, "--to-reference"],
        ["train", f"--run_dir={out}", f"--train.init_from={folder}"],
        ["train", f"--run_dir={out}", f"--train.init_from={folder}", "--train.lora.r=2"],
    ):
        assert main(command) == 2
        assert f"error: {folder} has weights that {library} has quantized: " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"the model has weights that {library} has quantized"):
        quantize(model, "int8")
    with pytest.raises(ValueError, match=f"weights that {library} has quantized: convert the unquantized model"):
        model.to_reference()
    with pytest.raises(ValueError, match="model 2 has quantized weights, which cannot be averaged: decoder"):
        average_weights([plain[0].state_dict(), model.state_dict()])
