"""The number that tells models apart: equal for the same function, different for any other."""

import copy
import gc

import pytest
import torch

from bdh import BDHForCausalLM
from bdh.model import fingerprint as fingerprint_module
from bdh.model.fingerprint import fingerprint, identity


@pytest.fixture
def digests(monkeypatch):
    """Counts how often weights are read."""
    calls = []
    real = fingerprint_module._digest
    monkeypatch.setattr(fingerprint_module, "_digest", lambda weights: calls.append(1) or real(weights))
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
    gc.collect()
    before = len(fingerprint_module._known)
    model = make_model()
    fingerprint(model)
    assert len(fingerprint_module._known) == before + 1
    del model
    gc.collect()
    assert len(fingerprint_module._known) == before
