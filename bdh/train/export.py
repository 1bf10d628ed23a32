"""From a run to a folder that ``from_pretrained`` loads, with a card that says what the model is."""

import json
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
        which: "last", "best" (of the validation loss), or a step.
        ema: the moving average of the weights instead of the weights.
        merge: of a run with ``train.lora``, whether adapters are merged into the weights, or written alone; None as the
            run's settings say.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run, or the run has no such checkpoint.
        FileExistsError: ``folder`` is there and not empty, and ``replace`` is not set.
        OtherBaseError: adapters are to be written alone, and there are models with other weights in the place of their base.
        ValueError: the checkpoint is damaged, or ``which`` is neither of the above.
    """
    opened = open_model(str(run_dir), checkpoint=which, ema=ema)
    model, tokenizer, checkpoint = opened.merged(), load_tokenizer(opened.tokenizer_path), opened.checkpoint
    assert checkpoint is not None  # of a run
    lora = LoraSettings(**checkpoint.training["settings"]["train"].get("lora") or {})
    base = _base_of(checkpoint)
    if lora.r and not (lora.merge if merge is None else merge):
        assert base is not None  # settings without it are refused
        base = check_base(base, run_dir, merge=False).seen_from(folder)
        _export_adapters(model, tokenizer, checkpoint, lora, base, folder, ema=ema, replace=replace)
        return checkpoint.step
    if merge is False:
        raise ValueError(f"merge is False: {run_dir} has no adapters, it trained all weights")
    # For whoever trains it further: config.json keeps what the class does not know.
    facts = checkpoint.training["data_facts"]
    model.config.train_data = {
        "source": facts["source"],
        "fingerprint": checkpoint.training["data_fingerprint"],
        "step": checkpoint.step,
    }
    if lora.r and base is not None:
        model.config.merged_adapters = {
            "base": base.summary(),
            "run": run_dir.resolve().name,
            "step": checkpoint.step,
            **{name: getattr(lora, name) for name in ("r", "alpha", "target_modules", "embeddings")},
        }
    export_model(model, tokenizer, folder, model_card(model, checkpoint, ema=ema), replace=replace)
    return checkpoint.step


def export_merged(adapters: Path, folder: Path, *, base: str | None = None) -> Base:
    """Exports the model that a folder of adapters and its base make, and returns the base.

    Args:
        base: where it is now, named as for :func:`bdh.train.models.load_model`.

    Raises:
        FileNotFoundError: the base is not found.
        FileExistsError: ``folder`` is there and not empty.
        OtherBaseError: where the base should be, there are models with other weights.
        ValueError: ``adapters`` is no folder of adapters, or damaged.
    """
    check_free(folder)
    record = read_base(adapters)
    if record is None:
        raise ValueError(f"{adapters} is no folder of adapters")
    opened = open_model(str(adapters), base=base)
    model = opened.merged()
    model.config.merged_adapters = {"base": record.summary(), "adapters": adapters.resolve().name}
    card = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [bdh, dragon-hatchling]", "---"),
        f"\n# A BDH language model of {sum(p.numel() for p in model.parameters()):,} parameters\n",
        "Adapters (LoRA) merged into the weights of their base (architecture: Dragon Hatchling, arXiv 2509.26507).\n",
        _table({"base": _base_text(record), "adapters": f"`{adapters}`"}),
        "",
    ]
    export_model(model, load_tokenizer(opened.tokenizer_path), folder, "\n".join(card))
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
    """Writes model, tokenizer, generation settings and card into ``folder``, which appears when it is complete.

    Args:
        pad_and_eos: give a byte tokenizer without special tokens those of :func:`bdh.tokenizer.with_padding`.

    Raises:
        FileExistsError: the folder is there and not empty, and ``replace`` is not set.
        DiskFullError: there is no room for it.
    """
    if not replace:
        check_free(folder)
    logging.disable_progress_bar()
    tokenizer = _for_batches(tokenizer) if pad_and_eos else tokenizer
    # What libraries ask for they find in both.
    model.config.pad_token_id, model.config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    model.config.eos_token_id = stop_token_ids(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        max_new_tokens=200,
        pad_token_id=model.config.pad_token_id,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _for_batches(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = with_padding(tokenizer)
    # A text goes on at its right end. What is saved is what a tokenizer was made with.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer


def _export_adapters(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Checkpoint,
    lora: LoraSettings,
    base: Base,
    folder: Path,
    *,
    ema: bool,
    replace: bool,
) -> None:
    """Raises as :func:`export_model`; ``ValueError`` where more than adapters was trained."""
    if lora.embeddings:
        raise ValueError("merge is False: the run trained embed and lm_head too, which are no adapters")
    base.check_same_layer(model)
    if not replace:
        check_free(folder)
    with atomic_dir(folder) as temporary:
        write_adapters(temporary, model.config, run_weights(checkpoint, ema=ema), lora, base)
        _for_batches(tokenizer).save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(model, checkpoint, ema=ema, adapters_of=base), encoding="utf-8")


def _base_of(checkpoint: Checkpoint) -> Base | None:
    """The model that the run started from; without its fingerprint where the run's version did not record it."""
    if facts := checkpoint.training.get("base"):
        return Base.from_facts(facts)
    name = checkpoint.training["settings"]["train"]["init_from"]
    if name is None:
        return None
    recover_dir(Path(name))
    return Base(name, folder=str(Path(name).resolve()) if Path(name).is_dir() else None)


def model_card(
    model: BDHForCausalLM, checkpoint: Checkpoint, *, ema: bool = False, adapters_of: Base | None = None
) -> str:
    """The README of an exported model, or of adapters of that model: only what the run knows."""
    config, training = model.config, checkpoint.training
    data_facts = training["data_facts"]
    settings, progress, base = training["settings"], training["progress"], _base_of(checkpoint)
    train = settings["train"]
    metrics = progress["last_ema_metrics"] if ema else progress["last_metrics"]
    num_parameters = sum(p.numel() for p in model.parameters())
    skipped = (
        f", {progress['skipped_steps']:,} of which did not change the weights" if progress["skipped_steps"] else ""
    )
    is_chat = "chat" in [facts.get("format") for facts in (data_facts, *data_facts.get("mix", []))]
    rows = {
        "parameters": f"{num_parameters:,}",
        "passes through the shared layer": config.n_layer,
        "width": config.n_embd,
        "heads": config.n_head,
        "neurons per head": f"{config.neurons_per_head:,}",
        "vocabulary": f"{config.vocab_size:,} ({settings['tokenizer']['path']} tokenizer)",
        "state of one sequence": f"{config.state_bytes_per_sequence:,} bytes, at any length",
    }
    trained = {
        "data": f"`{data_facts['source']}`" if isinstance(data_facts["source"], str) else str(data_facts["source"]),
        **{
            label: f"{data_facts[key]:,}"
            for label, key in (
                ("training tokens", "train_tokens"),
                ("of which are the assistant's and count", "train_answer_tokens"),
                ("validation tokens that were kept" if data_facts["streaming"] else "validation tokens", "val_tokens"),
            )
            if data_facts.get(key) is not None
        },
        **({"started from": _base_text(base)} if base is not None else {}),
        **_lora_row(train.get("lora")),
        **({"weights": f"moving average with decay {train['ema_decay']:g}"} if ema else {}),
        "steps": f"{progress['step']:,} of {train['max_steps']:,}{skipped}",
        f"tokens seen{', padding included' if is_chat else ''}": f"{progress['tokens_seen']:,}",
        "sequence length": f"{train['block_size']:,} tokens",
        "sequences a step": f"{training['rows_per_step']:,}",
        "optimizer": f"{train['optimizer']}, learning rate {train['learning_rate']:g}, {train['schedule']} schedule "
        f"with {train['warmup_steps']} warm-up steps, weight decay {train['weight_decay']:g}",
        "dropout": settings["model"]["dropout"],
        "seed": train["seed"],
    }
    measured = (
        {
            "loss, nats per token": f"{metrics['loss']:.4f}",
            "perplexity": f"{metrics['perplexity']:.3f}",
            "bits per byte": f"{metrics['bits_per_byte']:.4f}",
            "next-token accuracy": f"{metrics['accuracy']:.1%}",
        }
        if metrics
        else {}
    )
    prompt = train["sample_prompts"][0] if train["sample_prompts"] else "The "
    asked = f"question(tokenizer, {json.dumps(prompt)})" if is_chat else json.dumps(prompt)
    parts = [
        "---",
        *(
            ["library_name: transformers"]
            if adapters_of is None
            else ["library_name: peft", f"base_model: {json.dumps(adapters_of.name)}"]
        ),
        "pipeline_tag: text-generation",
        "tags: [bdh, dragon-hatchling]",
        "---",
        "",
        f"# {'A' if adapters_of is None else 'Adapters of a'} BDH language model of {num_parameters:,} parameters",
        "",
        "Architecture: Dragon Hatchling (arXiv 2509.26507), a recurrent language model with sparse, non-negative "
        "activations and linear attention.",
        "",
        _table(rows),
        "",
        "## Training",
        "",
        _table(trained),
        "",
    ]
    if measured:
        parts += [
            "## Validation",
            "",
            _measured_on(progress, train["block_size"], is_chat),
            "",
            _table(measured),
            "",
        ]
    parts += [
        "## Use",
        "",
        "```python",
        *(
            ["import bdh", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
            if adapters_of is None
            else ["from bdh.train.models import load_model"]
        ),
        *(["from bdh.tokenizer.chat import question"] if is_chat else []),
        "",
        'folder = "."  # this folder',
        *(
            [
                "tokenizer = AutoTokenizer.from_pretrained(folder)",
                "model = AutoModelForCausalLM.from_pretrained(folder)",
            ]
            if adapters_of is None
            else [
                "# Finds the base, verifies its fingerprint, and merges the adapters; base=... says where it is now.",
                "model, tokenizer = load_model(folder)",
            ]
        ),
        f"print(model.generate_text(tokenizer, {asked}, temperature=0.8, top_k=50))",
        "```",
        "",
        f"Written by bdh {bdh.__version__}, PyTorch {torch.__version__}, transformers {transformers.__version__}.",
        "",
    ]
    return "\n".join(parts)


def _base_text(base: Base) -> str:
    return f"`{base.name}`{base.describe().removeprefix(base.name)}"


def _measured_on(progress: dict[str, Any], block_size: int, is_chat: bool) -> str:
    last = progress.get("last_evaluation")
    if not last:  # a checkpoint that does not say it
        return f"At the last evaluation up to step {progress['step']:,}, on text that was not trained on:"
    what = "rows of conversations, of up to" if is_chat else "windows of"
    return (
        f"After step {last['step']:,}, on {last['windows']:,} fixed {what} {block_size:,} tokens that were not trained on; "
        f"{last['tokens']:,} tokens of them were predicted:"
    )


def _lora_row(lora: dict[str, Any] | None) -> dict[str, str]:
    if not lora or not lora["r"]:
        return {}
    layers = ", ".join(lora["target_modules"]) + (" (and embed and lm_head as a whole)" if lora["embeddings"] else "")
    return {"trained weights": f"adapters (LoRA) of rank {lora['r']}, alpha {lora['alpha']:g}, in {layers}"}


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
