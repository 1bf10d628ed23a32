"""Evaluation: loss and perplexity on texts, tasks of lm-eval, and probes.

This module has the checks of task settings, so that the harness, which is slow to import, is not needed for them.
"""

from collections.abc import Sequence
from pathlib import Path


def is_task_path(task: str) -> bool:
    """Whether a task is given as a YAML file or a folder of such files, rather than by name."""
    return Path(task).is_dir() or Path(task).suffix in (".yaml", ".yml")


def check_task_files(tasks: Sequence[str], include_path: str | None) -> None:
    """Checks that the files and folders of tasks exist.

    Raises:
        FileNotFoundError: a file or folder does not exist.
    """
    for path in [*([] if include_path is None else [include_path]), *filter(is_task_path, tasks)]:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path} to read tasks from")
