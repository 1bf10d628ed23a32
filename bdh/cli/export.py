"""bdh export: writes a run's weights as a model folder."""

from dataclasses import dataclass
from pathlib import Path

from bdh.cli.settings import parse_settings


@dataclass
class ExportSettings:
    run: str
    """Folder of the run."""
    out: str
    """Folder to write: config.json, model.safetensors, tokenizer files, generation_config.json, README.md."""
    checkpoint: str = "last"
    """Which weights: last, best (of the validation loss), or a step."""
    ema: bool = False
    """The moving average of the weights, of a run with train.ema_decay."""
    merge: bool | None = None
    """Of a run with train.lora: true merges the adapters into the weights, false writes them alone; by default its setting."""


def run(argv: list[str]) -> int:
    settings = parse_settings(
        ExportSettings,
        argv,
        prog="bdh export",
        description="Write the weights of a run as a folder that from_pretrained loads, with its model card.",
        positionals=("run", "out"),
    )
    from bdh.train.export import export_run
    from bdh.train.lock import lock_run_around

    with lock_run_around(Path(settings.out)):
        step = export_run(
            Path(settings.run), Path(settings.out), which=settings.checkpoint, ema=settings.ema, merge=settings.merge
        )
    print(f"{settings.out}: the {'averaged ' if settings.ema else ''}weights of step {step}")
    return 0
