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
from bdh.storage import whole_folder
from bdh.tokenizer import stop_token_ids
from bdh.train.checkpoint import Checkpoint
from bdh.train.models import load_run


def export_run(run_dir: Path, folder: Path, *, which: str = "last", ema: bool = False, replace: bool = False) -> int:
    """Exports a checkpoint of a run into ``folder``, and returns its step.

    Args:
        which: "last", "best" (of the validation loss), or a step.
        ema: the moving average of the weights instead of the weights.

    Raises:
        FileNotFoundError: ``run_dir`` holds no run, or the run has no such checkpoint.
        FileExistsError: ``folder`` is there and not empty, and ``replace`` is not set.
        ValueError: the checkpoint is damaged, or ``which`` is neither of the above.
    """
    model, tokenizer, checkpoint = load_run(run_dir, which, ema=ema)
    export_model(model, tokenizer, folder, model_card(model, checkpoint, ema=ema), replace=replace)
    return checkpoint.step


def export_model(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    *,
    replace: bool = False,
) -> None:
    """Writes model, tokenizer, generation settings and card into ``folder``, which appears when it is complete.

    Raises:
        FileExistsError: the folder is there and not empty, and ``replace`` is not set.
        DiskFullError: there is no room for it.
    """
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty: choose another folder")
    logging.disable_progress_bar()
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_k=50,
        max_new_tokens=200,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_token_ids(tokenizer),
    )
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(model: BDHForCausalLM, checkpoint: Checkpoint, *, ema: bool = False) -> str:
    """The README of an exported model: only what the run knows."""
    config, training = model.config, checkpoint.training
    data_facts = training["data_facts"]
    settings, progress = training["settings"], training["progress"]
    train = settings["train"]
    metrics = progress["last_ema_metrics"] if ema else progress["last_metrics"]
    num_parameters = sum(p.numel() for p in model.parameters())
    batch = train["batch_size"] * train["gradient_accumulation_steps"]
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
            for label, key in (("training tokens in it", "train_tokens"), ("validation tokens in it", "val_tokens"))
            if data_facts.get(key) is not None
        },
        **({"started from": f"`{train['init_from']}`"} if train["init_from"] else {}),
        **({"weights": f"moving average with decay {train['ema_decay']:g}"} if ema else {}),
        "steps": f"{progress['step']:,} of {train['max_steps']:,}",
        "tokens seen": f"{progress['tokens_seen']:,}",
        "sequence length": f"{train['block_size']:,} tokens",
        "sequences a step": batch,
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
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [bdh, dragon-hatchling]",
        "---",
        "",
        f"# A BDH language model of {num_parameters:,} parameters",
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
            f"On {train['eval_windows']} fixed windows of {train['block_size']} tokens that were not trained on, at the "
            f"last evaluation up to step {progress['step']:,}:",
            "",
            _table(measured),
            "",
        ]
    parts += [
        "## Use",
        "",
        "```python",
        "import bdh",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        f"print(model.generate_text(tokenizer, {json.dumps(prompt)}, temperature=0.8, top_k=50))",
        "```",
        "",
        f"Written by bdh {bdh.__version__}, PyTorch {torch.__version__}, transformers {transformers.__version__}.",
        "",
    ]
    return "\n".join(parts)


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
