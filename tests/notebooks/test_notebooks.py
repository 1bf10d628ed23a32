"""The notebooks run, and those that are committed were made of their sources."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import notebooks  # noqa: E402 (of scripts/)

SOURCES = notebooks.sources()


def test_there_are_nine():
    assert [path.stem[:2] for path in SOURCES] == [f"0{number}" for number in range(1, 10)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_committed_notebook_is_not_older_than_its_source(source):
    made = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert made["metadata"]["bdh"]["source_sha256"] == notebooks.source_hash(source), "run: make notebooks"
    outputs = [output for cell in made["cells"] for output in cell.get("outputs", ())]
    assert outputs
    assert not any(output["output_type"] == "error" for output in outputs)
    notebooks.check_size(source.with_suffix(".ipynb"), notebooks.nbformat.from_dict(made))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_links_lead_to_notebooks(source):
    linked = {part.split(")")[0] for part in source.read_text(encoding="utf-8").split("](")[1:]}
    assert linked
    assert all((ROOT / "notebooks" / name).with_suffix(".py").is_file() for name in linked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDH_NOTEBOOK_FAST", "1")
        notebooks.prepare(folder)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_runs_with_small_settings(source, folder):
    made = notebooks.run(source, folder)
    assert any(cell.get("outputs") for cell in made.cells)
