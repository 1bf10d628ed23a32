"""TensorBoard's event files."""

from typing import Any

import yaml

from bdh.monitor.backends.base import Backend, RunFacts


class TensorBoardBackend(Backend):
    title = "TensorBoard"

    def __init__(self, facts: RunFacts):
        # Imported here: it takes a second, and is there only where tensorboard is.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what a run that goes on from start_step had logged behind it.
        purge_step = facts.start_step + 1 if facts.start_step else None
        self._writer = SummaryWriter(str(facts.run_dir / "tensorboard"), purge_step=purge_step)
        if facts.settings:
            self.log_text(facts.start_step, "settings", yaml.safe_dump(dict(facts.settings), sort_keys=False))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_text(self, step: int, name: str, text: str) -> None:
        # Markdown would join the lines of the text.
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def log_histogram(self, step: int, name: str, values: Any) -> None:
        self._writer.add_histogram(name, values, step)

    def close(self) -> None:
        self._writer.close()
