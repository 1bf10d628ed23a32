"""The structure that CONTRIBUTING.md describes, read from the code: which file imports which, and how long files are."""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# What each package may import besides itself and the modules directly in bdh/, which themselves import no package.
ALLOWED = {
    "ops": set(),
    "model": {"ops"},
    "tokenizer": set(),
    "data": {"tokenizer"},
    "monitor": set(),
    "generate": {"ops", "model", "tokenizer"},
    "evaluate": {"ops", "model", "tokenizer", "data", "generate"},
    "quantize": {"ops", "model", "data", "evaluate", "generate"},
    "distributed": {"ops", "model"},
    "inspect": {"ops", "model", "tokenizer"},
    "train": {"ops", "model", "tokenizer", "data", "distributed", "monitor", "evaluate", "generate", "quantize"},
    "serve": {"model", "tokenizer", "generate"},
    "bench": {"ops", "model", "tokenizer", "evaluate", "generate", "quantize", "train"},
}
ALLOWED["cli"] = set(ALLOWED)
# The modules in bdh/ that stand above packages: the public names, `python -m bdh`, and methods that the engine carries out.
ABOVE_PACKAGES = {"bdh": {"model"}, "bdh.__main__": {"cli"}, "bdh.texts": {"generate", "inspect"}}


class Import(NamedTuple):
    by: str
    line: int
    of: str

    def __str__(self) -> str:
        return f"{self.by}, line {self.line}: imports {self.of}"


def modules_in(root: Path) -> dict[str, Path]:
    """The files of ``root/bdh`` by the names that they are imported under."""
    found = {}
    for path in sorted((root / "bdh").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(modules: dict[str, Path]) -> list[Import]:
    """What the files import of each other: in functions, under TYPE_CHECKING, and by a name in quotes too."""
    found = []
    for by, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: Iterable[str] = ()
            if isinstance(node, ast.Import):
                names = (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                parts = by.split(".") if path.name == "__init__.py" else by.split(".")[:-1]
                around = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                of = ".".join(filter(None, (around, node.module)))
                names = (name if (name := f"{of}.{alias.name}") in modules else of for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                names = (node.value,)  # for importlib
            found += [Import(by, node.lineno, name) for name in names if name in modules and name != by]
    return found


def circles(imports: Iterable[Import]) -> Iterator[list[Import]]:
    """For each file that lies on a circle, the shortest one through it."""
    of: dict[str, dict[str, Import]] = {}
    for each in imports:
        of.setdefault(each.by, {}).setdefault(each.of, each)
    for start in of:
        ways: dict[str, list[Import]] = {start: []}
        queue = [start]
        for name in queue:
            for other, each in of.get(name, {}).items():
                if other == start:
                    yield [*ways[name], each]
                    queue.clear()
                    break
                if other not in ways:
                    ways[other] = [*ways[name], each]
                    queue.append(other)


def package_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else None


def wrong_arrows(imports: Iterable[Import]) -> list[str]:
    wrong = []
    for each in imports:
        by, of = package_of(each.by), package_of(each.of)
        allowed = ALLOWED[by] if by else ABOVE_PACKAGES.get(each.by, set())
        if of not in (None, by, *allowed):
            wrong.append(str(each))
    return wrong


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return modules_in(ROOT)


@pytest.fixture(scope="module")
def imports(modules) -> list[Import]:
    return imports_in(modules)


def test_every_package_is_known_and_has_tests(modules):
    packages = {path.parent.name for name, path in modules.items() if path.name == "__init__.py" and name != "bdh"}
    packages = {name for name in packages if (ROOT / "bdh" / name).is_dir()}
    assert packages == set(ALLOWED)
    assert [name for name in ALLOWED if not (ROOT / "tests" / name).is_dir()] == []


def test_imports_point_one_way(imports):
    assert wrong_arrows(imports) == []


def test_every_import_between_packages_is_in_the_table_of_the_architecture_page(imports):
    """The page says that a package imports what its row names, and what that uses."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `bdh/(\w+)/` \|.*\|([^|]*)\|$", page, re.MULTILINE)
    after = {name: set(re.findall(r"`(\w+)`", used)) for name, used in rows}
    assert set(after) == set(ALLOWED)
    for _ in after:  # by way of others
        for ways in after.values():
            ways |= {further for name in ways for further in after[name]}
    found = {(package_of(each.by), package_of(each.of)) for each in imports}
    missing = {(by, of) for by, of in found if by and of and by != of and of not in after.get(by, set())}
    assert missing == set()


def test_no_package_imports_one_that_the_drawing_has_above_it(imports):
    drawing = (ROOT / "docs/images/code.svg").read_text(encoding="utf-8")
    height = {name: float(y) for y, name in re.findall(r'<text class="b" [^>]*y="([\d.]+)"[^>]*>(\w+)', drawing)}
    found = {(package_of(each.by), package_of(each.of)) for each in imports}
    assert {(by, of) for by, of in found if by and of and height[by] > height[of]} == set()


def test_no_file_imports_itself_by_way_of_others(imports):
    found = {"\n".join(sorted(map(str, circle))) for circle in circles(imports)}
    assert not found, "\n\n".join(["circles of imports:", *found])


def test_wrong_arrows_and_circles_would_be_seen(tmp_path):
    files = {
        "bdh/ops/a.py": "def f():\n    from bdh.ops.b import g\n",
        "bdh/ops/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bdh.ops import c\n",
        "bdh/ops/c.py": "import importlib\nimportlib.import_module('bdh.ops.a')\n",
        "bdh/ops/d.py": "from .a import f\n",
        "bdh/model/e.py": "def f():\n    from bdh.train.loop import fit\n",
        "bdh/train/loop.py": "from bdh.model.e import f\n",
        "bdh/leaf.py": "import bdh.ops.a\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    imports = imports_in(modules_in(tmp_path))
    assert wrong_arrows(imports) == [
        "bdh.leaf, line 1: imports bdh.ops.a",
        "bdh.model.e, line 2: imports bdh.train.loop",
    ]
    on_circles = {tuple(sorted(each.by for each in circle)) for circle in circles(imports)}
    assert on_circles == {("bdh.ops.a", "bdh.ops.b", "bdh.ops.c"), ("bdh.model.e", "bdh.train.loop")}
    assert Import("bdh.ops.d", 1, "bdh.ops.a") in imports


def test_files_stay_short(modules):
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_tracked_file_names_a_place_of_one_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    places = ["/" + "root/", "/" + "work/", "/" + "home/"]
    paths = [ROOT / name for name in filter(None, tracked.split("\0"))]
    kinds = {".py", ".md", ".yaml", ".toml", ".sh", ".txt"}
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.suffix in kinds and path.exists()}
    assert [str(path) for path, text in texts.items() if any(place in text for place in places)] == []
