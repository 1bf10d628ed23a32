"""The figures of a benchmark, as a table and as JSON."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Figures in the order in which they were measured."""

    name: str
    facts: dict[str, Any]
    """What was measured on, and with what."""
    sections: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)

    def section(self, title: str) -> None:
        self.sections.append((title, []))

    def add(self, name: str, value: float, unit: str, note: str = "") -> float:
        """A figure, in its unit, with what is to be said of it."""
        self.sections[-1][1].append({"name": name, "value": value, "unit": unit, "note": note})
        return value

    def print(self) -> None:
        for name, value in self.facts.items():
            print(f"{name:<10} {value}")
        for title, rows in self.sections:
            print(f"\n{title}")
            width = max((len(row["name"]) for row in rows), default=0)
            for row in rows:
                value = f"{_shown(row['value']):>12} {row['unit']}"
                print(f"  {row['name']:<{width}}  {value:<26}  {row['note']}".rstrip())

    def write_json(self, path: str) -> None:
        """To a file, or with "-" to standard output."""
        sections = [{"title": title, "figures": rows} for title, rows in self.sections]
        text = json.dumps({"benchmark": self.name, **self.facts, "sections": sections}, indent=1)
        if path == "-":
            print(text)
        else:
            Path(path).write_text(text + "\n", encoding="utf-8")
            print(f"\nfigures in {path}", file=sys.stderr)


def _shown(value: float) -> str:
    if value != 0 and (abs(value) < 0.01 or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
