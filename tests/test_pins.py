"""Each path computes what it has always computed: losses, greedy texts and their logits as recorded by :mod:`tests.pins`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests import pins

LOSSES = load_file(pins.FOLDER / "losses.safetensors")
TEXTS = json.loads((pins.FOLDER / "texts.json").read_text())


@pytest.mark.parametrize("training", pins.TRAININGS, ids=lambda training: training.name)
def test_training_losses_are_as_recorded(training):
    count = pins.CHECKED_STEPS[training.dtype]
    losses = torch.tensor(pins.losses_of(training, count), dtype=torch.float64)
    tolerance = pins.TOLERANCE[training.dtype]
    torch.testing.assert_close(losses, LOSSES[training.name][:count], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", pins.CONTINUATIONS, ids=lambda case: case.name)
def test_greedy_texts_are_as_recorded(case):
    for found, recorded in zip(pins.continuations_of(case), TEXTS[case.name], strict=True):
        assert found["text"] == recorded["text"]
        leads = torch.tensor(recorded["leads"])
        assert leads.min() > 1  # far above rounding, so that no processor takes another token
        torch.testing.assert_close(torch.tensor(found["leads"]), leads, rtol=0, atol=case.tolerance)


def test_all_that_is_recorded_is_checked():
    assert set(LOSSES) == {training.name for training in pins.TRAININGS}
    assert set(TEXTS) == {case.name for case in pins.CONTINUATIONS}
    assert all(len(losses) == pins.NUM_STEPS for losses in LOSSES.values())
