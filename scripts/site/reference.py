"""The pages of the reference that are made from the code: commands, settings, routes, metrics."""

import contextlib
import html
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any
from unittest.mock import patch

from bdh.cli.leaves import Leaf, in_a_line, leaves_of
from bdh.cli.main import COMMANDS, find_command
from bdh.validation import field_types, type_in_words

HELP_COLUMNS = "100"
_NO_EFFECT = "Has no effect"


def command_line() -> str:
    """Every command with its own help."""
    lines = [
        "# Command line",
        "",
        "The help of every command, as `bdh COMMAND --help` prints it. Settings with a dot belong to a section, and may stand in a YAML",
        "file given with `--config`; [Settings](settings.md) lists those of a training run with their types.",
        "",
        *_table(("command", "what it does"), ((f"[`bdh {n}`](#bdh-{n})", about) for n, about in COMMANDS.items())),
        "",
    ]
    for name in COMMANDS:
        lines += [f"## bdh {name}", "", "```text", help_of(name), "```", ""]
    return "\n".join(lines)


def help_of(command: str) -> str:
    """What ``bdh COMMAND --help`` prints."""
    words = ["train", "--help"] if command == "tokenizer" else ["--help"]
    shown = io.StringIO()
    with (
        patch.dict(os.environ, COLUMNS=HELP_COLUMNS),
        contextlib.redirect_stdout(shown),
        contextlib.suppress(SystemExit),
    ):
        find_command(command)(words)
    return shown.getvalue().rstrip()


def settings() -> str:
    """The settings of a training run, section by section; of sampling, the engine and the server."""
    from bdh.generate.params import EngineConfig, SamplingParams
    from bdh.serve.config import ServeSettings
    from bdh.train.config import RunSettings

    lines = [
        "# Settings",
        "",
        "Every setting with its type and default. On the command line it is a flag, `--train.batch_size 8`; in a YAML file a key in",
        "its section. Flags override files, files given later override those given earlier.",
        "",
        "## Training",
        "",
        "Of `bdh train`; `data` and `tokenizer` also of the commands that read text.",
        "",
    ]
    for section, leaves in _sections(RunSettings):
        lines += [f"### `{section}`" if section else "### The run", "", *_settings_table(leaves), ""]
    for title, about, owner in (
        ("Sampling", "Of `bdh generate` and `bdh chat`, and fields of a request to the server.", SamplingParams),
        ("Engine", "Of everything that generates, as `--engine.NAME`.", EngineConfig),
        ("Server", "Of `bdh serve`.", ServeSettings),
    ):
        lines += [f"## {title}", "", about, "", *_settings_table(leaves_of(owner)), ""]
    return "\n".join(lines)


def _sections(owner: type) -> Iterator[tuple[str, list[Leaf]]]:
    """The leaves of a settings class by the name of their section; those without one last."""
    grouped: dict[str, list[Leaf]] = {name: [] for name, kind in field_types(owner).items() if is_dataclass(kind)}
    for leaf in leaves_of(owner):
        grouped.setdefault(leaf.name.rpartition(".")[0], []).append(leaf)
    yield from ((name, leaves) for name, leaves in grouped.items() if leaves)


def _settings_table(leaves: Iterable[Leaf]) -> list[str]:
    rows = (
        (
            f"`{leaf.name}`",
            type_in_words(leaf.type),
            "required" if leaf.default is MISSING else f"`{in_a_line(leaf.default)}`",
            leaf.help,
        )
        for leaf in leaves
    )
    return _table(("setting", "type", "default", "what it does"), rows)


def http_api() -> str:
    """The routes of the server and the fields of their requests, from its own description, /openapi.json."""
    described = openapi()
    schemas = described["components"]["schemas"]
    lines = [
        "# HTTP API",
        "",
        "What `bdh serve` answers, from its own description at `/openapi.json`, which also has the limits of the running server.",
        "[Serving](../serving.md) explains how it behaves; fields are those of OpenAI's API where that has them.",
        "",
    ]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}", ""]
            if about := operation.get("description"):
                lines += [about, ""]
            for parameter in operation.get("parameters", []):
                lines += [f"`{parameter['name']}` in the {parameter['in']}.", ""]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            if name := _referred(body):
                lines += [f"Takes [{name}](#{name.lower()}).", ""]
            lines += [f"Statuses: {', '.join(f'`{status}`' for status in operation['responses'])}.", ""]
    lines += ["## GET /metrics", "", "[Metrics](metrics.md) in the text format of Prometheus.", ""]
    lines += [
        "## GET /openapi.json",
        "",
        "The description of the routes above, with the limits of the running server.",
        "",
    ]
    lines += ["## GET /", "", "A page to try the model in a browser.", ""]
    lines += ["## Objects", ""]
    for name, schema in schemas.items():
        if properties := schema.get("properties"):
            lines += [f"### {name}", ""]
            if about := schema.get("description"):
                lines += [" ".join(about.split()), ""]
            lines += _fields(properties, schema.get("required", []))
    return "\n".join(lines)


def _fields(properties: dict[str, Any], required: Sequence[str]) -> list[str]:
    """A table of an object's fields; those that have no effect are named after it."""
    ignored = {name: each for name, each in properties.items() if _about(each).startswith(_NO_EFFECT)}
    rows = (
        (f"`{name}`", _json_type(each), "yes" if name in required else "no", _about(each))
        for name, each in properties.items()
        if name not in ignored
    )
    lines = [*_table(("field", "type", "required", "what it is"), rows), ""]
    if ignored:
        reasons = (f"`{name}` ({_about(each).removeprefix(_NO_EFFECT).strip(' :.')})" for name, each in ignored.items())
        lines += [f"Accepted only with values that have no effect: {', '.join(reasons)}.", ""]
    return lines


def openapi() -> dict[str, Any]:
    """The description of a server with the default settings, before it has a model."""
    from starlette.testclient import TestClient

    from bdh.serve.app import make_app
    from bdh.serve.config import ServeSettings
    from bdh.serve.middleware import ApiKeys
    from bdh.serve.service import Service

    settings = ServeSettings(model="model")
    described: dict[str, Any] = (
        TestClient(make_app(Service(settings), ApiKeys(settings.auth))).get("/openapi.json").json()
    )
    return described


def _referred(schema: dict[str, Any]) -> str:
    return schema.get("$ref", "").rpartition("/")[2]


def _json_type(schema: dict[str, Any]) -> str:
    if name := _referred(schema):
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']!r}`"
    if "enum" in schema:
        return " or ".join(f"`{each!r}`" for each in schema["enum"])
    if kinds := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_json_type, kinds)))
    if schema.get("type") == "array":
        return f"list of {_json_type(schema.get('items', {}))}"
    return schema.get("type", "any")


def _about(schema: dict[str, Any]) -> str:
    limits = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "at least"), ("maximum", "at most"), ("maxItems", "items at most"))
        if key in schema
    ]
    return "; ".join(filter(None, [schema.get("description", ""), *limits]))


def metrics() -> str:
    """What a training logs, and what the server counts and times."""
    from bdh.train.logged import EVALUATIONS, HISTOGRAMS, STEPS, TEXTS

    lines = [
        "# Metrics",
        "",
        "Every value that a training run logs, and every metric that the server offers to Prometheus.",
        "",
        "## Training",
        "",
        "Names in `metrics.jsonl`, TensorBoard, W&B and Trackio; [Monitoring](../monitoring.md) says how to see them. In the names",
        "`WEIGHT` stands for the name of a weight, such as `encoder.weight`, `LAYER` for a layer step, counted from 0, `KIND` for the",
        "activations `x`, `y` or their product `xy`, `SOURCE` for a source of `data.mix`, `NUMBER` for a prompt of",
        "`train.sample_prompts`, and `METRIC` for `loss`, `perplexity`, `bits_per_byte` or `accuracy`.",
        "",
    ]
    for title, when, entries in (
        ("Training steps", "Every `monitor.log_every_steps`.", STEPS),
        ("Evaluations", "Every `train.eval_every_steps`, and at the end.", EVALUATIONS),
        ("Histograms", "With the evaluations, not in `metrics.jsonl`.", HISTOGRAMS),
        ("Texts", "Every `train.sample_every_steps`.", TEXTS),
    ):
        rows = ((f"`{each.name}`", each.unit, each.about) for each in entries)
        lines += [f"### {title}", "", when, "", *_table(("name", "unit", "what it is"), rows), ""]
    lines += [
        "## Server",
        "",
        "What `GET /metrics` of `bdh serve --metrics true` gives, in the text format of Prometheus. All have the label `model_name`.",
        "",
        *_table(
            ("metric", "kind", "labels", "what it is"),
            (
                (f"`{name}`", kind, ", ".join(f"`{each}`" for each in labels), about)
                for name, kind, labels, about in served_metrics()
            ),
        ),
        "",
    ]
    return "\n".join(lines)


def served_metrics() -> Iterator[tuple[str, str, Sequence[str], str]]:
    """Name as Prometheus stores it, kind, labels but for the model's name, and meaning."""
    from bdh.serve import service

    yield "bdh:engine_info", "gauge", ("weights", "state"), service.ENGINE_INFO
    for name, (about, _) in service.HISTOGRAMS.items():
        yield f"bdh:{name}_seconds", "histogram", (), about
    for name, (about, labels) in service.COUNTERS.items():
        yield f"bdh:{name}_total", "counter", labels, about
    for name, about in service.GAUGES.items():
        yield f"bdh:{name}", "gauge", (), about
    for name, about in service.TOTALS.items():
        yield f"bdh:{name}_total", "counter", (), about


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(_cell(cell) for cell in cells)} |"

    return [line(header), f"| {' | '.join('---' for _ in header)} |", *map(line, rows)]


def _cell(text: str) -> str:
    """On one line, with what is not code kept from being read as HTML."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(part if part.startswith("`") else html.escape(part, quote=False) for part in parts)


GENERATED = {
    "reference/cli.md": command_line,
    "reference/settings.md": settings,
    "reference/http.md": http_api,
    "reference/metrics.md": metrics,
}
"""The pages, by their place in docs/, and what makes each."""
