"""What the server writes into its log: a line for each event, as JSON or text, to the standard error."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("bdh.serve")


def log_to_stderr(log_format: str) -> None:
    """Lets this package's and uvicorn's records go to the standard error, in this format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    for name in ("bdh", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.access").disabled = True  # the line of a request is ours


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    LOGGER.log(level, event, exc_info=error, extra={"facts": {k: v for k, v in facts.items() if v is not None}})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        facts = " ".join(f"{name}={_one_line(value)}" for name, value in getattr(record, "facts", {}).items())
        line = f"{when} {record.levelname.lower():<8}{record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _one_line(value: Any) -> str:
    """What a client has sent may not look like a line of the log."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
