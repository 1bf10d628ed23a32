"""What holds for every test: no network, few threads, and no memory that was never written."""

import os
from pathlib import Path

import pytest


def pytest_configure(config):
    # Before anything imports huggingface_hub, which reads it once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Before torch loads OpenMP: threads that wait actively are slow beside other programs, and several tests start some.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    import torch

    torch.set_num_threads(2)
    # Deterministic mode fills what torch.empty returns with NaN (integers with their largest value), so that
    # reading it before writing to it fails a test. Operations without a deterministic form only warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def trackio_folder(tmp_path_factory) -> Path:
    """Where Trackio keeps its databases. It reads the variable once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    os.environ["TRACKIO_DIR"] = str(folder)
    from trackio.utils import TRACKIO_DIR

    assert folder == TRACKIO_DIR
    return folder
