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
from bdh.cli.main import COMMANDS, find_command
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.serve.app import make_app
from bdh.serve.config import ServeSettings
from bdh.serve.middleware import ApiKeys
from bdh.serve.service import Metrics, Service
from bdh.train.config import RunSettings
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


def sections_of(page):
    """The text below each heading of the second level."""
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
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
