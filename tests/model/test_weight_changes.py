"""Text is generated with the weights that the model has now, whichever way they came to be changed.

The sparse kernels keep copies of weights, and autograd's version counter does not see most of these ways: samples of a
training were drawn with the encoder of one step and the decoder of another.
"""

import copy
import gc
import multiprocessing
import sys
import threading
import weakref

import peft
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.chat import Conversation
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.model import weights as weights_module
from bdh.model.fingerprint import fingerprint
from bdh.model.weights import forget_kernels, recurrence_of

PROMPT = [5, 17, 3, 60, 2, 2, 41]


def set_data(model):
    model.decoder.weight.data.mul_(-1)


def ablate_through_data(model):
    """One neuron of one head no longer writes."""
    model.decoder.weight.data[:, 7] = 0


def set_one_number_through_data(model):
    model.decoder.weight.data[3, 11] += 2


def replace_data(model):
    model.decoder.weight.data = model.decoder.weight.data.flip(1).contiguous()


def copy_under_no_grad(model):
    with torch.no_grad():
        model.decoder.weight.copy_(model.decoder.weight.flip(0))


def set_storage(model):
    with torch.no_grad():
        model.decoder.weight.set_(model.decoder.weight.detach().flip(1).contiguous())


def swap_tensors(model):
    torch.utils.swap_tensors(model.decoder.weight, nn.Parameter(model.decoder.weight.detach().flip(1)))


def through_a_view(model):
    model.decoder.weight.detach().view(-1)[5:50].neg_()


def through_numpy(model):
    model.decoder.weight.detach().numpy()[:] *= -1


def new_parameter(model):
    model.decoder.weight = nn.Parameter(model.decoder.weight.detach().flip(0))


def load(model):
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: tensor * 0.9 for name, tensor in model.state_dict().items()}, assign=True)


def merge_adapters(model):
    """peft adds them through ``.data``."""
    config = peft.LoraConfig(r=2, target_modules=["encoder", "decoder"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


def swap_halves(model):
    """The same numbers elsewhere: no sum of them can tell."""
    halves = model.decoder.weight.data.chunk(2, dim=1)
    model.decoder.weight.data.copy_(torch.cat([halves[1], halves[0]], dim=1))


WAYS = [
    set_data,
    ablate_through_data,
    set_one_number_through_data,
    replace_data,
    copy_under_no_grad,
    set_storage,
    swap_tensors,
    through_a_view,
    through_numpy,
    new_parameter,
    load,
    load_assigned,
    merge_adapters,
    swap_halves,
]


@torch.no_grad()
def by_argmax(model, count=12):
    """The greedy continuation without a state: every token from the whole text."""
    text = list(PROMPT)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(PROMPT) :]


def by_generate(model, count=12):
    ids = torch.tensor([PROMPT])
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)[
        0, len(PROMPT) :
    ].tolist()


def by_advancer(advancer, count=12):
    state, text = advancer.new_state(), []
    logits = advancer.advance([StepInput(state, PROMPT)])[0]
    for _ in range(count):
        text.append(int(logits.argmax()))
        logits = advancer.advance([StepInput(state, text[-1:])])[0]
    return text


def agrees(model, *advancers):
    expected = by_argmax(model)
    assert by_generate(model) == expected
    for advancer in advancers:
        assert by_advancer(advancer) == expected
    return expected


@pytest.mark.parametrize("change", WAYS)
def test_a_new_text_has_the_weights_of_now(model, change):
    advancers = [Advancer(model, path="kernels"), Advancer(model, path="kernels", window=64)]
    agrees(model, *advancers)
    change(model)
    agrees(model, *advancers)


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "mixed"])
def test_a_text_goes_on_with_the_weights_of_now(model, change, storage):
    """At the very token: the state has been read with other weights, what comes has not."""
    advancer = Advancer(model, weights=storage, path="kernels")
    state = advancer.new_state()
    advancer.advance([StepInput(state, PROMPT)])
    advancer.advance([StepInput(state, [9])])
    change(model)
    expected = Advancer(copy.deepcopy(model), weights=storage, path="kernels").advance([StepInput(state.clone(), [4])])[
        0
    ]
    assert torch.equal(advancer.advance([StepInput(state, [4])])[0], expected)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "mixed"])
def test_a_single_number_of_a_large_matrix_is_found_within_128_tokens(model, storage, monkeypatch):
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 64)  # so that these count as large ones
    advancer = Advancer(model, weights=storage, path="kernels")
    state = advancer.new_state()
    advancer.advance([StepInput(state, PROMPT)])
    set_one_number_through_data(model)
    for _ in range(128):
        advancer.advance([StepInput(state, [4])])
    expected = Advancer(copy.deepcopy(model), weights=storage, path="kernels").advance([StepInput(state.clone(), [4])])[
        0
    ]
    assert torch.equal(advancer.advance([StepInput(state, [4])])[0], expected)


@pytest.mark.parametrize("change", WAYS)
def test_a_prompt_within_a_text_has_the_weights_of_now(model, change):
    """As the next turn of a conversation is."""
    advancer = Advancer(model, path="kernels")
    state = advancer.new_state()
    advancer.advance([StepInput(state, PROMPT)])
    advancer.advance([StepInput(state, [9])])
    change(model)
    expected = Advancer(copy.deepcopy(model), path="kernels").advance([StepInput(state.clone(), PROMPT)])[0]
    assert torch.equal(advancer.advance([StepInput(state, PROMPT)])[0], expected)


OPTIMIZERS = {
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, fused=True),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, foreach=False),
    "Adam fused": lambda parameters: torch.optim.Adam(parameters, lr=0.02, fused=True),
    "SGD fused": lambda parameters: torch.optim.SGD(parameters, lr=0.5, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5, foreach=False),
    "Adagrad fused": lambda parameters: torch.optim.Adagrad(parameters, lr=0.02, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_samples_of_a_training_have_the_weights_of_their_step(model, tokens, name):
    optimizer = OPTIMIZERS[name](model.parameters())
    advancer = Advancer(model, path="kernels")
    known, seen = set(), set()
    for _ in range(8):
        model.train()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        seen.add(tuple(agrees(model, advancer)))
        known.add(fingerprint(model))
    assert len(seen) > 1  # so that weights of an earlier step would have shown
    assert len(known) == 8


def test_the_smallest_step_of_an_optimizer_is_seen_in_the_middle_of_a_text(model, tokens):
    """One weight moves by its last bit, and no counter: the optimizer itself says that it has stepped."""
    model.requires_grad_(False)
    last = model.decoder.weight.requires_grad_(True)
    advancer = Advancer(model, path="kernels")
    state = advancer.new_state()
    advancer.advance([StepInput(state, PROMPT)])
    last.grad = torch.zeros_like(last)
    last.grad[-1, -1] = 1
    torch.optim.SGD([last], lr=0.5, fused=True).step()
    expected = Advancer(copy.deepcopy(model), path="kernels").advance([StepInput(state.clone(), [4])])[0]
    assert torch.equal(advancer.advance([StepInput(state, [4])])[0], expected)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_an_engine_forgets_prefixes_that_other_weights_have_read(byte_model, tokenizer, path):
    engine = Engine(byte_model, tokenizer, config=EngineConfig(path=path, prefix_cache_bytes=1 << 24))
    params = SamplingParams(temperature=0, max_tokens=10)
    prompt = "a long beginning that is worth keeping " * 4
    first = engine.generate(prompt, params)[0][0]
    assert engine.generate(prompt, params)[0][0].num_cached_tokens > 0
    set_one_number_through_data(byte_model)
    set_data(byte_model)
    changed = engine.generate(prompt, params)[0][0]
    assert changed.num_cached_tokens == 0
    fresh = Engine(copy.deepcopy(byte_model), tokenizer, config=EngineConfig(path=path))
    assert changed.token_ids == fresh.generate(prompt, params)[0][0].token_ids != first.token_ids


@pytest.mark.parametrize("change", WAYS)
def test_other_weights_have_another_fingerprint(model, change):
    before = fingerprint(model)
    change(model)
    after = fingerprint(model)
    assert after != before
    assert after == fingerprint(copy.deepcopy(model))


def _negate(weight):
    weight.data.neg_()


@pytest.mark.slow
def test_another_process_changes_weights_in_shared_memory(model):
    model.share_memory()
    advancer = Advancer(model, path="kernels")
    first, known = agrees(model, advancer), fingerprint(model)
    process = multiprocessing.get_context("spawn").Process(target=_negate, args=(model.decoder.weight,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert agrees(model, advancer) != first
    assert fingerprint(model) != known


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_those_of_their_step(make_model, tokens, one_process_group):
    model, plain = make_model(), make_model()
    fully_shard(model, mesh=one_process_group)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.02, fused=True) for each in (model, plain)]
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            each.train()
            each(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            each.eval()
        model.unshard()
        assert by_advancer(Advancer(model, path="kernels")) == by_argmax(plain)
        model.reshard()


def test_copies_are_kept_while_nothing_changes(model):
    first = recurrence_of(model)
    for is_prompt in (True, False) * 40:
        assert recurrence_of(model, is_prompt=is_prompt) is first


def test_constants_of_the_configuration_count(make_model):
    model = make_model()
    advancer = Advancer(model, path="kernels")
    by_advancer(advancer)
    model.config.layer_norm_eps = 0.5
    assert by_advancer(advancer) == by_advancer(Advancer(make_model(layer_norm_eps=0.5), path="kernels"))


def test_a_layer_that_is_no_longer_its_weight_alone_is_refused(model):
    """An adapter or a hook that came after the advancer was left out without a word."""
    advancer = Advancer(model, path="kernels")
    by_advancer(advancer)
    handle = model.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a layer has hooks"):
        advancer.advance([StepInput(advancer.new_state(), PROMPT)])
    handle.remove()
    by_advancer(advancer)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["decoder"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"not a plain nn\.Linear"):
        advancer.advance([StepInput(advancer.new_state(), PROMPT)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_tied_weights_is_compared_too(model, dtype):
    """The head's copy was taken for the embedding's memory, and never looked at again."""
    model.to(dtype).lm_head.weight = model.embed.weight
    advancer = Advancer(model, weights="bfloat16", path="kernels")
    by_advancer(advancer)
    model.embed.weight.data.mul_(-3)
    expected = Advancer(copy.deepcopy(model), weights="bfloat16", path="kernels")
    assert torch.equal(*(each.advance([StepInput(each.new_state(), PROMPT)])[0] for each in (advancer, expected)))


def test_the_same_memory_in_another_order_is_other_weights(make_model):
    model = make_model(n_embd=24, n_head=2, mlp_internal_dim_multiplier=2)
    advancer = Advancer(model, path="kernels")
    by_advancer(advancer)
    weight = model.encoder_v[0].weight
    assert weight.shape == (24, 24)
    weight.data = weight.data.t()
    agrees(model, advancer)


def test_a_neuron_of_a_decoder_in_pieces_is_found_at_its_token(make_model, monkeypatch):
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 64)
    model = make_model(n_embd=12)
    advancer = Advancer(model, path="kernels")
    state = advancer.new_state()
    advancer.advance([StepInput(state, PROMPT)])
    for neuron in range(20):
        advancer.advance([StepInput(state, [9])])
        model.decoder.weight.data[:, neuron] += 1
        expected = Advancer(copy.deepcopy(model), path="kernels").advance([StepInput(state.clone(), [4])])[0]
        assert torch.equal(advancer.advance([StepInput(state, [4])])[0], expected)


def test_weights_of_before_are_not_kept_in_memory(model):
    by_advancer(Advancer(model, weights="bfloat16", path="kernels"))
    former = weakref.ref(model.decoder.weight.untyped_storage())
    model.double()
    gc.collect()
    assert former() is None


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_a_prefix_read_with_a_mixture_of_weights_is_not_stored(byte_model, tokenizer, path):
    """As where a moving average is swapped in and out again between two steps of a prompt."""
    engine = Engine(
        byte_model, tokenizer, config=EngineConfig(path=path, prefix_cache_bytes=1 << 24, tokens_per_step=32)
    )
    params = SamplingParams(temperature=0, max_tokens=5)
    first = {name: tensor.clone() for name, tensor in byte_model.state_dict().items()}
    engine.add_request("a beginning " * 8, params)
    engine.step()
    byte_model.load_state_dict({name: -tensor for name, tensor in first.items()})
    engine.step()
    byte_model.load_state_dict(first)
    while engine.has_work:
        engine.step()
    fresh = Engine(copy.deepcopy(byte_model), tokenizer, config=EngineConfig(path=path))
    expected = fresh.generate("a beginning " * 8, params)[0][0].token_ids
    assert engine.generate("a beginning " * 8, params)[0][0].token_ids == expected


def test_prefixes_and_conversations_of_other_adapters_are_not_gone_on_with(byte_model, tokenizer):
    # Strong enough to change any text, whatever it is drawn as.
    config = peft.LoraConfig(r=8, lora_alpha=800, target_modules=["decoder"], init_lora_weights=False)
    adapted = peft.get_peft_model(byte_model, config).eval()
    engine = Engine(byte_model, tokenizer, config=EngineConfig(prefix_cache_bytes=1 << 24))
    params = SamplingParams(temperature=0, max_tokens=5)
    prompt = "a beginning that is long enough to be stored with its state " * 2
    with_adapter = engine.generate(prompt, params)[0][0].token_ids
    chat = Conversation(Engine(byte_model, tokenizer), SamplingParams(temperature=0, max_tokens=5), plain=True)
    list(chat.say("Hello"))
    assert not chat._is_stale()
    with adapted.disable_adapter():
        assert chat._is_stale()
        without = engine.generate(prompt, params)[0][0]
        assert without.num_cached_tokens == 0
        fresh = Engine(byte_model, tokenizer, config=EngineConfig())
        assert without.token_ids == fresh.generate(prompt, params)[0][0].token_ids != with_adapter


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_a_snapshot_that_other_weights_have_read_is_read_again(byte_model, tokenizer, path):
    engine = Engine(byte_model, tokenizer, config=EngineConfig(path=path))
    params = SamplingParams(temperature=0, max_tokens=6)

    def completion(**arguments):
        engine.add_request(**arguments)
        while engine.has_work:
            for output in engine.step():
                if output.completion is not None:
                    return output.completion
        raise AssertionError

    begun = completion(prompt="Once upon", params=params, keep_snapshot=True)
    set_data(byte_model)
    found = completion(prompt=None, params=params, snapshot=begun.snapshot).token_ids
    tokens = [*tokenizer("Once upon")["input_ids"], *begun.token_ids]
    assert found == completion(prompt=tokens, params=params).token_ids


def test_optimizers_step_in_one_thread_while_models_come_and_go_in_others(make_model):
    """The list of models changed while it was gone through."""
    model, errors, ends = make_model(), [], threading.Event()
    by_advancer(Advancer(model, path="kernels"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    def come_and_go():
        others = [make_model() for _ in range(20)]
        while not ends.is_set():
            for other in others:
                recurrence_of(other)
                forget_kernels(other)

    thread = threading.Thread(target=come_and_go)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(500):
            optimizer.step()
    except RuntimeError as error:
        errors.append(error)
    finally:
        ends.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []
