"""The promises of conftest.py."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch


def test_fresh_memory_is_nan():
    assert torch.empty(1000).isnan().all()
    assert torch.zeros(3).new_empty(5, dtype=torch.float16).isnan().all()


def test_the_hub_is_out_of_reach():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # what subprocesses inherit


@pytest.mark.parametrize(
    ("mark", "flags", "status"),
    [
        ("@pytest.mark.skip(reason='no browser')", [], 0),
        ("@pytest.mark.skip(reason='no browser')", ["--no-skips"], 1),
        ("@pytest.mark.gpu\n@pytest.mark.skip(reason='no GPU')", ["--no-skips"], 0),
        ("", ["--no-skips"], 0),
    ],
)
def test_where_no_test_may_be_skipped_one_that_is_fails_all(tmp_path, mark, flags, status):
    """Tests of the page and of the deployment were skipped where their programs were missing, and everything was green."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{mark}\ndef test_it(): pass\n")
    run = subprocess.run([sys.executable, "-m", "pytest", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == status, run.stdout
    assert ("test_it.py::test_it: Skipped: no browser" in run.stdout) == (status == 1)


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--no-skips"], 1)])
def test_the_summary_names_optional_packages_and_one_that_is_missing_fails_all(tmp_path, flags, status):
    conftest = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest.replace('"wandb"', '"there_is_no_such_package"'))
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *flags], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == status, run.stdout
    assert f"onnxruntime {metadata.version('onnxruntime')}" in run.stdout
    assert "there_is_no_such_package is missing" in run.stdout


def test_a_module_that_is_skipped_counts_too(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\npytest.importorskip('there_is_no_such_module')\n")
    (tmp_path / "test_other.py").write_text("def test_it(): pass\n")
    run = subprocess.run([sys.executable, "-m", "pytest", "--no-skips"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout
    assert "test_it.py: Skipped: could not import 'there_is_no_such_module'" in run.stdout
