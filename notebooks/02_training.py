# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 2. Training from scratch
#
# At the end you will have trained a language model on a text of your choice, seen its loss fall and its samples take
# the look of that text, and stored it so that `from_pretrained` loads it. About four minutes on two CPU cores.

# %%
# Where bdh is missing (Colab, say), it is installed: from the checkout around this notebook, or a wheel beside it.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("bdh") is None:
    wheels = sorted(map(str, pathlib.Path().glob("bdh-*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wheels[-1] if wheels else ".."], check=True)

# %%
import json
import os
from pathlib import Path

FAST = os.environ.get("BDH_NOTEBOOK_FAST") == "1"  # small settings, for a test of this notebook
STEPS = 20 if FAST else 1000


def run_bdh(*arguments):
    """Runs a command and shows its last lines."""
    command = [sys.executable, "-m", "bdh", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # no moving bars
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    print(*run.stdout.strip().splitlines()[-16:], sep="\n")
    assert run.returncode == 0


# %% [markdown]
# ## Data
#
# Any text file will do: replace `SOURCE` by its path. `stdlib` is the source code of Python's library, which is here
# already. A tenth is held out, and never trained on. First, what a run would take here, without starting one (time and memory
# are at the end):

# %%
SOURCE = "stdlib"
SETTINGS = {
    "model.n_layer": 3,
    "model.n_embd": 64,
    "model.n_head": 4,
    "model.mlp_internal_dim_multiplier": 32,
    "model.dropout": 0.0,
    "data.source": SOURCE,
    "train.block_size": 32 if FAST else 128,
    "train.batch_size": 12,
    "train.max_steps": STEPS,
    "train.learning_rate": 3e-3,
    "train.warmup_steps": 20,
    "train.eval_every_steps": STEPS // 5,
    "train.eval_windows": 16 if FAST else 64,
    "train.sample_every_steps": STEPS // 2,
    "train.sample_max_new_tokens": 100,
    "monitor.log_every_steps": 10,
}
flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
run_bdh("train", *flags, "--dry_run")

# %% [markdown]
# ## Train
#
# The same settings in a YAML file would be `bdh train --config FILE`. A run that is stopped, by Ctrl-C or a power cut, continues
# exactly with `--resume`.

# %%
import shutil

shutil.rmtree("runs/notebook-02", ignore_errors=True)
run_bdh("train", *flags, "--run_dir", "runs/notebook-02")

# %% [markdown]
# ## The curve
#
# Everything that was logged is in `metrics.jsonl`, in the run's folder.

# %%
import matplotlib.pyplot as plt

rows = [json.loads(line) for line in Path("runs/notebook-02/metrics.jsonl").read_text().splitlines()]


def curve(name):
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(*curve("train/loss"), label="training", linewidth=1)
left.plot(*curve("val/loss"), "o-", label="held-out text")
left.set(title="Loss", xlabel="step", ylabel="nats per byte")
left.legend()
for layer_step in range(SETTINGS["model.n_layer"]):
    right.plot(*curve(f"val/density/x/{layer_step}"), "o-", label=f"layer step {layer_step + 1}")
right.set(title="Neurons that fire (x)", xlabel="step", ylabel="share of all", ylim=(0, 0.6))
right.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# Left: the loss falls steeply while the model learns which bytes are frequent, then slowly. Right: before training half of the
# neurons fire (notebook [6](06_interpretability.ipynb) measures it). By the first evaluation it is about a quarter, and there it stays.
#
# ## What it wrote on the way

# %%
for line in Path("runs/notebook-02/samples.jsonl").read_text().splitlines():
    sample = json.loads(line)
    print(f"step {sample['step']}: {sample['prompt']!r} -> {sample['text']!r}\n")

# %% [markdown]
# ## The stored model
#
# A folder with safetensors, tokenizer and a model card. It loads like any model of `transformers`.

# %%
run_bdh(
    "generate", "runs/notebook-02/model", "--prompt", "def ", "--max_new_tokens", 120, "--temperature", 0.6, "--seed", 1
)

# %%
card = Path("runs/notebook-02/model/README.md").read_text()
print(card.partition("## Use")[0])

# %% [markdown]
# ## The same with a loop of your own
#
# The model is a PyTorch module: any loop trains it. A few steps, to see how:

# %%
import bdh  # before transformers, which then knows the model

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
text = torch.tensor(list(Path(json.__file__).read_bytes()))
model = bdh.BDH(bdh.BDHConfig(n_layer=2, n_embd=48, mlp_internal_dim_multiplier=32)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
generator = torch.Generator().manual_seed(0)
for step in range(20):
    starts = torch.randint(len(text) - 97, (8,), generator=generator).tolist()
    batch = torch.stack([text[start : start + 96] for start in starts]).to(device)
    loss = model(batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss.item():.3f} nats per byte")

# %% [markdown]
# Next: [make it talk](03_finetuning.ipynb), or [look at the tokenizers](04_tokenizers.ipynb).
