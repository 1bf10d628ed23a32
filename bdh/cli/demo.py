"""bdh demo: trains a small model and generates text with it, in a few minutes and without a network."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from bdh.cli.main import find_command
from bdh.cli.settings import command
from bdh.monitor.history import check_matplotlib
from bdh.train.places import CONFIG_FILE, LOCK_FILE, CheckpointFolder
from bdh.validation import PathText, Settings

_PROMPTS = ("The ", "A class is ", "If the file ")


@dataclass
class DemoSettings(Settings):
    run_dir: PathText = "runs/demo"
    """Folder of the run. An interrupted run is continued; the model of a complete one is used."""


@command("run_dir")
def run_demo(settings: DemoSettings) -> int:
    """Train a small model on the language reference that comes with Python (three to six minutes on two CPU cores),
    generate text with it, and plot its loss.
    """
    run = Path(settings.run_dir)
    model = run / "model"
    if (status := _train(run)) != 0:
        return status
    for prompt in _PROMPTS:
        arguments = [str(model), "--prompt", prompt, "--max_new_tokens", "80", "--temperature", "0.7", "--seed", "1"]
        print(f"\n--- bdh generate {shlex.join(arguments[:3])}", flush=True)
        if (status := find_command("generate")(arguments)) != 0:
            return status
    print(flush=True)
    try:
        check_matplotlib()
    except ImportError as error:
        print(f"No picture of the loss: {error}")
    else:
        find_command("plot")([str(run), "--output", str(run / "loss.png")])
    print(_what_next(str(run)))
    return 0


def _train(run: Path) -> int:
    """Trains the model, unless the folder already contains it. Returns the exit status."""
    train, begin = find_command("train"), ["--config", "tiny", "--run_dir", str(run)]
    if (run / "model" / "config.json").is_file():
        print(f"{run} holds a trained model already: using it. Remove the folder to train again.", flush=True)
        return 0
    # A lock belongs to a running training, in which case `bdh train` raises an error, or to one that was killed.
    if (run / CONFIG_FILE).is_file() and ((run / LOCK_FILE).exists() or CheckpointFolder(run).newest() is not None):
        print(f"{run} was interrupted: continuing it.", flush=True)
        return train(["--run_dir", str(run), "--resume"])
    return train(begin)  # if the folder contains files of a run, this says what to do


def _what_next(run: str) -> str:
    logs = f"{run}/tensorboard"  # does not exist if the package is missing
    commands = (
        (f"bdh generate {run}/model --prompt 'import ' --max_new_tokens 80", "more text"),
        (f"bdh serve {run}/model", "OpenAI's API and a page, at http://127.0.0.1:8000"),
        (f"bdh eval {run}", "loss, perplexity, bits per byte"),
        *([(f"tensorboard --logdir {logs}", "the curves of the run")] if Path(logs).is_dir() else ()),
        ("bdh train --config small --data.source FILE", "a larger model on a text of yours"),
        ("bdh train --help", "every setting"),
    )
    width = max(len(each) for each, _ in commands)
    return "\n".join(["", "What next:", *(f"  {each:<{width}}  {about}" for each, about in commands)])
