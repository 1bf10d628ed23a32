"""The promises of conftest.py."""

import os

import torch


def test_fresh_memory_is_nan():
    assert torch.empty(1000).isnan().all()
    assert torch.zeros(3).new_empty(5, dtype=torch.float16).isnan().all()


def test_the_hub_is_out_of_reach():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # what subprocesses inherit
