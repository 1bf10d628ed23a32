from pathlib import Path

import pytest

from bdh.cli.generate import GenerateSettings
from bdh.cli.settings import parse_settings
from bdh.train.config import RunSettings

FOLDER = Path(__file__).parent.parent / "configs"
OF_COMMANDS = {"talk": "chat", "generate": "generate", "serve": "serve"}
"""Settings of other commands than `bdh train`. tests/cli/test_chat.py reads the first one."""
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem not in OF_COMMANDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path):
    settings = parse_settings(
        RunSettings, ["--config", str(path)], prog="bdh train", description="", check_available=False
    )
    assert settings.model.n_embd > 0


def test_the_configuration_of_generate_is_valid():
    argv = ["model", "--prompt", "a", "--config", str(FOLDER / "generate.yaml")]
    settings = parse_settings(
        GenerateSettings, argv, prog="bdh generate", description="", positionals=("model",), check_available=False
    )
    assert settings.engine.weights == "bfloat16"
    assert settings.params().stop == ["\n\n"]


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("tiny", 0.2e6), ("small", 1.6e6), ("base", 25e6), ("large", 101e6)],
)
def test_the_configurations_have_the_sizes_that_they_name(name, num_parameters):
    path = next(path for path in CONFIGS if path.stem == name)
    model = parse_settings(
        RunSettings, ["--config", str(path)], prog="bdh train", description="", check_available=False
    ).model
    D, V = model.n_embd, 256
    ours = 3 * D * D * model.mlp_internal_dim_multiplier + 2 * V * D
    assert ours == pytest.approx(num_parameters, rel=0.25)
