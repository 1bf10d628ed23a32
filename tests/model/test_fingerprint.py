"""The numbers that tell models apart, and checksums, which see every bit and where it is.

The checksum that accelerators compute is tried too: its arithmetic runs anywhere.
"""

import copy
import gc
import weakref

import pytest
import torch

from bdh import BDHForCausalLM
from bdh.model import fingerprint as fingerprint_module
from bdh.model import weights as weights_module
from bdh.model.fingerprint import fingerprint, identity
from bdh.model.weights import checksum


@pytest.fixture
def digests(monkeypatch):
    """Counts how often weights are read."""
    calls = []
    real = fingerprint_module.digest_of
    monkeypatch.setattr(fingerprint_module, "digest_of", lambda weights: calls.append(1) or real(weights))
    return calls


def test_it_is_the_same_wherever_the_model_was_loaded_from(model, tmp_path):
    expected = fingerprint(model)
    assert len(expected) == 64
    for folder in (tmp_path / "a", tmp_path / "b"):
        model.save_pretrained(folder)
        assert fingerprint(BDHForCausalLM.from_pretrained(folder)) == expected
    assert fingerprint(copy.deepcopy(model)) == expected


def test_what_does_not_change_the_function_does_not_count(make_model):
    expected = fingerprint(make_model(rope_theta=65536))
    for fields in ({"rope_theta": 65536.0}, {"chunk_size": 9}, {"dropout": 0.3}, {"attention_form": "chunked"}):
        assert fingerprint(make_model(**fields)) == expected
    assert fingerprint(make_model(decay=5)) == fingerprint(make_model(decay=[5, 10.0, 20]))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06 there and 1e-05 here"),
        ({"rope_theta": 10_000.0}, "rope_theta is 10000.0 there and 65536.0 here"),
        ({"decay": [5, None, 20]}, "half_lives is ['5.0', 'inf', '20.0'] there and None here"),
        ({"n_layer": 2}, "n_layer is 2 there and 3 here"),
        ({"vocab_size": 62}, "vocab_size is 62 there and 61 here"),
        ({"seed": 1}, "the same configuration with other weights"),
    ],
)
def test_another_function_has_another_one_and_the_difference_is_told(make_model, fields, told):
    here, there = identity(make_model()), identity(make_model(**fields))
    assert here.fingerprint != there.fingerprint
    assert told in here.difference(there)
    assert here.difference(here) == ""


def test_every_weight_counts_to_the_last_bit(model):
    seen = {fingerprint(model)}
    parameters = list(model.parameters())
    for parameter in parameters:
        with torch.no_grad():
            last = parameter.view(-1)[-1:]
            last.copy_(torch.nextafter(last, torch.tensor(torch.inf)))
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(parameters)


def test_the_type_of_the_weights_counts(model):
    assert fingerprint(copy.deepcopy(model).bfloat16()) != fingerprint(model)


def test_weights_are_read_once_and_again_when_they_change(model, digests):
    first = fingerprint(model)
    assert [fingerprint(model), fingerprint(model)] == [first, first]
    assert len(digests) == 1
    with torch.no_grad():
        model.embed.weight[3, 3] += 1
    changed = fingerprint(model)
    assert changed != first
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    assert fingerprint(model) not in (first, changed)
    assert len(digests) == 3


def test_weights_whose_changes_nobody_counts_are_read_each_time(make_model):
    with torch.inference_mode():
        model = make_model()
        first = fingerprint(model)
        model.embed.weight[3, 3] += 1
        assert fingerprint(model) != first


def test_a_model_is_not_kept_alive(make_model):
    model = make_model()
    fingerprint(model)
    known = weakref.ref(model)
    del model
    gc.collect()
    assert known() is None


def by_host(tensor):
    return checksum([tensor])


def by_accelerator(tensor):
    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    return tuple(weights_module.word_sums(content).tolist())


on_both = pytest.mark.parametrize("of", [by_host, by_accelerator])
in_parts = pytest.mark.usefixtures("short_parts")


@pytest.fixture
def short_parts(monkeypatch):
    """So that a tensor has several of them, and the last is not full."""
    monkeypatch.setattr(weights_module, "WORDS_AT_ONCE", 16)


@in_parts
@on_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_every_bit_counts(of, dtype):
    tensor = torch.arange(45).to(dtype)
    seen = {of(tensor)}
    bits = tensor.view(torch.uint8)
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            seen.add(of(tensor))
            bits[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(bits)
    assert of(tensor.clone()) == of(tensor)


@in_parts
@on_both
def test_changes_that_cancel_out_in_a_plain_sum_are_seen(of):
    tensor = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    changed = [tensor, -tensor, tensor.flip(0), tensor.flip(1), tensor.roll(1), torch.cat([tensor[4:], tensor[:4]])]
    two = tensor.clone()
    two[0, 0], two[0, 1] = -two[0, 0], -two[0, 1]
    assert len({of(each) for each in [*changed, two]}) == len(changed) + 1


@in_parts
@on_both
def test_the_order_in_memory_does_not_count(of):
    tensor = torch.randn(8, 12)
    assert of(tensor) == of(tensor.t().contiguous().t())


def test_several_tensors_count_in_their_order():
    a, b = torch.ones(3), torch.zeros(3)
    assert checksum([a, b]) != checksum([b, a])
    assert checksum([a, b]) == checksum([torch.cat([a, b])])  # shapes are for the caller to compare
    assert checksum([]) == checksum([torch.ones(0)])


def test_what_has_no_content_is_refused():
    with pytest.raises(ValueError, match="no content"):
        checksum([torch.ones(3, device="meta")])


def test_a_parameter_made_in_inference_mode_can_be_read():
    with torch.inference_mode():
        weight = torch.ones(3)
    assert checksum([weight]) == checksum([torch.nn.Parameter(torch.ones(3))])
