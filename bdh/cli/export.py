"""bdh export: writes a run's weights, or adapters merged into their base, as a model folder."""

from dataclasses import dataclass
from pathlib import Path

from bdh.cli.settings import parse_settings
from bdh.storage import check_free, recover_dir
from bdh.train.places import ADAPTER_CONFIG, check_peft, find_checkpoint, lock_run_around
from bdh.validation import Faults, PathText, Settings


@dataclass
class ExportSettings(Settings):
    run: PathText
    """Folder of the run; or of adapters, which are merged into the model that they were trained beside."""
    out: PathText
    """Folder to write: config.json, model.safetensors, tokenizer files, generation_config.json, README.md."""
    checkpoint: str = "last"
    """Which weights: last, best (of the validation loss), or a step."""
    ema: bool = False
    """The moving average of the weights, of a run with train.ema_decay."""
    merge: bool | None = None
    """Of a run with train.lora: true merges the adapters into the weights, false writes them alone; by default its setting."""
    base: PathText | None = None
    """For adapters: where the model that they were trained beside is now, by default where it was."""

    def collect_faults(self, faults: Faults) -> None:
        recover_dir(Path(self.run))
        if (Path(self.run) / ADAPTER_CONFIG).is_file():
            faults.require(self.checkpoint == "last", "checkpoint", self.checkpoint, "left out with adapters")
            faults.require(not self.ema, "ema", self.ema, "left out with adapters")
            faults.require(self.merge in (None, True), "merge", self.merge, "left out with adapters, or true")
        else:
            faults.require(self.base is None, "base", self.base, "left out with a run, which holds its base's weights")

    def check_available(self) -> None:
        check_free(Path(self.out))
        if (Path(self.run) / ADAPTER_CONFIG).is_file():
            check_peft()
        else:
            find_checkpoint(Path(self.run), self.checkpoint)


def run(argv: list[str]) -> int:
    settings = parse_settings(
        ExportSettings,
        argv,
        prog="bdh export",
        description="Write the weights of a run, or adapters merged into their base, as a folder that from_pretrained "
        "loads, with its model card.",
        positionals=("run", "out"),
    )
    from bdh.train.export import export_merged, export_run

    run, out = Path(settings.run), Path(settings.out)
    with lock_run_around(out):
        if (run / ADAPTER_CONFIG).is_file():
            base = export_merged(run, out, base=settings.base)
            print(f"{settings.out}: the adapters of {settings.run} merged into {base.describe()}")
            return 0
        step = export_run(run, out, which=settings.checkpoint, ema=settings.ema, merge=settings.merge)
    print(f"{settings.out}: the {'averaged ' if settings.ema else ''}weights of step {step}")
    return 0
