"""bdh train: trains a model, and exports it."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from bdh.cli.settings import parse_settings
from bdh.train.config import RunSettings

_EXIT_STATUS = {"SIGINT": 130, "SIGTERM": 143}


def run(argv: list[str]) -> int:
    settings = parse_settings(
        RunSettings,
        argv,
        prog="bdh train",
        description="Train a model. A YAML file, or several in order, overrides the defaults; flags override the files.",
        base=_settings_to_resume(argv),
    )
    # Imported here, so that `--help` and faults in the settings do not wait for PyTorch.
    from bdh.cli.progress import stage_progress
    from bdh.monitor import Monitor
    from bdh.train.export import export_run
    from bdh.train.loop import fit
    from bdh.train.run import open_run

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with stage_progress(console, "bytes") as progress:
        training = open_run(settings, progress=progress)
    print_banner(console, training)
    with Monitor(
        training.folder, settings.monitor, total_steps=settings.train.max_steps, start_step=training.progress.step
    ) as monitor:
        why = fit(training, monitor)

    step = training.progress.step
    resume = f"bdh train --run_dir {training.folder} --resume"
    if why in _EXIT_STATUS:
        console.print(f"Stopped by {why} after step {step}; everything is saved. Go on with: {resume}", markup=False)
        return _EXIT_STATUS[why]
    if why == "stop_at_step" and step < settings.train.max_steps:
        console.print(f"Stopped at step {step} as set; everything is saved. Go on with: {resume}", markup=False)
    elif why == "patience":
        best = training.progress.best_step
        console.print(f"Stopped after step {step}: the validation loss was best at step {best}.", markup=False)
    if settings.checkpoint.export != "none":
        folder = training.folder / "model"
        ema = settings.checkpoint.export == "ema"
        which = "last" if ema else settings.checkpoint.export
        if which == "best" and training.progress.best_step is None:
            which = "last"
            console.print("No validation loss was measured yet: the last weights are exported, not the best.")
        export_run(training.folder, folder, which=which, ema=ema, replace=True)
        ask = "--chat --prompt 'Hello!'" if training.corpus.is_chat else "--prompt 'The '"
        console.print(f"Exported to {folder}: bdh generate {folder} {ask}", markup=False)
    return 0


def print_banner(console: Console, training: Any) -> None:
    """One block that says what will be computed, how, and where it is written."""
    from bdh.ops.dispatch import choose_form

    settings, model, runtime = training.settings, training.model, training.runtime
    train, config, facts = settings.train, model.config, training.corpus.facts
    num_parameters = sum(p.numel() for p in model.parameters())
    rows = train.batch_size * train.gradient_accumulation_steps
    form = choose_form(
        config.attention_form, train.block_size, config.n_embd, has_state=False, chunk_size=config.chunk_size
    )
    lines = {
        "model": f"{num_parameters:,} parameters: {config.n_layer} passes, width {config.n_embd}, {config.n_head} heads "
        f"of {config.neurons_per_head:,} neurons, vocabulary {config.vocab_size:,}",
        "state": f"{config.state_bytes_per_sequence:,} bytes a sequence, at any length",
        "data": _describe_data(facts),
        "step": f"{rows * train.block_size:,} tokens: {train.batch_size} sequences of {train.block_size:,}"
        + (f", {train.gradient_accumulation_steps} times" if train.gradient_accumulation_steps > 1 else ""),
        "device": f"{runtime.device} ({runtime.reason}){', compiled' if train.compile else ''}",
        "attention": f"{form}{' (chosen)' if config.attention_form == 'auto' else ''}",
        "optimizer": f"{train.optimizer}, {train.schedule} schedule, {train.max_steps:,} steps",
        "run": str(training.folder)
        + (f", going on from step {training.progress.step}" if training.progress.step else ""),
    }
    if train.init_from is not None:
        lines["weights"] = f"those of {train.init_from}, trained further"
    if train.lora.r:
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines["weights"] = (
            f"those of {train.init_from}, unchanged; {num_trained:,} trained: adapters of rank {train.lora.r} in "
            f"{', '.join(train.lora.target_modules)}{', and embed and lm_head' if train.lora.embeddings else ''}"
        )
    for name, text in lines.items():
        console.print(f"  {name:<10} {text}", markup=False, soft_wrap=True)


def _describe_data(facts: dict[str, Any]) -> str:
    if facts.get("streaming"):
        return f"{facts['source']}, streaming; {facts['val_tokens']:,} tokens for validation"
    if facts.get("format") == "chat":
        num_train = facts["documents"] - facts["val_documents"]
        return (
            f"{facts['source']}: {num_train:,} conversations (chat) in {facts['rows']:,} rows, "
            f"{facts['train_answer_tokens']:,} of {facts['train_tokens']:,} tokens are the assistant's and count; "
            f"{facts['val_documents']:,} for validation"
        )
    return f"{facts['source']}: {facts['train_tokens']:,} tokens to train on, {facts['val_tokens']:,} for validation"


def _settings_to_resume(argv: list[str]) -> dict[str, Any] | None:
    """The stored settings of the run that is to be resumed, below everything given now.

    An early stop is not among them: it was meant for the start that it was given to.
    """
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--run_dir", "--run-dir")
    scan.add_argument("--resume", nargs="?", const="true", default="false")
    given, _ = scan.parse_known_args(argv)
    if given.run_dir is None or given.resume.lower() == "false":
        return None
    from bdh.train.run import stored_settings

    stored = stored_settings(Path(given.run_dir))
    stored["train"]["stop_at_step"] = None
    return stored
