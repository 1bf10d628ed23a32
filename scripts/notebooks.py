"""Makes the notebooks of notebooks/*.ipynb from their sources, the .py files beside them, by running them.

    python scripts/notebooks.py                 all nine, as they are committed: 20 to 25 minutes on two cores
    python scripts/notebooks.py 01 05           some of them
    python scripts/notebooks.py --text 01 05    of which only text and comments were edited: what it printed is kept
    BDH_NOTEBOOK_FAST=1 python scripts/notebooks.py --out FOLDER    with small settings, elsewhere: to see that they run

A source is Python in jupytext's percent format. The notebook holds its hash: a test fails where it was made of another source.
"""

import argparse
import ast
import hashlib
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "notebooks"
CELL_SECONDS = 900
MOST_IMAGE_BYTES, MOST_BYTES = 100_000, 1_000_000
_TINY = ("--train.max_steps", "60", "--train.eval_every_steps", "30", "--train.sample_every_steps", "0")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="numbers or names; all by default")
    parser.add_argument("--text", action="store_true", help="only the text was edited: keep what the code printed")
    parser.add_argument("--out", type=Path, default=SOURCES, help="folder to write to, and to run in")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [path for path in sources() if not options.names or path.stem.startswith(tuple(options.names))]
    if not chosen:
        parser.error(
            f"no notebook is called {', '.join(options.names)}: there are {', '.join(p.stem for p in sources())}"
        )
    if not options.text:
        prepare(options.out)
    for source in chosen:
        start = time.perf_counter()
        path = options.out / f"{source.stem}.ipynb"
        notebook = with_new_text(source, path) if options.text else run(source, options.out)
        nbformat.write(notebook, path)
        check_size(path, notebook)
        print(f"{path}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    return 0


def sources() -> list[Path]:
    return sorted(SOURCES.glob("[0-9][0-9]_*.py"))


def prepare(folder: Path) -> None:
    """Trains the model of ``bdh demo``, which most notebooks use; with small settings another one, in seconds.

    A notebook that finds no model trains it itself, but its progress bars are nothing to store.
    """
    if (folder / "runs/demo/model").exists():
        return
    small = ["train", "--config", "tiny", "--run_dir", "runs/demo", *_TINY]
    command = small if os.environ.get("BDH_NOTEBOOK_FAST") == "1" else ["demo"]
    subprocess.run([sys.executable, "-m", "bdh", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


class Runner(NotebookClient):
    """Runs a notebook without playing the browser for its widgets: what they show last is the output of their cell.

    NotebookClient answers an Output widget on the channel on which it waits for the cell to end. The answer can take the news of
    a message that has come from that channel, which is then never read: https://github.com/jupyter/nbclient/issues/312.
    """

    def on_comm_open_jupyter_widget(self, msg: dict[str, Any]) -> None:
        pass


def run(source: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook of a source with what its cells printed and drew, run in a folder."""
    notebook = without_outputs(source)
    Runner(notebook, timeout=CELL_SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in code_cells(notebook):
        cell.metadata = {}
        cell.execution_count = None
        cell.outputs = merged(cell.outputs)
    return notebook


def with_new_text(source: Path, made: Path) -> nbformat.NotebookNode:
    """The notebook of a source whose text was edited since it was made, with the outputs that it had.

    Raises:
        ValueError: its code was edited too. That of the first code cell, which installs bdh where it is missing, may differ.
    """
    notebook, before = without_outputs(source), nbformat.read(made, as_version=4)
    code, code_before = code_cells(notebook), code_cells(before)
    if list(map(_parsed, code[1:])) != list(map(_parsed, code_before[1:])):
        raise ValueError(f"{source.name}: its code is not that of {made.name}: run it, without --text")
    for cell, cell_before in zip(code, code_before, strict=True):
        cell.outputs = cell_before.outputs
    notebook.metadata = {**before.metadata, "bdh": notebook.metadata["bdh"]}
    return notebook


def _parsed(cell: nbformat.NotebookNode) -> str:
    """The code of a cell, without its comments."""
    return ast.dump(ast.parse(cell.source))


def without_outputs(source: Path) -> nbformat.NotebookNode:
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "bdh": {"source_sha256": source_hash(source)},
    }
    notebook.nbformat_minor = 4  # without ids, which would differ each time
    for cell in notebook.cells:
        cell.metadata = {}
        cell.pop("id", None)
    if where := repository():
        notebook.cells[0].source = f"{colab_badge(source, where)}\n\n{notebook.cells[0].source}"
        install = code_cells(notebook)[0]
        package = f"bdh[serve,finetune] @ git+https://github.com/{where}"
        checkout = f'else ".." if pathlib.Path("../pyproject.toml").exists() else "{package}"'
        install.source = install.source.replace('else ".."', checkout)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def merged(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What a cell printed piece by piece, as one; without widgets, which need a running kernel."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        output.pop("execution_count", None) if output.output_type != "execute_result" else output.update(
            execution_count=None
        )
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def source_hash(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def repository() -> str:
    """OWNER/NAME on GitHub; empty while pyproject.toml names no repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").partition("github.com/")[2].strip("/").removesuffix(".git")


def colab_badge(source: Path, where: str) -> str:
    """A link that opens the notebook in Colab."""
    url = f"https://colab.research.google.com/github/{where}/blob/main/notebooks/{source.stem}.ipynb"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def check_size(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Raises ``ValueError`` for a notebook that is too large for a repository."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if len(output.get("data", {}).get("image/png", "")) * 3 / 4 > MOST_IMAGE_BYTES:
                raise ValueError(f"{path.name}: the image of cell {number} has more than {MOST_IMAGE_BYTES:,} bytes")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes: must have {MOST_BYTES:,} at most")


if __name__ == "__main__":
    sys.exit(main())
