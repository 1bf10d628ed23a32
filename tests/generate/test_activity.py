import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdh.generate.activity import activity_of
from bdh.generate.stepper import Feed, make_stepper
from bdh.ops.eager import layer_norm


def test_the_strongest_come_first_and_only_those_that_fire():
    x = np.array([0, 3, 0, 5, 3, 0.5], np.float32)
    found = activity_of(x, 3)
    assert (found.fired, found.neurons, found.values) == (4 / 6, [3, 1, 4], [5.0, 3.0, 3.0])
    assert activity_of(x, 60).neurons == [3, 1, 4, 5]
    assert activity_of(x, 0).neurons == []
    nothing = activity_of(np.zeros(4, np.float32), 2)
    assert (nothing.fired, nothing.neurons) == (0, [])


@pytest.mark.parametrize("settings", [{}, {"path": "torch"}, {"window": 8}, {"window": 8, "path": "torch"}])
def test_a_watched_sequence_tells_what_fired_and_gets_the_same_bits(byte_model, settings):
    stepper = make_stepper(byte_model, **settings)
    feeds = {}
    for watched in (None, 5):
        one, other = stepper.new_state(), stepper.new_state()
        stepper.step([Feed(one, list(b"What is ")), Feed(other, [9])])
        feeds[watched] = [Feed(other, [3]), Feed(one, [7], watch=watched)]
        logits = stepper.step(feeds[watched])
        feeds[watched].append([*logits, *one.tensors.values()])
    assert all(a.equal(b) for a, b in zip(feeds[None][2], feeds[5][2], strict=True))
    assert feeds[5][0].activity is None
    activity = feeds[5][1].activity
    assert len(activity) == byte_model.config.n_layer
    # The first pass knows the token alone.
    v = layer_norm(byte_model.embed(torch.tensor(7)), byte_model.config.layer_norm_eps)
    x = F.relu(byte_model.encoder(v)).detach().numpy()
    assert activity[0].fired == pytest.approx(np.count_nonzero(x) / len(x))
    assert activity[0].neurons == np.argsort(-x, kind="stable")[:5].tolist()
    assert activity[0].values == pytest.approx(np.sort(x)[::-1][:5].tolist(), rel=1e-5)  # sums in another order


def test_the_last_token_of_a_prompt_is_watched_where_the_kernels_run(byte_model):
    stepper = make_stepper(byte_model, path="kernels")
    prompt = list(b"a prompt that is longer than what the kernels read at once: " * 4)
    whole = Feed(stepper.new_state(), prompt, watch=3)
    stepper.step([whole])
    state = stepper.new_state()
    stepper.step([Feed(state, prompt[:-1])])
    last = Feed(state, prompt[-1:], watch=3)
    stepper.step([last])
    assert whole.activity == last.activity
