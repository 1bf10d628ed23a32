"""The structure that CONTRIBUTING.md describes, read from the code."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "bdh").rglob("*.py"))

# What each package may import, besides itself and the leaf bdh.validation.
ALLOWED = {
    "ops": set(),
    "model": {"ops"},
    "tokenizer": set(),
    "data": {"tokenizer"},
    "monitor": set(),
    "generate": {"ops", "model", "tokenizer"},
    "evaluate": {"ops", "model", "tokenizer", "data", "generate"},
    "distributed": {"ops", "model"},
    "train": {"ops", "model", "tokenizer", "data", "distributed", "monitor", "evaluate", "generate"},
    "serve": {"model", "tokenizer", "generate"},
    "bench": {"ops", "model", "tokenizer", "generate", "train"},
    "cli": {
        "ops",
        "model",
        "tokenizer",
        "data",
        "distributed",
        "monitor",
        "evaluate",
        "train",
        "generate",
        "serve",
        "bench",
    },
}


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, in functions too; not those that only annotate types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    annotating = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in annotating:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "bdh"}


def package_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else None


def test_every_package_is_known():
    packages = {path.parent.name for path in (ROOT / "bdh").glob("*/__init__.py")}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = package_of("bdh." + path.relative_to(ROOT / "bdh").as_posix().replace("/", "."))
    if own is None:
        return
    packages = {package for name in imported(path) if (package := package_of(name)) not in (None, own)}
    assert packages <= ALLOWED[own]


def test_an_arrow_that_points_the_other_way_would_be_seen(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from bdh.train.loop import fit\n")
    assert {package_of(name) for name in imported(wrong)} == {"train"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_tests_mirror_the_packages():
    assert all((ROOT / "tests" / package).is_dir() for package in ALLOWED)


def test_no_tracked_file_names_a_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = ["/" + "root/", "/" + "work/", "/" + "home/"]
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".txt"} and (ROOT / name).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            assert not any(place in text for place in places), name
