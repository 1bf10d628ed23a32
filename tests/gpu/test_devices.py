"""What runs on a GPU gives what it gives on the CPU.

Each test runs on the CPU as well, against another path there, which shows that the test itself is right.
``pytest -m gpu`` chooses those that need a GPU. In float64 the same numbers are added in another order, for which 1e-9 is
ample; so whether a neuron fires is the same on both devices.
"""

import copy
from functools import partial

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.generate.snapshot import Snapshot
from bdh.model import forward
from bdh.model.fake_quantized import FakeQuantizedLinear
from bdh.ops.blocks.plan import LayerOptions
from bdh.ops.formats import rounded
from tests.train.conftest import losses, weights

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
FORMS = [("torch", "auto"), ("torch", "chunked"), ("plain", "parallel"), ("plain", "chunked"), ("plain", "recurrent")]


def moved(model, device, path="auto", **options):
    """A copy on the device, with these options of the layer."""
    found = copy.deepcopy(model).to(device)
    found.layer_options = LayerOptions(path=path, **options)
    return found


def step(model, tokens, **arguments):
    """Loss, logits, state and gradients of a training step, on the CPU."""
    device = model.embed.weight.device
    arguments = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    output = model(tokens.to(device), labels=tokens.to(device), use_cache=True, **arguments)
    output.loss.backward()
    assert output.logits.device.type == device.type
    found = {"loss": output.loss, "logits": output.logits}
    found |= {f"sums {index}": sums for index, sums in enumerate(output.cache.sums)}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def padding():
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    return {"attention_mask": mask}


def documents():
    starts = torch.zeros(2, 21, dtype=torch.bool)
    starts[0, [3, 4, 12]] = starts[1, 8] = True
    return {"document_starts": starts}


@pytest.mark.parametrize(("path", "form"), FORMS)
@pytest.mark.parametrize("arguments", [dict, padding, documents], ids=["whole", "padding", "documents"])
@pytest.mark.parametrize("decay", [None, [2.0, None, 40.0]], ids=["", "decay"])
def test_outputs_state_and_gradients_of_every_form(make_model, tokens, device, path, form, arguments, decay):
    model = make_model(decay=decay).double().train()
    expected = step(moved(model, "cpu", "plain"), tokens, attention_form="parallel", **arguments())
    found = step(moved(model, device, path), tokens, attention_form=form, **arguments())
    assert_close(found, expected)


@pytest.mark.parametrize(
    "options",
    [{"recompute": "none"}, {"recompute": "pass"}, {"rows_per_block": 1, "tokens_per_block": 8}],
    ids=["kept", "recomputed", "blocks"],
)
def test_dropout_drops_the_same_neurons(make_model, tokens, device, monkeypatch, options):
    """From the same seed, which each device draws from its own generator."""
    monkeypatch.setattr(forward, "draw_seeds", lambda count, on: torch.arange(2**40, 2**40 + count).to(on))
    model = make_model(dropout=0.3).double().train()
    expected = step(moved(model, "cpu", "torch"), tokens)
    assert_close(step(moved(model, device, "torch", **options), tokens), expected)


def test_a_step_in_float32(make_model, tokens, device):
    """Sums of some hundred terms of 24 bits, through three layer steps. A neuron that is within rounding of 0 may fire on one device
    alone; of the 10,000 of this batch, one would be a share of the gradients of sqrt(1e-4)."""
    model = make_model().train()
    expected = step(moved(model, "cpu").double(), tokens)
    for name, found in step(moved(model, device, "torch"), tokens).items():
        assert (found.double() - expected[name]).norm() < 1e-2 * expected[name].norm(), name


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("path", ["torch", "plain"])
def test_a_step_under_autocast_with_a_loss_scale(make_model, tokens, device, path, dtype, bits):
    """A product rounds each factor by up to 2^-bits, and there are about ten one after the other. Of the neurons, that share is
    within rounding of 0 and passes a gradient in one precision alone: an error of its square root, in each of three layer steps.
    The scale is halved until nothing overflows, as in a training."""
    rounding = 2.0**-bits
    model = make_model().train()
    expected = step(moved(model, "cpu", "plain"), tokens)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    trained = moved(model, device, path)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = trained(tokens.to(device), labels=tokens.to(device)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() == scale:
            break
    assert abs(loss.item() - expected["loss"].item()) < 10 * rounding * expected["loss"].item()
    for name, parameter in trained.named_parameters():
        assert parameter.grad.isfinite().all(), name
        difference = (parameter.grad.cpu() - expected[name]).norm() / expected[name].norm()
        assert difference < 3 * rounding**0.5, (name, difference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_weights_read_and_continue(make_model, tokens, device, dtype):
    """The bound of tests/ops/test_float16.py: the weights themselves are rounded, to 8 and to 11 bits."""
    model = make_model()
    half = moved(model, device).to(dtype)
    with torch.no_grad():
        expected = model(tokens).logits[:, -1]
        read = half(tokens[:, :-2].to(device), use_cache=True)
        rest = {"cache": read.cache, "attention_form": "recurrent"}
        found = half(tokens[:, -2:].to(device), **rest).logits[:, -1]
    assert found.dtype == dtype
    difference = (found.float().cpu() - expected).norm() / expected.norm()
    assert difference < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("decay", [None, 5.0], ids=["", "decay"])
def test_generate_writes_the_same_tokens(make_model, tokens, device, decay):
    model = make_model(decay=decay).double()
    expected = copy.deepcopy(model).generate(tokens, max_new_tokens=20, do_sample=False, use_cache=False)
    found = moved(model, device).generate(tokens.to(device), max_new_tokens=20, do_sample=False)
    assert found.cpu().tolist() == expected.tolist()


def test_a_cache_moves_between_devices(make_model, tokens, device):
    model = make_model().double()
    there = moved(model, device)
    with torch.no_grad():
        expected = model(tokens).logits[:, 9:]
        state = model(tokens[:, :9], use_cache=True).cache.to(device)
        middle = there(tokens[:, 9:15].to(device), cache=state)
        last = model(tokens[:, 15:], cache=middle.cache.to("cpu"))
    assert_close(torch.cat([middle.logits.cpu(), last.logits], 1), expected)


PROMPTS = ["T", "The cat", "sat on the mat and ate some fish. " * 3, "A dog"]


@pytest.mark.parametrize("window", [None, 12], ids=["", "window"])
def test_the_engine_writes_in_a_batch_what_the_cpu_writes_alone(byte_model, tokenizer, device, window):
    """In float64, where the logits are equal to rounding, so that also what is drawn is the same."""
    model = byte_model.double()
    requests = [(prompt, SamplingParams(max_tokens=12, seed=n, temperature=n % 2)) for n, prompt in enumerate(PROMPTS)]
    config = EngineConfig(path="torch", window=window)
    alone = [Engine(model, tokenizer, config=config).generate(*request)[0][0].token_ids for request in requests]
    config = EngineConfig(path="torch", window=window, tokens_per_step=16, max_running=3)
    engine = Engine(moved(model, device), tokenizer, config=config)
    numbers = [engine.add_request(*request) for request in requests]
    found = {}
    while engine.has_work:
        found |= {o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None}
    assert [found[number] for number in numbers] == alone


@pytest.mark.parametrize("window", [None, 6], ids=["", "window"])
def test_a_snapshot_moves_to_another_device_and_back(make_model, tmp_path, device, window):
    """Saved on the CPU, continued on the device, saved there and continued on the CPU."""
    here, text = make_model().double(), [5, 17, 60, 3, 8, 9, 41, 2, 33, 12]
    there = moved(here, device)
    advancer = Advancer(here, path="torch", window=window)
    (expected,) = advancer.advance([StepInput(advancer.new_state(), text, logits="all")])
    state, found = advancer.new_state(), []
    for number, (model, end) in enumerate([(here, 4), (there, 7), (here, 10)]):
        advancer = Advancer(model, path="torch", window=window)
        (logits,) = advancer.advance([StepInput(state, text[state.position : end], logits="all")])
        found.append(logits)
        Snapshot(state, text[:end], logits[-1]).save(tmp_path / str(number), model)
        next_model = there if model is here else here
        state = Snapshot.load(tmp_path / str(number), next_model).state
        assert {tensor.device.type for many in state.tensors.values() for tensor in many} == {next_model.device.type}
    # The advancer's logits are float32, whose numbers are 6e-8 apart.
    assert_close(torch.cat(found), expected, rtol=1e-6, atol=1e-6)


STEPS = {"train.max_steps": 6, "train.eval_every_steps": 3, "train.sample_every_steps": 3, "checkpoint.every_steps": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_training_that_was_stopped_is_to_the_bit_the_one_that_was_not(train, tmp_path, device, dtype):
    """The suite has torch take its deterministic forms, and no form depends on where the run was stopped."""
    same = {**STEPS, "train.device": device, "train.dtype": dtype, "train.layer_path": "torch"}
    assert train(tmp_path / "whole", **same) == 0
    assert train(tmp_path / "stopped", **same, **{"train.stop_at_step": 3}) == 0
    assert train(tmp_path / "stopped", "--resume", **same) == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert losses(tmp_path / "stopped", "val/loss") == losses(tmp_path / "whole", "val/loss")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(tmp_path / "stopped").items())


def test_a_training_has_the_losses_of_one_on_the_cpu(train, tmp_path, device):
    """In six steps rounding, of 24 bits, has not grown to more than 1e-4: it takes fifty to grow a hundredfold."""
    same = {**STEPS, "train.dtype": "float32", "model.dropout": 0.0}
    assert train(tmp_path / "here", **same, **{"train.device": "cpu", "train.layer_path": "plain"}) == 0
    assert train(tmp_path / "there", **same, **{"train.device": device, "train.layer_path": "torch"}) == 0
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), rel=1e-4)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_weights_are_rounded_to_the_same_codes_to_the_bit(device, format):
    """Else the export of a model that was trained for a format on a GPU, which the CPU rounds, would be another."""
    weight = torch.randn(3000, 96, generator=torch.Generator().manual_seed(0))
    on_device = FakeQuantizedLinear(torch.nn.Parameter(weight.to(device)), format)
    assert torch.equal(on_device.rounded().cpu(), rounded(weight, format).dequantized())
