"""Pages that describe the code name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/kernels.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:bdh|tests|benchmarks|docs|scripts|configs)/[\w./-]*)`", text))
    assert len(named) > 3
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_names_of_the_architecture_page_are_defined_where_it_says():
    """``name`` in `file`: such a name is a function, class or constant of that file."""
    text = " ".join((ROOT / "docs/architecture.md").read_text(encoding="utf-8").split())
    found = re.findall(r"`([A-Za-z_.]+)`(?: in| of| \()+ ?`(bdh/[\w/]+\.py)`", text)
    assert len(found) > 10
    wrong = []
    for name, file in found:
        last = name.split(".")[-1]
        defines = rf"^\s*(?:async def|def|class) {last}\b|^\s*{last}\b\s*[:=]"
        if not re.search(defines, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            wrong.append(f"{name} in {file}")
    assert wrong == []
