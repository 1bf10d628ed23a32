"""bdh train: trains a model and exports it."""

import logging
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.output import error_console, lasting_streams, show_kept, stage_progress
from bdh.cli.settings import given_settings, takes
from bdh.distributed.config import rank, reported_to_torchrun, world_size
from bdh.locks import InUseError
from bdh.train.config import RunSettings, check_unchanged, resume_command, settings_to_store, stored_settings
from bdh.words import counted

if TYPE_CHECKING:
    from rich.console import Console


@takes(
    RunSettings,
    description="Train a model and export it. YAML files override the defaults, in their order; flags override the files.",
)
@lasting_streams()
def run_train(argv: list[str]) -> int:
    is_main = rank() == 0
    try:
        stored = settings_to_resume(argv)
        # With several processes, checks here could fail in some of them only.
        settings = run_train.parse(argv, base=stored, check_available=world_size() == 1)
        if stored is not None:
            check_unchanged(settings, stored)
    except (ValueError, OSError):
        if is_main:
            raise
        return 2  # rank 0 reports the error
    # Imported here, so that `--help` and errors in the settings do not wait for PyTorch.
    from bdh.train.dry_run import NoRoomError, check_room
    from bdh.train.setup import open_run

    console = error_console(quiet=not is_main)
    if not is_main:
        logging.disable(logging.WARNING)
    no_room = None
    try:
        with reported_to_torchrun(), stage_progress("bytes", console) as progress:
            try:
                training = open_run(settings, progress=progress, check_room=check_room)
            except NoRoomError as error:  # the result of a dry run rather than an error
                no_room = error
    except InUseError:
        if is_main:
            raise
        return 2  # rank 0 reports the error
    if no_room is not None:
        if is_main:
            print("\n".join(no_room.forecast.lines()))
        return 1
    settings = training.settings
    show_kept()
    print_banner(console, training)
    if settings.dry_run:
        return _dry_run(console, training)
    with training.lock:  # until the export is written
        return _train(console, training)


def _train(console: "Console", training: Any) -> int:
    """Trains and exports a model. Returns the exit status."""
    from bdh.data.batches import DataStopped
    from bdh.monitor import Monitor
    from bdh.train.loop import EXIT_STATUS, fit

    settings = training.settings
    monitor = Monitor(
        training.folder,
        settings.monitor if training.world.is_main else replace(settings.monitor, backends=[]),
        total_steps=settings.train.max_steps,
        start_step=training.progress.step,
        settings=settings_to_store(settings),
        console=console,
    )
    try:
        with reported_to_torchrun(), monitor:
            why = fit(training, monitor)
            training.close(release=False)
    except DataStopped:
        if training.world.is_main:
            raise
        return 2  # rank 0 reports the error
    if not training.world.is_main:
        return EXIT_STATUS.get(why, 0)

    step = training.progress.step
    resume = resume_command(training.folder)
    if why in EXIT_STATUS:
        console.print(f"Stopped by {why} after step {step}; everything is saved. Continue with: {resume}", markup=False)
        return EXIT_STATUS[why]
    if why == "stop_at_step" and step < settings.train.max_steps:
        console.print(f"Stopped at step {step} as set; everything is saved. Continue with: {resume}", markup=False)
    elif why == "patience":
        best = training.progress.best_step
        metric = settings.checkpoint.best_metric
        console.print(f"Stopped after step {step}: {metric} was best at step {best}.", markup=False)
    if settings.checkpoint.export != "none":
        _export(console, training)
    return 0


def _dry_run(console: "Console", training: Any) -> int:
    """Prints the memory and time that the run would take. Returns the exit status, 1 if it does not fit."""
    from bdh.train.dry_run import forecast

    with reported_to_torchrun():
        found = forecast(training, say=lambda line: console.print(line, markup=False))
        training.world.leave()
    if training.world.is_main:
        print("\n".join(found.lines()))
    return 0 if found.fits else 1


def _export(console: "Console", training: Any) -> None:
    from bdh.train.export import export_run

    which = training.settings.checkpoint.export
    ema = which == "ema"
    if which == "best" and training.progress.best_step is None:
        console.print("No validation loss was measured yet: the last weights are exported, not the best.")
        which = "last"
    training.lock.check()
    folder = training.folder / "model"
    export_run(training.folder, folder, which="last" if ema else which, ema=ema, replace=True)
    ask = "--chat --prompt 'Hello!'" if training.corpus.is_chat else "--prompt 'The '"
    console.print(f"Exported to {folder}: {shlex.join(('bdh', 'generate', str(folder)))} {ask}", markup=False)


def print_banner(console: "Console", training: Any) -> None:
    """Prints what will be computed, how, and where the results are written."""
    settings, model, runtime = training.settings, training.model, training.runtime
    train, config, facts = settings.train, model.config, training.corpus.facts
    num_parameters = sum(p.numel() for p in model.parameters())
    num_sequences = training.sequences_per_step // training.world.size
    num_tokens = len(training.tokenizer)
    dry = "; a dry run writes nothing there" * settings.dry_run
    gaps = f" ({num_tokens:,} tokens, whose ids have gaps)" if num_tokens < config.vocab_size else ""
    lines = {
        "model": f"{num_parameters:,} parameters: {counted(config.n_layer, 'layer step')}, width {config.n_embd}, {counted(config.n_head, 'head')} "
        f"of {config.neurons_per_head:,} neurons, vocabulary {config.vocab_size:,}{gaps}",
        "state": f"{config.state_bytes_per_sequence:,} bytes a sequence, at any length"
        + (
            f"; carried on for {counted(num_sequences, 'sequence')}: {config.state_bytes_per_sequence * num_sequences:,} bytes"
            * train.carry_state
        ),
        "data": _describe_data(facts),
        "step": f"{training.sequences_per_step * train.block_size:,} tokens: {counted(train.batch_size, 'sequence')} of "
        f"{train.block_size:,}"
        + (f", {train.gradient_accumulation_steps} times" if train.gradient_accumulation_steps > 1 else "")
        + (f", on each of {training.world.size} processes" if training.world.size > 1 else ""),
        "device": f"{runtime.device} ({runtime.reason}){', compiled' if train.compile else ''}",
        "processes": f"{training.world.size}: {training.parallel.strategy}",
        "layer": training.plan.describe(config.n_layer),
        "attention": _describe_attention(training),
        "optimizer": f"{train.optimizer}, {train.schedule} schedule, {counted(train.max_steps, 'step')}",
        "run": str(training.folder) + _describe_start(training.progress.step, train.max_steps) + dry,
    }
    if training.world.size == 1:
        del lines["processes"]
    if train.init_from is not None:
        lines["weights"] = f"those of {train.init_from}, trained further"
    if train.lora.r:
        num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lines["weights"] = (
            f"those of {train.init_from}, unchanged; {num_trained:,} trained: adapters of rank {train.lora.r} in "
            f"{', '.join(train.lora.target_modules)}{', and embed and lm_head' if train.lora.embeddings else ''}"
        )
    if train.quantize is not None:
        lines["rounding"] = _describe_rounding(train)
    for name, text in lines.items():
        console.print(f"  {name:<10} {text}", markup=False, soft_wrap=True)


def _describe_start(step: int, max_steps: int) -> str:
    if step >= max_steps:
        return f": all {step:,} steps are done, nothing to train; a higher --train.max_steps continues"
    return f", continuing from step {step}" if step else ""


def _describe_rounding(train: Any) -> str:
    matrices = "E to int8, Ev and Dec to int4" if train.quantize == "mixed" else f"E, Ev and Dec to {train.quantize}"
    start = f"from step {train.quantize_from_step + 1:,} on" if train.quantize_from_step else "in every step"
    return f"{matrices} {start}, and in evaluations, samples and the export; gradients pass straight through"


def _describe_attention(training: Any) -> str:
    from bdh.ops.attention import choose_form

    train, config, plan = training.settings.train, training.model.config, training.plan
    chosen = " (chosen)" if config.attention_form == "auto" else ""
    if plan.backend != "eager":
        is_whole = plan.sizes.tokens >= train.block_size
        return f"parallel{chosen}" if is_whole else f"chunked, {plan.sizes.tokens:,} tokens{chosen}"
    how = {"has_state": train.carry_state, "chunk_size": config.chunk_size}
    return f"{choose_form(config.attention_form, train.block_size, config.n_embd, **how)}{chosen}"


def _describe_data(facts: dict[str, Any]) -> str:
    if facts.get("streaming"):
        return f"{facts['source']}, streaming; {facts['val_tokens']:,} tokens for validation"
    if facts.get("format") == "chat":
        num_train = facts["documents"] - facts["val_documents"]
        return (
            f"{facts['source']}: {counted(num_train, 'conversation')} (chat) in {counted(facts['rows'], 'sequence')}, "
            f"{facts['train_answer_tokens']:,} of {facts['train_tokens']:,} tokens are the assistant's and count; "
            f"{facts['val_documents']:,} for validation"
        )
    return f"{facts['source']}: {facts['train_tokens']:,} tokens to train on, {facts['val_tokens']:,} for validation"


def settings_to_resume(argv: list[str]) -> dict[str, Any] | None:
    """Returns the stored settings of the run to resume, which the settings given now override; None for a new run.

    ``stop_at_step`` is not kept, since it applies only to the start for which it was given.
    """
    if {"-h", "--help"} & set(argv):
        return None
    given = given_settings(RunSettings, argv)
    if given.get("run_dir") is None or not given.get("resume"):
        return None
    stored = stored_settings(Path(given["run_dir"]))
    stored["train"]["stop_at_step"] = None
    return stored
