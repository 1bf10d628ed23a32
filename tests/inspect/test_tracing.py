import pytest
import torch

from bdh import BDHForSequenceClassification
from bdh.inspect import tracing
from bdh.model.weights import hooked_points
from bdh.ops.eager import HOOK_POINTS
from bdh.tokenizer import byte_tokenizer

from .conftest import D, H, L, N


@pytest.fixture(params=["one piece", "pieces of 5 tokens", "a token at a time"])
def pieces(request, monkeypatch):
    if request.param != "one piece":
        monkeypatch.setattr(tracing, "MAX_BYTES", {"p": 5, "a": 1}[request.param[0]] * H * N * 8)


@pytest.mark.parametrize("decay", [None, [3, 20, None]])
@pytest.mark.parametrize("num_tokens", [1, 63])
@pytest.mark.usefixtures("pieces")
def test_a_trace_is_what_the_equations_give(make_model, ids, computed_plainly, decay, num_tokens):
    model, ids = make_model(decay=decay), ids[:num_tokens]
    expected = computed_plainly(model, ids)
    found = model.trace(ids, HOOK_POINTS)
    for name in HOOK_POINTS:
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=0, atol=1e-6)
    assert found.x.shape == (L, H, num_tokens, N)
    assert found.v.shape == (L + 1, num_tokens, D)
    assert found.positions == tuple(range(num_tokens))
    assert found.tokens == tuple(ids.tolist())


@pytest.mark.usefixtures("pieces")
def test_a_choice_of_positions_heads_and_layer_steps_is_that_of_the_whole(model, ids, computed_plainly):
    expected = computed_plainly(model, ids)
    found = model.trace(ids.tolist(), HOOK_POINTS, positions=[40, 7, -2, 7], heads=[2, 0], layer_steps=[-1, 0])
    assert (found.positions, found.heads, found.layer_steps) == ((40, 7, 61, 7), (2, 0), (2, 0))
    assert found.tokens == tuple(ids[[40, 7, 61, 7]].tolist())
    places = torch.tensor(found.positions)
    for name in "xqayz":
        torch.testing.assert_close(
            getattr(found, name), expected[name][[2, 0]][:, [2, 0]][:, :, places], rtol=0, atol=1e-6
        )
    torch.testing.assert_close(found.v, expected["v"][[0, 3, 1]][:, places], rtol=0, atol=1e-6)
    assert model.trace(ids, "x").y is None


def test_a_text_is_read_in_pieces_whose_wide_tensors_stay_small(model, ids, monkeypatch):
    monkeypatch.setattr(tracing, "MAX_BYTES", 10 * H * N * 8)
    lengths = []
    model.hook_points.x.register_forward_hook(lambda point, inputs, x: lengths.append(x.shape[1]))
    model.trace(ids, ["v"], positions=[33])
    assert lengths == [10] * 3 * L + [4] * L  # what comes after the last token that is kept is not read


def test_a_trace_sees_what_hooks_have_changed(model, ids):
    model.hook_points.x.register_forward_hook(lambda point, inputs, x: torch.zeros_like(x))
    found = model.trace(ids, ["x", "z"])
    assert not found.x.any()
    assert not found.z.any()


def test_a_text_is_encoded_as_it_is(make_model):
    model, tokenizer = make_model(vocab_size=256), byte_tokenizer()
    found = model.trace("Hé", tokenizer=tokenizer)
    assert found.tokens == tuple("Hé".encode())
    assert torch.equal(found.x, model.trace(torch.tensor([list("Hé".encode())])).x)


def test_other_models_have_it_too(make_model, ids):
    model = make_model()
    expected = model.trace(ids).x
    assert torch.equal(model.base_model.trace(ids).x, expected)
    classifier = BDHForSequenceClassification(model.config).double()
    classifier.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(classifier.trace(ids).x, expected)


def test_half_precision_has_its_own_dtypes(make_model, ids):
    found = make_model().bfloat16().trace(ids, HOOK_POINTS)
    assert {name: getattr(found, name).dtype for name in "xav"} == {
        "x": torch.bfloat16,
        "a": torch.float32,
        "v": torch.float32,
    }


def test_the_model_is_left_as_it_was(model, ids, monkeypatch):
    model.train()
    random_state = torch.get_rng_state()
    model.trace(ids)
    monkeypatch.setattr(tracing, "run_layer", lambda *_, **__: pytest.fail("no memory"))
    with pytest.raises(pytest.fail.Exception):
        model.trace(ids)
    assert model.training
    assert hooked_points(model) == {}
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    ("text", "choice", "message"),
    [
        ([1, 2], {"names": ["x", "xy"]}, r"names is xy: must be some of x, q, a, y, z, v"),
        ([1, 2], {"names": []}, r"names is empty"),
        ([1, 2], {"positions": [0, 2]}, r"positions is 2: must be within -2 to 1, of 2 tokens"),
        ([1, 2], {"positions": []}, r"positions is empty"),
        ([1, 2], {"heads": [3]}, r"heads is 3: must be within -3 to 2, of 3 heads"),
        ([1, 2], {"layer_steps": [-4]}, r"layer_steps is -4: must be within -3 to 2, of 3 layer steps"),
        ("text", {}, r"a text is given without its tokenizer"),
        ([], {}, r"shape \(0,\): must be \(tokens,\) of one text, with at least 1 token"),
        ([[1], [2]], {}, r"shape \(2, 1\)"),
        ([0.5], {}, r"torch.float32: must be whole numbers"),
        ([61], {}, r"within 0 to 60"),
    ],
)
def test_what_is_wrong_is_said(model, text, choice, message):
    with pytest.raises(ValueError, match=message):
        model.trace(text, **choice)
    assert hooked_points(model) == {}
