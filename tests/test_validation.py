"""No setting that is a number may be infinite or NaN, wherever it comes from."""

import dataclasses
import importlib
import math
import pkgutil
import sys
import types
import typing
from typing import Any

import pytest

import bdh
from bdh.cli.main import COMMANDS, find_command, main
from bdh.model.config_fields import ConfigFields
from bdh.model.configuration import BDHConfig
from bdh.validation import Faults, Settings, collect_faults
from tests.cli.test_defaults import REQUIRED, Command

for module in pkgutil.walk_packages(bdh.__path__, "bdh."):
    if module.name.rpartition(".")[2] in ("config", "params") or module.name.startswith("bdh.cli."):
        importlib.import_module(module.name)


def subclasses(of: type) -> list[type]:
    return [each for direct in of.__subclasses__() for each in (direct, *subclasses(direct))]


def forms(annotation: Any) -> list[Any]:
    """How a number stands in a value of a type: alone, or in a list or mapping; as functions of the number."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is float:
        return [lambda number: number]
    if origin in (typing.Union, types.UnionType):
        return [form for argument in arguments for form in forms(argument)]
    if origin is list:
        return [lambda number, form=form: [form(number)] for form in forms(arguments[0])]
    if origin is dict:
        return [lambda number, form=form: {1: form(number)} for form in forms(arguments[1])]
    return []


CLASSES = sorted(
    {each for each in subclasses(Settings) if each.__module__.startswith("bdh.")}, key=lambda each: each.__name__
)
NUMBERS = [
    pytest.param(each, name, form, id=f"{each.__name__}.{name}-{index}")
    for each in CLASSES
    for name, hint in typing.get_type_hints(each).items()
    for index, form in enumerate(forms(hint))
]


def made(settings_class: type, **values: Any) -> Any:
    required = {
        field.name: "a"
        for field in dataclasses.fields(settings_class)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return settings_class(**required, **values)


def test_all_classes_of_settings_are_looked_at():
    names = {each.__name__ for each in CLASSES}
    assert names >= {"RunSettings", "TrainSettings", "ModelSettings", "ServeSettings", "LimitSettings", "DataConfig"}
    assert names >= {"SamplingParams", "EngineConfig", "ChatSettings", "GenerateSettings"}
    assert len(NUMBERS) > 50


def test_whatever_has_faults_of_its_own_is_a_class_of_settings():
    for module in {find_command(command).__module__ for command in COMMANDS}:
        for value in vars(sys.modules[module]).values():
            if dataclasses.is_dataclass(value) and hasattr(value, "collect_faults"):
                assert issubclass(value, Settings)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("settings_class", "name", "form"), NUMBERS)
def test_a_number_of_every_settings_class_is_finite(settings_class, name, form, number):
    """An infinite learning rate, timeout or theta was above 0, and taken."""
    value = form(number)
    with pytest.raises(ValueError, match=r"\S") as caught:
        made(settings_class, **{name: value}).validated()
    said = [line.strip() for line in str(caught.value).splitlines() if line.strip().startswith(f"{name} is ")]
    allowed = "a finite number" if isinstance(value, float) else "of finite numbers only"
    assert said == [f"{name} is {value!r}: must be {allowed}"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf", "1e999"])
def test_every_command_refuses_what_is_not_finite(command, value, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        settings_class = type(Command(command).settings(patched))

    def names(of: type, prefix: str = "") -> list[str]:
        found = []
        for name, hint in typing.get_type_hints(of).items():
            if dataclasses.is_dataclass(hint):
                found += names(hint, f"{prefix}{name}.")
            elif any(form(1.0) == 1.0 for form in forms(hint)):
                found.append(prefix + name)
        return found

    for name in names(settings_class):
        path = tmp_path / "a.yaml"
        path.write_text(f"{': {'.join(name.split('.'))}: {value}{'}' * name.count('.')}\n")
        for argv in ([f"--{name}={value}"], ["--config", str(path)]):
            assert main([command, *REQUIRED[command][0], *argv]) == 2
            shown = capsys.readouterr()
            assert f"{name} is {float(value.replace('.', ''))!r}: must be a finite number" in shown.err
            assert shown.out == ""


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["dropout", "rope_theta", "layer_norm_eps", "initializer_range", "decay"])
def test_a_model_has_finite_numbers(name, number):
    with pytest.raises(ValueError, match=f"{name} is {number}: must be"):
        BDHConfig(**{name: number})
    with pytest.raises(ValueError, match=f"{name} is {number}: must be"):
        BDHConfig.from_dict({name: number})


def test_the_names_of_a_models_numbers_are_all_tried():
    floats = {name for name, hint in ConfigFields.__annotations__.items() if forms(hint)}
    assert floats == {"dropout", "rope_theta", "layer_norm_eps", "initializer_range", "decay"}


def test_the_python_entry_points_look_at_their_settings(tmp_path):
    from bdh.data import DataConfig, prepare_corpus
    from bdh.serve.config import LimitSettings, ServeSettings
    from bdh.serve.server import serve
    from bdh.tokenizer import byte_tokenizer
    from bdh.train.config import RunSettings, TrainSettings
    from bdh.train.setup import open_run

    with pytest.raises(ValueError, match=r"train\.learning_rate is inf: must be a finite number"):
        open_run(RunSettings(run_dir=str(tmp_path / "run"), train=TrainSettings(learning_rate=math.inf)))
    with pytest.raises(ValueError, match="val_fraction is nan: must be a finite number"):
        prepare_corpus(DataConfig(val_fraction=math.nan), byte_tokenizer(), 8)
    with pytest.raises(ValueError, match=r"limits\.queue_timeout is inf: must be a finite number"):
        serve(ServeSettings(model="m", limits=LimitSettings(queue_timeout=math.inf)), lambda: pytest.fail("loaded"))
    assert not (tmp_path / "run").exists()


def test_a_number_that_is_not_finite_is_one_fault_and_hides_no_other():
    @dataclasses.dataclass
    class Inner(Settings):
        share: float = 0.5
        size: int = 1

        def collect_faults(self, faults: Faults) -> None:
            faults.require(0 <= self.share <= 1, "share", self.share, "0 to 1")
            faults.require(self.size >= 1, "size", self.size, "at least 1")

    @dataclasses.dataclass
    class Outer(Settings):
        inner: Inner
        rate: float = 1.0

    faults = Faults()
    collect_faults(Outer(Inner(math.nan, 0), math.inf), faults)
    assert faults.found == [
        "inner.share is nan: must be a finite number",
        "rate is inf: must be a finite number",
        "inner.size is 0: must be at least 1",
    ]
    assert Outer(Inner()).validated() == Outer(Inner())
