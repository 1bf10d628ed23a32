"""The notebooks run, and those that are committed were made of their sources."""

import ast
import json
import shutil
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
def test_a_cell_that_shows_something_did_and_without_warnings(source):
    """A cell once printed a list that was empty: the sentence above it spoke of nothing."""
    made = notebooks.nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    for cell in notebooks.code_cells(made):
        run = [part for part in ast.parse(cell.source).body if not isinstance(part, (ast.FunctionDef, ast.Try))]
        calls = {ast.unparse(node.func) for part in run for node in ast.walk(part) if isinstance(node, ast.Call)}
        assert cell.outputs or not calls & {"print", "plt.show", "run_bdh"}, cell.source
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.source


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A notebook and its source, of a project with a repository on GitHub."""
    for path in (SOURCES[0], SOURCES[0].with_suffix(".ipynb")):
        shutil.copy(path, tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nurls = {Repository = "https://github.com/some/where"}\n')
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    return tmp_path / SOURCES[0].name


def test_with_a_repository_a_notebook_opens_and_installs_in_colab(copied):
    made = notebooks.with_new_text(copied, copied.with_suffix(".ipynb"))
    url = "https://colab.research.google.com/github/some/where/blob/main/notebooks/01_quickstart.ipynb"
    assert made.cells[0].source.startswith(
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    )
    assert f"({url})\n\n# 1. Quickstart\n" in made.cells[0].source
    install = notebooks.code_cells(made)[0].source
    assert '"bdh[serve,finetune] @ git+https://github.com/some/where"' in install
    ast.parse(install)


def test_without_a_repository_there_is_no_badge(copied):
    (notebooks.ROOT / "pyproject.toml").write_text("[project]\n")
    made = notebooks.without_outputs(copied)
    assert made.cells[0].source.startswith("# 1. Quickstart\n")
    assert "git+" not in notebooks.code_cells(made)[0].source


def test_new_text_keeps_what_the_code_printed(copied):
    before = notebooks.nbformat.read(copied.with_suffix(".ipynb"), as_version=4)
    text = copied.read_text().replace("# ## Let it write", "# ## It writes")
    copied.write_text(text.replace("# %%\nfrom pathlib", "# %%\n# A comment.\nfrom pathlib"))
    after = notebooks.with_new_text(copied, copied.with_suffix(".ipynb"))
    assert [cell.outputs for cell in notebooks.code_cells(after)] == [
        cell.outputs for cell in notebooks.code_cells(before)
    ]
    assert any(cell.source.startswith("# A comment.\nfrom pathlib") for cell in after.cells)
    assert "## It writes" in [cell.source for cell in after.cells]
    assert after.metadata["bdh"]["source_sha256"] == notebooks.source_hash(copied)


def test_new_code_is_not_given_old_outputs(copied):
    copied.write_text(copied.read_text().replace("temperature=0.7", "temperature=0.8"))
    with pytest.raises(ValueError, match="run it, without --text"):
        notebooks.with_new_text(copied, copied.with_suffix(".ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_links_lead_to_notebooks_and_pages(source):
    linked = {part.split(")")[0] for part in source.read_text(encoding="utf-8").split("](")[1:]}
    assert linked
    files = [ROOT / "notebooks" / name for name in linked]
    assert all((path.with_suffix(".py") if path.suffix == ".ipynb" else path).is_file() for path in files)


INTERACT = """# %%
from ipywidgets import interact

@interact(a=(0, 3))
def play(a=1):
    print("seen", a)

# %%
print("answered", play.widget.out.outputs)
"""


def test_what_a_widget_shows_is_kept_and_not_answered(tmp_path):
    """nbclient answers an Output widget, and sometimes waits forever then: https://github.com/jupyter/nbclient/issues/312."""
    (tmp_path / "interact.py").write_text(INTERACT)
    shown, state = notebooks.run(tmp_path / "interact.py", tmp_path).cells
    assert [output.get("text") for output in shown.outputs] == ["seen 1\n"]
    assert [output.text for output in state.outputs] == ["answered ()\n"]


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
