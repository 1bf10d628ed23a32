"""What holds for every test: no network, few threads, and no memory that was never written."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

# Here, not in a hook: a conftest.py of a folder that pytest is given is imported before the hooks are called, and huggingface_hub
# reads this once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch loads OpenMP: threads that wait actively are slow beside other programs, and several tests start some.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before cuBLAS is first used: with other workspaces it may add in another order each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Beside what the package cannot do without. The extra dev of pyproject.toml installs them.
OPTIONAL_PACKAGES = [
    "bitsandbytes",
    "fastapi",
    "llguidance",
    "lm_eval",
    "matplotlib",
    "mkdocs-material",
    "mkdocstrings-python",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openai",
    "peft",
    "playwright",
    "schemathesis",
    "sentence-transformers",
    "tensorboard",
    "torchao",
    "trackio",
    "trl",
    "wandb",
]


# By how long they take: of several test processes none is then left with one of them at the end.
LONGEST_FILES = [
    "test_benchmarks.py",
    "train/test_run.py",
    "distributed/test_training.py",
    "serve/test_process.py",
    "serve/test_schema.py",
    "train/test_dry_run.py",
    "train/test_base.py",
    "model/test_export.py",
    "train/test_lora.py",
    "model/test_auto.py",
    "cli/test_libraries.py",
    "test_docs.py",
    "test_pins.py",
    "cli/test_chat.py",
    "train/test_carry.py",
    "ops/test_cpu.py",
    "cli/test_bench.py",
    "data/test_streaming.py",
    "test_locks.py",
    "model/test_weight_changes.py",
    "evaluate/test_harness.py",
    "train/test_lock.py",
    "generate/test_random_faults.py",
    "cli/test_generate.py",
    "generate/test_engine.py",
    "data/test_corpus.py",
    "monitor/test_faults.py",
    "generate/test_grammar.py",
    "distributed/test_data_faults.py",
    "ops/blocks/test_compiled.py",
    "data/test_jsonl.py",
    "ops/cpu/test_pieces.py",
]


def installed_packages() -> dict[str, str | None]:
    """The optional packages and their versions; None for one that is missing."""
    found: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def pytest_terminal_summary(terminalreporter):
    versions = [f"{name} {version or 'is missing'}" for name, version in installed_packages().items()]
    terminalreporter.line(f"optional packages: {', '.join(versions)}")


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="fail where a test is skipped, but for those marked gpu")


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        folder = Path(__file__).parent
        first = {folder / name: place for place, name in enumerate(LONGEST_FILES)}
        items.sort(key=lambda item: first.get(item.path, len(first)))


class NoSkips:
    """Fails the session where tests were skipped, which it names, or an optional package is missing."""

    def __init__(self):
        self.skipped = []

    def pytest_collectreport(self, report):
        self._note(report)

    def pytest_runtest_logreport(self, report):
        if "gpu" not in report.keywords and not hasattr(report, "wasxfail"):
            self._note(report)

    def _note(self, report):
        if report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            self.skipped.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if (self.skipped or None in installed_packages().values()) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.skipped:
            terminalreporter.section("skipped, which --no-skips does not allow", red=True)
        for line in self.skipped:
            terminalreporter.line(line)


def pytest_configure(config):
    starts_workers = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if starts_workers and (folder := Path(__file__).parent).joinpath("compile_kernels.py").exists():
        # Once, before the workers: in each of them, and in the servers that they start, it takes longer
        # than tests wait.
        subprocess.run([sys.executable, "-m", "tests.compile_kernels"], cwd=folder.parent, check=True)
    if config.getoption("--no-skips"):
        config.pluginmanager.register(NoSkips())
    # Before anything imports trackio, which reads it once: trl does so, and evaluate.
    os.environ["TRACKIO_DIR"] = folder = tempfile.mkdtemp(prefix="trackio-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if starts_workers:
        return  # it runs no tests
    num_threads = 1 if hasattr(config, "workerinput") else 2  # of xdist, one of several: a thread each is faster
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of what tests start too, whose results they compare to the bit

    import torch

    torch.set_num_threads(num_threads)
    # Deterministic mode fills what torch.empty returns with NaN (integers with their largest value), so that
    # reading it before writing to it fails a test. Operations without a deterministic form only warn. The call that has
    # "algorithms" in its name would import torch's compiler too, for more than a second.
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    gc.disable()  # until all is imported: it would look through the same objects again and again


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    # For some hundred trainings in this process: none of them is there for a disk that loses power, or for how fast the machine
    # is. The test of that measures as long as a training does.
    os.fsync = without_waiting
    if runtime := sys.modules.get("bdh.train.runtime"):  # not among the files that test this one
        runtime.MEASURING_SECONDS = 0.01


def without_waiting(file) -> None:
    """Fails as :func:`os.fsync` does, for a file that is closed."""
    os.fstat(file if isinstance(file, int) else file.fileno())


@pytest.fixture(scope="session")
def trackio_folder() -> Path:
    """Where Trackio keeps its databases."""
    from trackio.utils import TRACKIO_DIR

    folder = Path(os.environ["TRACKIO_DIR"])
    assert folder == TRACKIO_DIR
    return folder
