"""What a release is made of: one version everywhere, a wheel that has what it needs, and a README that names all commands."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import bdh
from bdh.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
BY_SUFFIX = {".py", ".yaml", ".html", ".typed"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date_are_the_same_everywhere():
    version, date = re.search(r"^## (\d\S*) - (\S+)$", read("CHANGELOG.md"), re.MULTILINE).groups()
    cited = yaml.safe_load(read("CITATION.cff"))
    assert (bdh.__version__, cited["version"], cited["date-released"]) == (version, version, date)
    assert f"bdh-{version}-py3-none-any.whl" in read("docs/install.md")


def test_the_changelog_has_a_place_for_what_is_not_released():
    assert re.findall(r"^## (\w+)", read("CHANGELOG.md"), re.MULTILINE)[0] == "Unreleased"


def test_the_readme_is_short_and_names_every_command():
    text = read("README.md")
    assert len(text.splitlines()) <= 120
    named = set(re.findall(r"`bdh (\w+)", text))
    assert sorted(set(COMMANDS) - named) == []
    assert sorted(named - set(COMMANDS)) == []


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "notebooks/README.md"])
def test_links_lead_to_files_and_headings(page):
    """Those of docs/ are checked where the site is built."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / Path(page).parent / path
        assert file.exists() or file.with_suffix(".py").exists(), target  # a notebook is made from its source
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, target


def test_issue_forms_ask_for_what_is_needed():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert sorted(forms) == ["bug_report", "config", "feature_request"]
    fields = {field["id"]: field for field in forms["bug_report"]["body"] if "id" in field}
    assert "`bdh doctor`" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"]


def build(kind, source, folder):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", folder]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_has_the_package_its_configurations_and_nothing_else(tmp_path):
    wheel = build("wheel", ROOT, tmp_path / "wheel")
    assert wheel.name == f"bdh-{bdh.__version__}-py3-none-any.whl"
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bdh").rglob("*") if path.suffix in BY_SUFFIX}
    configs = {f"bdh/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    about = f"bdh-{bdh.__version__}.dist-info"
    names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == package | configs | {f"{about}/{name}" for name in names}
        metadata = Parser().parsestr(file.read(f"{about}/METADATA").decode())
        entry_points = file.read(f"{about}/entry_points.txt").decode()
    assert {"bdh/py.typed", "bdh/serve/page/index.html", "bdh/configs/tiny.yaml"} <= package | configs
    assert entry_points.split() == ["[console_scripts]", "bdh", "=", "bdh.cli.main:main"]
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == ("bdh", bdh.__version__, "MIT")
    assert {"serve", "notebooks", "docs", "all"} <= set(metadata.get_all("Provides-Extra"))
    assert "Development Status :: 4 - Beta" in metadata.get_all("Classifier")


def test_the_sdist_builds_the_same_wheel(tmp_path):
    sdist = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not {"runs", "site", ".venv"} & {path.name for path in source.iterdir()}
    assert (source / "tests/conftest.py").is_file()
    built, direct = build("wheel", source, tmp_path / "built"), build("wheel", ROOT, tmp_path / "direct")
    assert built.read_bytes() == direct.read_bytes()
