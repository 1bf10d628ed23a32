"""Pages name files that exist, their commands and programs run, and the site is built without a warning.

A block of a page is run where ``<!-- run -->`` stands on the line before it, which GitHub and the site hide. The blocks of a page are run in order,
in a folder of their own with a small trained model in runs/demo; programs share their names, to begin with those that docs/README.md promises.
``<!-- run: background -->`` starts a server that the blocks after it may ask.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKED = re.compile(r"^<!-- run(: background)? -->\n```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED_PAGES = [
    path.relative_to(DOCS).as_posix()
    for path in sorted(DOCS.rglob("*.md"))
    if MARKED.search(path.read_text(encoding="utf-8"))
]
SHORT_TRAINING = """
train: {max_steps: 4, warmup_steps: 1, eval_every_steps: 4, eval_windows: 2, sample_every_steps: 0}
monitor: {log_every_steps: 1}
"""


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


def test_every_mark_belongs_to_a_block():
    """A mark that the pattern does not find, for a blank line say, would leave its block untested."""
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert text.count("<!-- run") == len(MARKED.findall(text)), path


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site/first-steps/index.html").is_file()


def write_script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder with `python`, and a `bdh` that trains for some steps only and serves at ``$PORT``."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "short.yaml").write_text(SHORT_TRAINING)
    write_script(folder / "python", f'exec {sys.executable} "$@"')
    write_script(
        folder / "bdh",
        'case "$1" in',
        f'train) set -- "$@" --config {folder}/short.yaml ;;',
        'serve) set -- "$@" --port "$PORT" ;;',
        "esac",
        f'exec {sys.executable} -m bdh "$@"',
    )
    return folder


@pytest.fixture(scope="module")
def environment(tools, tmp_path_factory):
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "BDH_CACHE": str(tmp_path_factory.mktemp("cache")),
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture(scope="module")
def demo_run(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    run_sh(f"bdh train --config tiny --run_dir {folder}", folder.parent, environment)
    return folder


def run_sh(block, folder, environment):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def start_server(block, folder, environment):
    """Starts it, and waits until it is ready."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {block.strip()}"], cwd=folder, env=environment, stderr=(folder / "server.log").open("w")
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        assert server.poll() is None, (folder / "server.log").read_text()
        try:
            opener.open(f"http://127.0.0.1:{environment['PORT']}/health/ready").close()
            return server
        except OSError:
            time.sleep(0.1)


def end_server(server):
    server.send_signal(signal.SIGTERM)
    assert server.wait() == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", MARKED_PAGES)
def test_marked_blocks_run(page, environment, demo_run, tmp_path, monkeypatch):
    shutil.copytree(demo_run, tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {}
    blocks = MARKED.findall((DOCS / page).read_text(encoding="utf-8"))
    if page != "README.md" and any(language == "python" for _, language, _ in blocks):
        blocks = [*MARKED.findall((DOCS / "README.md").read_text(encoding="utf-8")), *blocks]
    with ExitStack() as at_the_end:
        for background, language, block in blocks:
            block = block.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            if background:
                server = start_server(block, tmp_path, {**environment, "PORT": port})
                at_the_end.callback(end_server, server)
            elif language == "sh":
                run_sh(block, tmp_path, environment)
            else:
                exec(compile(block, f"docs/{page}", "exec"), names)
