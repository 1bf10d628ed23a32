"""Configurations that come with the package are known by their names."""

from pathlib import Path

import pytest

from bdh.cli.settings import parse_settings
from bdh.cli.shipped import config_file, shipped_configs
from bdh.train.config import RunSettings

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def parsed(*argv):
    return parse_settings(RunSettings, argv, prog="bdh train", description="", check_available=False)


def test_every_configuration_has_its_name():
    assert shipped_configs() == {path.stem: path for path in CONFIGS.glob("*.yaml")}
    assert {"tiny", "small", "base"} <= set(shipped_configs())


def test_a_name_is_read_like_the_file():
    assert parsed("--config", "tiny") == parsed("--config", str(CONFIGS / "tiny.yaml"))


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_text("train:\n  max_steps: 700\n")
    assert parsed("--config", "tiny").train.max_steps == 700


def test_what_is_neither_is_said_with_what_there_is():
    with pytest.raises(FileNotFoundError, match=r"no configuration file tinny.*did you mean tiny"):
        config_file("tinny")
    with pytest.raises(FileNotFoundError, match=r"no configuration file x/y.yaml.*bdh comes with base, .*tiny"):
        config_file("x/y.yaml")
