"""Weights & Biases, with its server or into files for later."""

import html
from typing import Any

from bdh.monitor.backends.base import RunFacts
from bdh.monitor.backends.stepwise import StepwiseBackend


class WandbBackend(StepwiseBackend):
    title = "W&B"

    def __init__(self, facts: RunFacts):
        import wandb

        self._wandb = wandb
        super().__init__(facts, "wandb.json")
        config = facts.config
        settings = wandb.Settings(
            init_timeout=config.wandb_timeout_seconds,
            login_timeout=config.wandb_timeout_seconds,
            finish_timeout=config.wandb_timeout_seconds,
            finish_timeout_raises=True,
            console="off",  # the terminal is ours
            silent=True,
        )
        arguments: dict[str, Any] = {
            "project": config.project,
            "name": config.run_name or facts.run_dir.resolve().name,
            "id": self.run_id,
            "resume": "allow",
            "dir": str(facts.run_dir),
            "config": dict(facts.settings),
            "settings": settings,
        }
        self._facts, self._only_in_files = facts, False
        try:
            self._run = wandb.init(mode=config.wandb_mode, **arguments)
        except wandb.errors.Error as error:
            if config.wandb_mode == "offline":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            facts.warn(f"W&B cannot be used online ({reason}): the run goes into files, to be sent later")
            self._only_in_files = True
            wandb.teardown()  # its service keeps the id in use
            self._run = wandb.init(mode="offline", **arguments)

    def _text(self, text: str) -> Any:
        return self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)

    def _histogram(self, values: Any) -> Any:
        return self._wandb.Histogram(values.numpy())

    def _send(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def _finish(self) -> None:
        self._run.finish()
        if self._only_in_files:
            folder = self._facts.run_dir
            self._facts.warn(f"W&B has nothing of this start yet: `wandb sync {folder}/wandb/offline-run-*` sends it")
