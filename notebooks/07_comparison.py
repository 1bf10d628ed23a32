# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 7. Beside a transformer
#
# At the end a Dragon Hatchling and a GPT-2 of as many parameters will have been trained on the same batches, and you will
# have seen which learns more in a step, which in a minute, what each needs of memory, and how fast each writes after short
# and long texts. At this size and time no side wins everything. About five minutes on two CPU cores.

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
import os
import time

import bdh  # before transformers, which then knows the model

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import set_verbosity_error

from bdh.data import DataConfig, training_texts, validation_texts

set_verbosity_error()
FAST = os.environ.get("BDH_NOTEBOOK_FAST") == "1"  # small settings, for a test of this notebook
STEPS, EVERY = (20, 10) if FAST else (600, 50)
BATCH, BLOCK = 12, 128
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## Two models of one size
#
# A token is a byte for both. BDH has one layer, applied three times; GPT-2 has three, each with its own weights, and a learned vector
# for each position.


# %%
def make(kind, seed):
    torch.manual_seed(seed)
    if kind == "BDH":
        config = bdh.BDHConfig(n_layer=3, n_embd=64, n_head=4, mlp_internal_dim_multiplier=32, dropout=0.0)
        return bdh.BDH(config).to(device)
    config = GPT2Config(
        vocab_size=256,
        n_positions=4096,
        n_layer=3,
        n_embd=104,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).to(device)


def parameters(model):
    """Without GPT-2's positions beyond those that are trained: it is given 4,096 here, so that it can be timed later."""
    extra = (4096 - BLOCK) * 104 if isinstance(model, GPT2LMHeadModel) else 0
    return sum(p.numel() for p in model.parameters()) - extra


for kind in ("BDH", "GPT-2"):
    print(f"{kind}: {parameters(make(kind, 0)):,} parameters")

# %% [markdown]
# ## The same batches
#
# The source code of Python's library, with a tenth held out. Each has the learning rate that was best for it over 300 steps
# (GPT-2: 2e-3 of 1e-3, 2e-3, 4e-3 and 8e-3; BDH: 8e-3 of 2e-3, 4e-3, 8e-3 and 16e-3); everything else is equal: AdamW, warm-up, cosine, clipping.

# %%
data = DataConfig(source="stdlib")
train = torch.frombuffer(bytearray("".join(training_texts(data)).encode()), dtype=torch.uint8)
held_out = torch.frombuffer(bytearray("".join(validation_texts(data)).encode()), dtype=torch.uint8)[:12_288]
RATES = {"BDH": 8e-3, "GPT-2": 2e-3}


def loss_of(model, batch):
    return model(batch, labels=batch).loss


def evaluate(model):
    model.eval()
    with torch.no_grad():
        windows = held_out.long().view(-1, BLOCK).to(device)
        loss = sum(loss_of(model, part).item() * len(part) for part in windows.split(24)) / len(windows)
    model.train()
    return loss


def run(kind, seed):
    """A training; returns its (step, seconds without evaluations, held-out loss), and the model."""
    model = make(kind, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[kind], weight_decay=0.1, betas=(0.9, 0.95))
    warm_up = STEPS // 20 or 1
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, 1.0, warm_up),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - warm_up, RATES[kind] / 10),
        ],
        [warm_up],
    )
    batches = torch.Generator().manual_seed(seed)
    points, seconds = [], 0.0
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(train) - BLOCK, (BATCH,), generator=batches).tolist()
        batch = torch.stack([train[start : start + BLOCK] for start in starts]).long().to(device)
        begin = time.perf_counter()
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin if step > 1 else 0  # the first one compiles
        if step % EVERY == 0:
            points.append((step, seconds, evaluate(model)))
    return points, model.eval()


SEEDS = (0,) if FAST else (0, 1)
curves, models = {}, {}
for kind in ("BDH", "GPT-2"):
    for seed in SEEDS:
        curves[kind, seed], models[kind] = run(kind, seed)
        step, seconds, loss = curves[kind, seed][-1]
        print(f"{kind}, seed {seed}: {loss:.4f} nats per byte after {step} steps and {seconds:.0f} s")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for (kind, seed), points in curves.items():
    steps, seconds, losses = zip(*points, strict=True)
    style = {"color": "teal" if kind == "BDH" else "darkorange", "label": kind if seed == 0 else None}
    left.plot(steps, losses, **style)
    right.plot(seconds, losses, **style)
left.set(title="By steps", xlabel="step", ylabel="held-out loss, nats per byte")
right.set(title="By the clock", xlabel="seconds of training on this machine")
left.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# Left: what a step teaches. BDH learns more from each. Right: the same by the clock, where the cost of a step counts. A step
# of BDH takes somewhat more than twice as long here, so that at first neither is ahead; then BDH is. GPT-2 ends earlier because
# its 600 steps are done: what twice as many would have made of it is not shown. Lines of one colour are seeds: a difference
# that is smaller than their distance means nothing.
#
# ## How fast they write
#
# Each reads a text of some length, then writes 32 bytes. GPT-2 keeps keys and values of all that it has read, BDH a
# state of fixed size. (What they write beyond the trained 128 bytes is not good for either; this is about speed.)


# %%
@torch.no_grad()
def seconds_per_token(model, length, count=8 if FAST else 32):
    text = train[:length].long()[None].to(device)
    output = model(text, use_cache=True)
    token, cache = output.logits[:, -1:].argmax(-1), output.cache
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        output = model(token, cache=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.cache
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return sorted(found)[len(found) // 2]


LENGTHS = (64, 512) if FAST else (64, 256, 1024, 2048, 4000)
speeds = {kind: [] for kind in models}
for length in LENGTHS:  # by turns: whatever else the machine does affects both
    for kind, model in models.items():
        speeds[kind].append(1000 * seconds_per_token(model, length))
for kind, found in speeds.items():
    print(kind, *(f"{length}: {each:.2f} ms" for length, each in zip(LENGTHS, found, strict=True)), sep="  ")

# %%
fig, axis = plt.subplots(figsize=(6, 3))
for kind, found in speeds.items():
    axis.plot(LENGTHS, found, "o-", label=kind, color="teal" if kind == "BDH" else "darkorange")
axis.set(
    title="The next byte after a text of some length", xlabel="bytes read before", ylabel="ms a byte", ylim=(0, None)
)
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# For GPT-2 a byte takes longer the more it has read; for BDH it takes the same at any length, but for the machine's noise.
#
# ## Memory of a text

# %%
config = models["BDH"].config
for length in LENGTHS:
    cache = 2 * 3 * 104 * 4 * length  # keys and values of three layers, 104 wide, in float32
    print(f"{length:>5} bytes read: GPT-2 {cache:>10,} bytes, BDH {config.state_bytes_per_sequence:,} bytes")

# %% [markdown]
# Here BDH's state is as large as GPT-2's cache of about 630 bytes of text: for short texts GPT-2 needs less, for long ones more.
#
# ## What this does not say
#
# These are minutes on a CPU, at 0.4 million parameters, with sequences of 128 bytes. None of it carries over to other sizes by
# itself. Longer runs, with seeds and spread, are in the [results](../docs/results.md) of the documentation. Next: [quantization](08_quantization.ipynb).
