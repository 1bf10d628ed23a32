"""The promises of conftest.py."""

import os
import re
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


def test_the_hub_is_out_of_reach_of_what_a_folder_imports(outcome):
    """Given such a folder, pytest imported the hub's package before it had heard that there is no network."""
    files = {
        "folder/conftest.py": "from huggingface_hub import constants\n",
        "folder/test_hub.py": "from huggingface_hub import constants\ndef test_it(): assert constants.HF_HUB_OFFLINE\n",
    }
    assert outcome(files, "folder", hub="0")[0] == 0


SKIPS = {
    "test_passes.py": "def test_it(): pass\n",
    "test_skips.py": "import pytest\n@pytest.mark.skip(reason='no browser')\ndef test_it(): pass\n",
    "test_module.py": "import pytest\npytest.importorskip('there_is_no_such_module')\n",
}
# What the copied conftest.py sets up in torch is not what these look at, and importing it takes longer than all else.
NO_TORCH = "import sys\nfrom unittest.mock import MagicMock\nsys.modules[__name__] = MagicMock()\n"
GPU = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skip(reason='no GPU')\ndef test_it(): pass\n"
NAMED = [
    "test_module.py: Skipped: could not import 'there_is_no_such_module'",
    "test_skips.py::test_it: Skipped: no browser",
]


@pytest.fixture
def outcome(tmp_path):
    """Status and output of pytest, with the conftest.py of this folder, over some files."""

    def run(files: dict[str, str], *flags: str, missing: str = "", hub: str = "1") -> tuple[int, str]:
        conftest = Path(__file__).with_name("conftest.py").read_text()
        (tmp_path / "conftest.py").write_text(conftest.replace('"wandb"', f'"{missing or "wandb"}"'))
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
        for name, text in {**files, "test_gpu.py": GPU, "torch.py": NO_TORCH}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": hub}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout

    return run


def test_skips_are_allowed_and_optional_packages_named(outcome):
    status, shown = outcome(SKIPS, missing="there_is_no_such_package")
    assert status == 0, shown
    assert not any(line in shown for line in NAMED)
    assert f"onnxruntime {metadata.version('onnxruntime')}" in shown
    assert "there_is_no_such_package is missing" in shown


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-p", "xdist", "-n", "2", "--dist", "loadfile"]], ids=["one process", "xdist"])
def test_where_no_test_may_be_skipped_one_that_is_fails_all(outcome, flags):
    """Tests of the page and of the deployment were skipped where their programs were missing, and everything was green."""
    status, shown = outcome(SKIPS, "--no-skips", *flags)
    assert status == 1, shown
    after = shown.partition("skipped, which --no-skips does not allow")[2]
    assert [after.count(line) for line in NAMED] == [1, 1]
    assert "test_gpu.py" not in after


def test_what_a_gpu_is_for_may_be_skipped_always(outcome):
    status, shown = outcome({"test_passes.py": SKIPS["test_passes.py"]}, "--no-skips")
    assert status == 0, shown


def test_where_no_test_may_be_skipped_a_missing_package_fails_all(outcome):
    status, shown = outcome(
        {"test_passes.py": SKIPS["test_passes.py"]}, "--no-skips", missing="there_is_no_such_package"
    )
    assert status == 1, shown


def test_no_test_changes_the_clock_of_the_process():
    """A server that earlier tests had left running computed by such a clock how long to sleep: it never ended."""
    tests = Path(__file__).parent
    changed = re.compile(r"""setattr\(\s*(time,|["'][\w.]*\btime\.\w+["'])""")
    assert changed.search('monkeypatch.setattr(time, "monotonic", moment)')
    assert changed.search('monkeypatch.setattr("bdh.train.runtime.time.perf_counter", moment)')
    here = Path(__file__)
    found = [path for path in tests.rglob("*.py") if path != here and changed.search(path.read_text(encoding="utf-8"))]
    assert not found, "give the module a time of its own: tests/clock.py"
