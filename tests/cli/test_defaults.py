"""Every default is the same wherever it stands: in the class, in effect, in the help, and in shipped files and docs."""

import dataclasses
import importlib
import inspect
import re
import sys
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdh.cli import settings as cli_settings
from bdh.cli.main import COMMANDS, find_command
from bdh.cli.settings import leaves_of, parse_settings, to_yaml
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.model.configuration import BDHConfig
from bdh.serve.config import ServeSettings
from bdh.train.config import ModelSettings, RunSettings

ROOT = Path(__file__).parent.parent.parent
# What each command cannot do without, as its command line and as fields of its settings.
REQUIRED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "train": ([], {}),
    "generate": (["m", "--prompt", "a"], {"model": "m", "prompt": "a"}),
    "chat": (["m"], {"model": "m"}),
    "eval": (["m"], {"model": "m"}),
    "serve": (["m"], {"model": "m"}),
    "bench": (["decode"], {"benchmark": "decode"}),
    "tokenizer": (["train", "--out", "o"], {"out": "o"}),
    "export": (["r", "o"], {"run": "r", "out": "o"}),
    "average": (["a", "--out", "o"], {"models": ["a"], "out": "o"}),
    "quantize": (["m", "o"], {"model": "m", "out": "o"}),
    "convert": (["s", "o"], {"source": "s", "out": "o"}),
    "runs": ([], {}),
    "plot": ([], {}),
    "demo": ([], {}),
    "doctor": ([], {}),
    "completion": (["bash"], {"shell": "bash"}),
}


class Parsed(Exception):
    """Ends a command once it has its settings."""

    def __init__(self, settings):
        self.settings = settings


@dataclass
class Command:
    name: str

    def settings(self, monkeypatch, *more: str) -> Any:
        """What the command would run with."""

        def parse(*args, **keywords):
            raise Parsed(parse_settings(*args, **keywords | {"check_available": False}))

        run = find_command(self.name)
        for module in (cli_settings, sys.modules[run.__module__]):
            monkeypatch.setattr(module, "parse_settings", parse, raising=False)
        with pytest.raises(Parsed) as caught:
            run([*REQUIRED[self.name][0], *more])
        return caught.value.settings

    def help(self, capsys) -> str:
        with pytest.raises(SystemExit):
            find_command(self.name)([*(["train"] if self.name == "tokenizer" else []), "--help"])
        return " ".join(capsys.readouterr().out.split())


@pytest.fixture(params=COMMANDS)
def command(request):
    return Command(request.param)


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The values of all settings by their dotted names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def test_a_command_without_flags_runs_with_what_its_class_says(command, monkeypatch):
    """`bdh serve` ran with an engine.prefix_cache_bytes of 0, though its class says 1 GiB."""
    settings = command.settings(monkeypatch)
    assert settings == type(settings)(**REQUIRED[command.name][1])


def test_the_help_says_what_is_in_effect(command, monkeypatch, capsys):
    given = set(REQUIRED[command.name][1])
    places = {"runs": ["folder"], "plot": ["runs"], "demo": ["run_dir"]}.get(command.name, [])
    settings = command.settings(monkeypatch)
    shown = " " + command.help(capsys).partition(" settings: ")[2]
    for name, value in leaves(settings).items():
        if name in given:
            continue
        written = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
        metavar = "[true|false]" if isinstance(value, bool) else name.rpartition(".")[2].upper()
        words = ("RUN ..." if name == "runs" else name.upper()) if name in places else f"--{name} {metavar}"
        about = shown.partition(f" {words} ")[2]
        assert about, f"{name} is not in the help"
        assert "None" not in about.partition("default: ")[0], f"{name}: what is written for it is null"
        if name not in places or value:
            # Without blanks: lines are broken at hyphens too.
            said = about.partition("default: ")[2].replace(" ", "")
            assert said.startswith(f"{written})".replace(" ", "")), name


def test_the_printed_configuration_says_what_is_in_effect(command, monkeypatch, capsys):
    settings = command.settings(monkeypatch)
    written = yaml.safe_load(to_yaml(settings, with_help=True))
    assert written == asdict(settings)


def test_a_flag_of_a_section_leaves_its_other_defaults(command, monkeypatch):
    """One setting of a section that is given does not put the others back to those of the section's class."""
    settings = command.settings(monkeypatch)
    defaults = leaves(settings)
    for field in dataclasses.fields(settings):
        section = getattr(settings, field.name)
        if not dataclasses.is_dataclass(section):
            continue
        others = {int: lambda value: value + 1, float: lambda value: value / 2, bool: lambda value: not value}
        others[str] = lambda value: f"{value}2"
        values = leaves(section, f"{field.name}.")
        name = next(name for kind in others for name, value in values.items() if type(value) is kind)
        other = others[type(values[name])](values[name])
        assert leaves(command.settings(monkeypatch, f"--{name}={other}")) == defaults | {name: other}


def commented_defaults(path: Path) -> bool:
    return "with their defaults" in path.read_text(encoding="utf-8")


def test_a_shipped_file_that_claims_to_hold_the_defaults_does():
    """Its values are the effective ones, and it has all settings but the model, which stands on the command line."""
    (path,) = [path for path in (ROOT / "configs").glob("*.yaml") if commented_defaults(path)]
    assert path.name == "serve.yaml"
    held = parse_settings(
        ServeSettings, ["--model", "m", "--config", str(path)], prog="p", description="d", check_available=False
    )
    assert (
        held
        == parse_settings(ServeSettings, ["--model", "m"], prog="p", description="d", check_available=False)
        == ServeSettings(model="m")
    )
    expected = asdict(held)
    del expected["model"]
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == expected


def test_the_deployment_has_the_defaults_but_for_what_it_says():
    path = ROOT / "deploy" / "serve.yaml"
    deployed = leaves(
        parse_settings(
            ServeSettings, ["--model", "m", "--config", str(path)], prog="p", description="d", check_available=False
        )
    )

    def given(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= given(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return flat

    assert deployed == leaves(ServeSettings(model="m")) | given(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert deployed["engine.prefix_cache_bytes"] == 1 << 30


@pytest.mark.parametrize(
    ("page", "text", "value"),
    [
        (
            "engine.md",
            r"memory for the states of shared prefixes; (\d+) \(no cache\) by default",
            EngineConfig().prefix_cache_bytes,
        ),
        (
            "engine.md",
            r"\(no cache\) by default, and (\d+) GiB for `bdh serve`",
            ServeSettings(model="m").engine.prefix_cache_bytes >> 30,
        ),
        (
            "serving.md",
            r"`engine.prefix_cache_bytes`, by default (\d+) GiB",
            ServeSettings(model="m").engine.prefix_cache_bytes >> 30,
        ),
        (
            "../deploy/README.md",
            r"`engine.prefix_cache_bytes` \((\d+) GiB where",
            ServeSettings(model="m").engine.prefix_cache_bytes >> 30,
        ),
        ("../deploy/README.md", r"`states.max_bytes` \((\d+) GiB\)", ServeSettings(model="m").states.max_bytes >> 30),
        ("engine.md", r"\| `tokens_per_step` \| (\d+) by default", EngineConfig().tokens_per_step),
        (
            "data.md",
            r"the last `data.val_fraction` of the documents, ([\d.]+) by default",
            RunSettings().data.val_fraction,
        ),
        (
            "monitoring.md",
            r"`monitor.backends` selects where a run is shown and recorded, in any combination. `(\w+)`, the default",
            "auto",
        ),
        ("evaluation.md", r"`--part` selects the part of the text: `(\w+)` \(the default", "validation"),
        (
            "model.md",
            r"Set `attention_form` in the configuration, or pass it to `forward`, to choose a form. The default, `(\w+)`",
            "auto",
        ),
    ],
)
def test_the_docs_say_the_default(page, text, value):
    content = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    (said,) = re.findall(text, content)
    assert said == str(value)


@pytest.mark.parametrize(
    ("one", "other", "but"),
    [
        (importlib.import_module("bdh.cli.chat").ChatSettings, SamplingParams, {"max_tokens"}),
        (importlib.import_module("bdh.cli.generate").GenerateSettings, SamplingParams, set()),
        (importlib.import_module("bdh.cli.chat").ChatSettings, EngineConfig, set()),
        (ModelSettings, BDHConfig, {"vocab_size"}),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_settings_of_one_name_have_one_default(one, other, but):
    """But for those whose meaning differs: a reply may be longer, and a run takes its vocabulary from the tokenizer."""
    defaults = [
        {
            field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for field in dataclasses.fields(each)
        }
        for each in (one, other)
    ]
    shared = {name for name in defaults[0] if name in defaults[1]} - but
    assert len(shared) >= 4
    assert {name: defaults[0][name] for name in shared} == {name: defaults[1][name] for name in shared}


def test_arguments_have_the_defaults_of_the_settings_that_are_passed_to_them():
    from bdh.cli.chat import ChatSettings
    from bdh.generate.advance import Advancer
    from bdh.generate.chat import Conversation

    for function, settings, names in (
        (Advancer, EngineConfig(), ("path", "weights", "state", "window")),
        (Conversation.__init__, ChatSettings(model="m"), ("max_undo_bytes", "plain", "system")),
    ):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in names} == {name: getattr(settings, name) for name in names}


def test_the_server_says_how_many_tokens_it_gives_where_a_request_does_not_say():
    from bdh.serve.completions import COMPLETION_TOKENS
    from bdh.serve.schemas import CompletionRequest

    (help_text,) = [leaf.help for leaf in leaves_of(ServeSettings) if leaf.name == "limits.chat_tokens"]
    assert f"For completions it is {COMPLETION_TOKENS}, as" in help_text
    assert CompletionRequest.model_fields["max_tokens"].description == f"Defaults to {COMPLETION_TOKENS}."


def test_what_a_benchmark_takes_by_default_is_in_its_help():
    """Its own defaults depend on what is timed, so that the field is null and its help says them."""
    from bdh.cli.bench import BenchSettings

    helps = {leaf.name: leaf.help for leaf in leaves_of(BenchSettings)}
    for quick in (False, True):
        for name in ("batch_size", "block_size", "rounds", "dropout"):
            value = BenchSettings(benchmark="train", quick=quick).step(name)
            assert re.search(
                rf"with --quick {value}\b" if quick and name != "dropout" else rf"By default {value}\b", helps[name]
            )
        for benchmark in typing.get_type_hints(BenchSettings)["benchmark"].__args__:
            for name, value in BenchSettings(benchmark=benchmark, quick=quick).sizes().items():
                assert re.search(rf"\b{value}\b", helps[name]), (name, value, helps[name])
