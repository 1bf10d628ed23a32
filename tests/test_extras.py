"""A message that misses a package says how this installation gets it: bdh is on no index."""

import json
import shlex
from importlib.metadata import PackageNotFoundError

import pytest

from bdh import extras

CASES = {
    "a checkout": ({"url": "file://{folder}/my%20bdh", "dir_info": {"editable": True}}, "{folder}/my bdh[serve]"),
    "a wheel": (
        {"url": "file://{folder}/bdh-1-py3-none-any.whl", "archive_info": {}},
        "{folder}/bdh-1-py3-none-any.whl[serve]",
    ),
    "a wheel that is gone": (
        {"url": "file:///gone/bdh-1-py3-none-any.whl", "archive_info": {}},
        "bdh-1-py3-none-any.whl[serve]",
    ),
    "a checkout that is gone": ({"url": "file:///gone/bdh", "dir_info": {}}, ".[serve]"),
    "a repository": (
        {"url": "https://example.org/bdh", "vcs_info": {"vcs": "git"}},
        "bdh[serve] @ git+https://example.org/bdh",
    ),
    "a file of the web": (
        {"url": "https://example.org/bdh.whl", "archive_info": {}},
        "bdh[serve] @ https://example.org/bdh.whl",
    ),
    "an index": (None, "bdh[serve]"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_installs_what_this_installation_is_of(case, tmp_path, monkeypatch):
    (tmp_path / "my bdh").mkdir()
    (tmp_path / "bdh-1-py3-none-any.whl").touch()
    record, expected = CASES[case]

    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return record and json.dumps(record).replace("{folder}", str(tmp_path))

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    expected = expected.replace("{folder}", str(tmp_path))
    assert shlex.split(extras.install_command("serve")) == ["pip", "install", expected]


@pytest.mark.parametrize("is_checkout", [True, False])
def test_without_an_installation_it_is_the_checkout(is_checkout, tmp_path, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    monkeypatch.setattr(extras, "_CHECKOUT", tmp_path)
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    expected = f"{tmp_path}[serve]" if is_checkout else "bdh[serve]"
    assert shlex.split(extras.install_command("serve")) == ["pip", "install", expected]
