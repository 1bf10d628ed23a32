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
from bdh.storage import atomic_dir, is_taken
from bdh.tokenizer import stop_token_ids
from bdh.train.checkpoint import Checkpoint
from bdh.train.config import LoraSettings
from bdh.train.lora import write_adapters
from bdh.train.models import load_run, run_weights


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
        ValueError: the checkpoint is damaged, or ``which`` is neither of the above.
    """
    model, tokenizer, checkpoint = load_run(run_dir, which, ema=ema)
    lora = LoraSettings(**checkpoint.training["settings"]["train"].get("lora") or {})
    if lora.r and not (lora.merge if merge is None else merge):
        _export_adapters(model, tokenizer, checkpoint, lora, folder, ema=ema, replace=replace)
        return checkpoint.step
    if merge is False:
        raise ValueError(f"merge is False: {run_dir} has no adapters, it trained all weights")
    # For whoever trains it further: config.json keeps what the class does not know.
    facts = checkpoint.training["data_facts"]
    model.config.train_data = {
        "source": facts["source"],
        "fingerprint": checkpoint.training["data_fingerprint"],
    }
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
    _check_free(folder, replace)
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
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _export_adapters(
    model: BDHForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Checkpoint,
    lora: LoraSettings,
    folder: Path,
    *,
    ema: bool,
    replace: bool,
) -> None:
    """Raises as :func:`export_model`; ``ValueError`` where more than adapters was trained."""
    if lora.embeddings:
        raise ValueError("merge is False: the run trained embed and lm_head too, which are no adapters")
    _check_free(folder, replace)
    base = checkpoint.training["settings"]["train"]["init_from"]
    with atomic_dir(folder) as temporary:
        write_adapters(temporary, model.config, run_weights(checkpoint, ema=ema), lora, base)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(model, checkpoint, ema=ema, adapters_of=base), encoding="utf-8")


def _check_free(folder: Path, replace: bool) -> None:
    if not replace and is_taken(folder):
        raise FileExistsError(f"{folder} exists already and is not empty: choose another folder")


def model_card(
    model: BDHForCausalLM, checkpoint: Checkpoint, *, ema: bool = False, adapters_of: str | None = None
) -> str:
    """The README of an exported model, or of adapters of the model of that name: only what the run knows."""
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
        **_lora_row(train.get("lora")),
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
    is_chat = data_facts.get("format") == "chat"
    asked = f"question(tokenizer, {json.dumps(prompt)})" if is_chat else json.dumps(prompt)
    parts = [
        "---",
        *(
            ["library_name: transformers"]
            if adapters_of is None
            else ["library_name: peft", f"base_model: {json.dumps(adapters_of)}"]
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
        *(["from bdh.tokenizer.chat import question"] if is_chat else []),
        *(["from peft import PeftModel"] if adapters_of is not None else []),
        "",
        'folder = "."  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *(
            ["model = AutoModelForCausalLM.from_pretrained(folder)"]
            if adapters_of is None
            else [
                f"base = AutoModelForCausalLM.from_pretrained({json.dumps(adapters_of)})",
                "model = PeftModel.from_pretrained(base, folder).merge_and_unload()",
            ]
        ),
        f"print(model.generate_text(tokenizer, {asked}, temperature=0.8, top_k=50))",
        "```",
        "",
        f"Written by bdh {bdh.__version__}, PyTorch {torch.__version__}, transformers {transformers.__version__}.",
        "",
    ]
    return "\n".join(parts)


def _lora_row(lora: dict[str, Any] | None) -> dict[str, str]:
    if not lora or not lora["r"]:
        return {}
    layers = ", ".join(lora["target_modules"]) + (" (and embed and lm_head as a whole)" if lora["embeddings"] else "")
    return {"trained weights": f"adapters (LoRA) of rank {lora['r']}, alpha {lora['alpha']:g}, in {layers}"}


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
