"""How well a model predicts a text.

Here is what settings check of tasks before the harness, which is slow to import, reads them.
"""

from collections.abc import Sequence
from pathlib import Path


def is_task_path(task: str) -> bool:
    """Whether a task is given as a YAML file or a folder of them, and not by its name."""
    return Path(task).is_dir() or Path(task).suffix in (".yaml", ".yml")


def check_task_files(tasks: Sequence[str], include_path: str | None) -> None:
    """
    Raises:
        FileNotFoundError: a file or folder that tasks are to be read from is not there.
    """
    for path in [*([] if include_path is None else [include_path]), *filter(is_task_path, tasks)]:
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path} to read tasks from")
