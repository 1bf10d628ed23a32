"""Exports runs to folders that ``from_pretrained`` loads, with a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

import bdh
from bdh.model import BDHForCausalLM
from bdh.storage import atomic_dir, check_free, recover_dir
from bdh.tokenizer import load_tokenizer, stop_token_ids, with_padding
from bdh.train.adapters import Base, read_base, write_adapters
from bdh.train.checkpoint import Checkpoint
from bdh.train.config import LoraSettings
from bdh.train.models import check_base, open_model, run_weights
from bdh.words import counted


def export_run(
    run_dir: Path,
    folder: Path,
    *,
    which: str = "last",
    ema: bool = False,
    merge: bool | None = None,
    replace: bool = False,
) -> int:
    """Exports a checkpoint of a run into ``folder``, and returns its step.

    Args:
        run_dir: the folder of the run.
        folder: the folder to write.
        which: "last", "best" (by ``checkpoint.best_metric``), or a step.
        ema: whether to export the moving average of the weights.
        merge: for a run with ``train.lora``, whether to merge the adapters into the weights, or to write only the
            adapters. None follows the run's settings.
        replace: whether to replace an existing folder.

    Raises:
        FileNotFoundError: the run has no such checkpoint.
        FileExistsError: ``folder`` exists and is not empty, and ``replace`` is not set.
        OtherBaseError: only adapters are to be written, and the model at the place of their base has other weights.
        ValueError: ``run_dir`` contains no run, the checkpoint is damaged, ``which`` is invalid, or ``merge`` is False
            and not only adapters were trained.
    """
    opened = open_model(str(run_dir), checkpoint=which, ema=ema)
    checkpoint = opened.checkpoint
    assert checkpoint is not None  # runs always have one
    model, tokenizer = opened.finished(), load_tokenizer(opened.tokenizer_path)
    lora, base = LoraSettings(**checkpoint.training["settings"]["train"].get("lora") or {}), _base_of(checkpoint)
    if lora.r and not (lora.merge if merge is None else merge):
        assert base is not None  # settings without a base model are rejected
        base = check_base(base, run_dir, merge=False).seen_from(folder)
        if lora.embeddings:
            raise ValueError(
                "merge is False: must be True, since the run trained embed and lm_head too, which are not adapters"
            )
        base.check_same_layer(model)
        if not replace:
            check_free(folder)
        with atomic_dir(folder) as temporary:
            write_adapters(temporary, model.config, run_weights(checkpoint, ema=ema), lora, base)
            _for_batches(tokenizer).save_pretrained(temporary)
            card = model_card(model, checkpoint, ema=ema, adapters_of=base)
            (temporary / "README.md").write_text(card, encoding="utf-8")
        return checkpoint.step
    if merge is False:
        raise ValueError(f"merge is False: must be left out, since {run_dir} trained all weights and has no adapters")
    # For fine-tuning this model: config.json also keeps fields that the class does not declare.
    model.config.train_data = train_data(checkpoint)
    if lora.r and base is not None:
        model.config.merged_adapters = {
            "base": base.summary(),
            "run": run_dir.resolve().name,
            "step": checkpoint.step,
            **{name: getattr(lora, name) for name in ("r", "alpha", "target_modules", "embeddings")},
        }
    export_model(model, tokenizer, folder, model_card(model, checkpoint, ema=ema), replace=replace)
    return checkpoint.step


def train_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the description of the training data for the configuration of an export."""
    training = checkpoint.training
    data = {"source": training["data_facts"]["source"], "fingerprint": training["data_fingerprint"]}
    return data | {"step": checkpoint.step}


def export_merged(adapters: Path, folder: Path, *, base: str | None = None) -> Base:
    """Merges a folder of adapters into its base model, exports the result, and returns the base.

    Args:
        adapters: the folder of adapters.
        folder: the folder to write.
        base: the current location of the base model, as for :func:`bdh.train.models.load_model`.

    Raises:
        FileNotFoundError: the base model is not found.
        FileExistsError: ``folder`` exists and is not empty.
        OtherBaseError: the model at the place of the base has other weights.
        ValueError: ``adapters`` is not a folder of adapters, or is damaged.
    """
    check_free(folder)
    record = read_base(adapters)
    if record is None:
        raise ValueError(f"{adapters} is not a folder of adapters")
    opened = open_model(str(adapters), base=base)
    model = opened.merged()
    model.config.merged_adapters = {"base": record.summary(), "adapters": adapters.resolve().name}
    about = (
        "Adapters (LoRA) merged into the weights of their base (architecture: Dragon Hatchling, arXiv 2509.26507).\n\n"
        + table({"base": _base_text(record), "adapters": f"`{adapters}`"})
    )
    title = f"A BDH language model of {model.num_parameters():,} parameters"
    export_model(model, load_tokenizer(opened.tokenizer_path), folder, card(title, about))
    return record


def export_model(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    *,
    replace: bool = False,
    pad_and_eos: bool = True,
) -> None:
    """Writes model, tokenizer, generation settings and model card to a folder, atomically.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: the folder to write.
        card: the text of the model card.
        replace: whether to replace an existing folder.
        pad_and_eos: whether to give a byte tokenizer without special tokens those of
            :func:`bdh.tokenizer.with_padding`.

    Raises:
        FileExistsError: the folder exists and is not empty, and ``replace`` is not set.
        DiskFullError: there is not enough space.
    """
    if not replace:
        check_free(folder)
    tokenizer = ready_for_users(model, tokenizer, pad_and_eos=pad_and_eos)
    write_model(folder, model, tokenizer, {"README.md": card})


def ready_for_users(
    model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, *, pad_and_eos: bool = True
) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of an export, and sets its tokens and generation settings in the model's configurations."""
    tokenizer = _for_batches(tokenizer) if pad_and_eos else tokenizer
    # Libraries look for these in both configurations.
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop_token_ids(tokenizer),
    }
    for name, value in tokens.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_k=50, max_new_tokens=200, **tokens)
    return tokenizer


def write_model(
    folder: Path, model: BDHForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Mapping[str, str]
) -> None:
    """Writes a model, its tokenizer and texts by file name to a folder, atomically. An existing folder is replaced.

    Raises:
        DiskFullError: there is not enough space.
    """
    logging.disable_progress_bar()
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def _for_batches(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = with_padding(tokenizer)
    # Generation continues a text at its right end, so padding is on the left. Saving uses init_kwargs.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def _base_of(checkpoint: Checkpoint) -> Base | None:
    """Returns the record of the model from which the run started, without a fingerprint if an old version wrote it."""
    if facts := checkpoint.training.get("base"):
        return Base.from_facts(facts)
    name = checkpoint.training["settings"]["train"]["init_from"]
    if name is None:
        return None
    recover_dir(Path(name))
    return Base(name, folder=str(Path(name).resolve()) if Path(name).is_dir() else None)


def card(title: str, text: str, library: str = "library_name: transformers") -> str:
    """Returns a README with the metadata header of the hub."""
    return f"""\
---
{library}
pipeline_tag: text-generation
tags: [bdh, dragon-hatchling]
---

# {title}

{text}
"""


def model_card(
    model: BDHForCausalLM, checkpoint: Checkpoint, *, ema: bool = False, adapters_of: Base | None = None
) -> str:
    """Returns the README of an exported model, or of adapters for a base model, from the records of the run."""
    config, training, base = model.config, checkpoint.training, _base_of(checkpoint)
    data, settings, progress = training["data_facts"], training["settings"], training["progress"]
    train, lora = settings["train"], settings["train"].get("lora") or {}
    is_chat = "chat" in [facts.get("format") for facts in (data, *data.get("mix", []))]
    skipped = progress["skipped_steps"]
    model_rows = {
        "parameters": f"{model.num_parameters():,}",
        "steps through the shared layer": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "neurons per head": f"{config.neurons_per_head:,}",
        "vocabulary": f"{config.vocab_size:,} ({settings['tokenizer']['path']} tokenizer)",
        "state of one sequence": f"{config.state_bytes_per_sequence:,} bytes, at any length",
    }
    trained = (
        f"adapters (LoRA) of rank {lora['r']}, alpha {lora['alpha']:g}, in {', '.join(lora['target_modules'])}"
        if lora.get("r")
        else None
    )
    rows = {
        "data": f"`{data['source']}`" if isinstance(data["source"], str) else str(data["source"]),
        "training tokens": _count(data.get("train_tokens")),
        "of which are the assistant's and count": _count(data.get("train_answer_tokens")),
        f"validation tokens{' that were kept' * data['streaming']}": _count(data.get("val_tokens")),
        "started from": None if base is None else _base_text(base),
        "trained weights": trained and trained + " (and embed and lm_head as a whole)" * lora["embeddings"],
        "trained for": train.get("quantize") and _trained_for(train),
        "weights": f"moving average with decay {train['ema_decay']:g}" if ema else None,
        "steps": f"{progress['step']:,} of {train['max_steps']:,}"
        + (f", {skipped:,} of which did not change the weights" if skipped else ""),
        f"tokens seen{', padding included' * is_chat}": f"{progress['tokens_seen']:,}",
        "sequence length": f"{train['block_size']:,} tokens",
        "sequences a step": f"{training['rows_per_step']:,}",
        "optimizer": f"{train['optimizer']}, learning rate {train['learning_rate']:g}, {train['schedule']} schedule "
        f"with {train['warmup_steps']} warm-up steps, weight decay {train['weight_decay']:g}",
        "dropout": settings["model"]["dropout"],
        "seed": train["seed"],
    }
    validation = ""
    if metrics := progress["last_ema_metrics"] if ema else progress["last_metrics"]:
        measured = {
            "loss, nats per token": f"{metrics['loss']:.4f}",
            "perplexity": f"{metrics['perplexity']:.3f}",
            "bits per byte": f"{metrics['bits_per_byte']:.4f}",
            "next-token accuracy": f"{metrics['accuracy']:.1%}",
        }
        on = _measured_on(progress, train["block_size"], is_chat)
        validation = f"## Validation\n\n{on}\n\n{table(measured)}\n\n"
    prompt = json.dumps(train["sample_prompts"][0] if train["sample_prompts"] else "The ")
    code = ["import bdh", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    load = ["tokenizer = AutoTokenizer.from_pretrained(folder)", "model = AutoModelForCausalLM.from_pretrained(folder)"]
    library, kind = "library_name: transformers", "A"
    if adapters_of is not None:
        library, kind = f"library_name: peft\nbase_model: {json.dumps(adapters_of.name)}", "Adapters of a"
        code = ["from bdh.train.models import load_model"]
        load = [
            "# Finds the base, verifies its fingerprint, and merges the adapters; base=... says where it is now.",
            "model, tokenizer = load_model(folder)",
        ]
    if is_chat:
        code.append("from bdh.tokenizer.chat import question")
        prompt = f"question(tokenizer, {prompt})"
    code += ["", 'folder = "."  # this folder', *load]
    code.append(f"print(model.generate_text(tokenizer, {prompt}, temperature=0.8, top_k=50))")
    program = "\n".join(code)
    text = f"""\
Architecture: Dragon Hatchling (arXiv 2509.26507), a recurrent language model with sparse, non-negative activations and \
linear attention.

{table(model_rows)}

## Training

{table(rows)}

{validation}## Use

```python
{program}
```

Written by bdh {bdh.__version__}, PyTorch {torch.__version__}, transformers {transformers.__version__}."""
    return card(f"{kind} BDH language model of {model.num_parameters():,} parameters", text, library)


def _base_text(base: Base) -> str:
    return f"`{base.name}`{base.describe().removeprefix(base.name)}"


def _trained_for(train: dict[str, Any]) -> str:
    first = f" from step {train['quantize_from_step'] + 1:,} on" * bool(train["quantize_from_step"])
    return f"{train['quantize']} weights: those of the layer were rounded in each step{first}"


def _measured_on(progress: dict[str, Any], block_size: int, is_chat: bool) -> str:
    last = progress.get("last_evaluation")
    if not last:  # the checkpoint does not record it
        return f"At the last evaluation up to step {progress['step']:,}, on text that was not trained on:"
    what = "sequences of conversations, of up to" if is_chat else "windows of"
    return (
        f"After step {last['step']:,}, on {last['windows']:,} fixed {what} {block_size:,} tokens that were not trained on; "
        f"{counted(last['tokens'], 'token')} of them predicted:"
    )


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def table(rows: dict[str, Any]) -> str:
    """Returns a Markdown table of names and values, without those that are None."""
    there = (f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return "\n".join(["| | |", "| --- | --- |", *there])
