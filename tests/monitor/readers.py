"""Reads back what W&B and Trackio have written."""

import json
import sqlite3
import time
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32_768, 7


def wandb_runs(run_dir: Path) -> list[dict[str, Any]]:
    """Of each start of an offline run, in order: its id, project, name, config, and its history (step, values)."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = []
    # The folders' names have seconds only, so two starts within one are in the order of their files.
    paths = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    for path in paths:
        deadline = time.monotonic() + 20  # its service may still write the end
        while True:
            records = [Record.FromString(raw) for raw in _records(path.read_bytes())]
            if any(record.WhichOneof("record_type") == "exit" for record in records):
                break
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.1)
        found: dict[str, Any] = {"history": []}
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                config = {item.key: json.loads(item.value_json) for item in run.config.update}
                found |= {"id": run.run_id, "project": run.project, "name": run.display_name, "config": config}
            elif kind == "history":
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                found["history"].append((record.history.step.num or values["_step"], values))
        runs.append(found)
    return runs


def _records(data: bytes) -> list[bytes]:
    """The records of a LevelDB log, which W&B's files are behind their first seven bytes."""
    found, record, at = [], b"", 7
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # whole, or the last part
            found.append(record)
            record = b""
    return found


def trackio_rows(folder: Path, project: str) -> list[tuple[str, str, int, dict[str, Any]]]:
    """(run id, run name, step, values) in the order in which they were written."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    return [(run_id, name, step, json.loads(metrics)) for run_id, name, step, metrics in rows]
