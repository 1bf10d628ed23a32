"""The pages of the reference name all that the code has: the lists here are read from the code, not from what makes the pages."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import bdh
from bdh.cli.main import COMMANDS, find_command, main
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.monitor.monitor import _KINDS, Backend
from bdh.serve.app import make_app
from bdh.serve.config import ServeSettings
from bdh.serve.middleware import ApiKeys
from bdh.serve.service import Metrics, Service
from bdh.train.config import RunSettings
from bdh.train.logged import Logged
from bdh.validation import field_types

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/site/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of(settings_class, prefix=""):
    """The settings of a dataclass, those of its sections with a dot."""
    for field in dataclasses.fields(settings_class):
        kind = field_types(settings_class)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from names_of(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def sections_of(page, mark="##"):
    """The text below each heading of the second level, or of another."""
    parts = re.split(rf"^{mark} (.*)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_there_with_all_its_flags(reference):
    sections = sections_of(reference.command_line())
    assert set(sections) == {f"bdh {name}" for name in COMMANDS}
    lacking = []
    for name in COMMANDS:
        command, text = find_command(name), sections[f"bdh {name}"]
        for setting in names_of(command.settings_class):
            is_place = setting in command.positionals
            shown = setting.upper().removesuffix("S") if is_place else f"--{setting}"
            if not re.search(rf"^ +{re.escape(shown)}\b", text, re.MULTILINE):
                lacking.append(f"bdh {name}: {shown}")
    assert lacking == []


def test_flags_that_pages_give_to_commands_exist():
    """All of them, also in blocks that are not run. A page shows what a misspelt one leads to."""
    general, wrong, num_flags = {"config", "help", "print_config", "debug"}, [], 0
    known = {name: {*general, *names_of(find_command(name).settings_class)} for name in COMMANDS}
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/*.yaml"), ROOT / "README.md", ROOT / "deploy/README.md"]
    for page in sorted(pages):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, rest in re.findall(rf"\bbdh ({'|'.join(COMMANDS)})\b([^`\n|#]*)", text):
            flags = re.findall(r"(?<![\w-])--([\w.-]+\w)", rest)
            num_flags += len(flags)
            wrong += [
                f"{page.name}: bdh {name} --{flag}" for flag in flags if flag.replace("-", "_") not in known[name]
            ]
    assert num_flags > 200
    assert [each for each in wrong if not each.endswith(" --train.max_step")] == []


def test_every_setting_is_there(reference):
    sections = sections_of(reference.settings())
    for title, owner in (
        ("Training", RunSettings),
        ("Sampling", SamplingParams),
        ("Engine", EngineConfig),
        ("Server", ServeSettings),
    ):
        shown = re.findall(r"^\| `([\w.]+)` \|", sections[title], re.MULTILINE)
        assert sorted(shown) == sorted(names_of(owner)), title


def test_every_route_is_there(reference):
    settings = ServeSettings(model="model", metrics=True)
    app = make_app(Service(settings), ApiKeys(settings.auth))
    while not hasattr(app, "routes"):  # it is wrapped
        app = app._app
    routes = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}
    page = reference.http_api()
    shown = {tuple(heading.split(" ", 1)) for heading in sections_of(page)} - {("Objects",)}
    assert {(method, re.sub(r":\w+}", "}", path)) for method, path in routes} <= shown


def test_every_metric_is_there(reference):
    from bdh.serve import service

    metrics = Metrics("model", lambda: dict.fromkeys([*service.GAUGES, *service.TOTALS], 0.0), {"weights": "float32"})
    metrics.count("requests", "/v1/completions", "200")
    metrics.count("request_success", "stop")
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    # As Prometheus stores them; when a counter was made is no metric of ours.
    served = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if not family.name.endswith("_created")
    }
    assert len(served) > 10
    assert set(re.findall(r"^\| `(bdh:\w+)` \|", reference.metrics(), re.MULTILINE)) == served


class Recorder(Backend):
    """Collects the names of what a run logs, by the method that logs it."""

    title = "the recorder"

    def __init__(self):
        self.names = {"log": set(), "log_histogram": set(), "log_text": set()}

    def log(self, step, values):
        self.names["log"] |= set(values)

    def log_histogram(self, step, name, values):
        self.names["log_histogram"].add(name)

    def log_text(self, step, name, text):
        self.names["log_text"].add(name)


def test_everything_that_a_run_logs_is_there_and_nothing_else(reference, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    texts = [tmp_path / "fox.txt", tmp_path / "dog.txt"]
    for text in texts:
        text.write_text(f"The quick brown fox jumps over the lazy dog: {text.stem}. " * 60)
    recorder = Recorder()
    monkeypatch.setitem(_KINDS, "jsonl", lambda facts: recorder)
    settings = {
        "data.mix": f"[{{source: {texts[0]}}}, {{source: {texts[1]}}}]",
        "model.n_embd": 16,
        "model.n_head": 2,
        "model.mlp_internal_dim_multiplier": 8,
        "model.n_layer": 2,
        "train.layer_path": "plain",
        "train.block_size": 16,
        "train.batch_size": 2,
        "train.max_steps": 2,
        "train.warmup_steps": 1,
        "train.ema_decay": 0.5,
        "train.eval_every_steps": 1,
        "train.eval_windows": 2,
        "train.sample_every_steps": 2,
        "train.sample_max_new_tokens": 2,
        "checkpoint.export": "none",
        "monitor.log_every_steps": 1,
        "monitor.backends": "jsonl",
        "run_dir": tmp_path / "run",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in settings.items())]) == 0

    page = sections_of(reference.metrics())["Training"]
    shown = {
        title: re.findall(r"^\| `([\w/]+)` \|", part, re.MULTILINE) for title, part in sections_of(page, "###").items()
    }
    for titles, method in (
        (["Training steps", "Evaluations"], "log"),
        (["Histograms"], "log_histogram"),
        (["Texts"], "log_text"),
    ):
        listed = [Logged(name, "", "") for title in titles for name in shown[title]]
        names = recorder.names[method]
        assert len(names) >= len(listed) > 0
        assert sorted(name for name in names if not any(each.stands_for(name) for each in listed)) == []
        assert [each.name for each in listed if not any(map(each.stands_for, names))] == []


def test_the_python_page_has_every_name_of_the_package():
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert [name for name in bdh.__all__ if not re.search(rf"\bbdh\.{name}\b", page)] == []


def test_what_the_python_page_names_is_there():
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    assert len(named) > 10
    for name in named:
        module, _, last = name.rpartition(".")
        found = bdh if module == "bdh" else importlib.import_module(module)
        assert hasattr(found, last) or inspect.ismodule(importlib.import_module(name)), name
