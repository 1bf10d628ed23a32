# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 4. Tokenizers
#
# At the end you will have trained BPE, Unigram and WordPiece tokenizers on one text, seen how they cut it up, what each
# loses, and how many bytes a token of each is worth. And two models will have shown whether bytes or BPE learn
# faster. About three minutes on two CPU cores.

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
import logging
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt

from bdh.data import DataConfig, training_texts, validation_texts
from bdh.tokenizer import byte_tokenizer, compression_ratio, train_tokenizer

FAST = os.environ.get("BDH_NOTEBOOK_FAST") == "1"  # small settings, for a test of this notebook
SIZES = (300, 1000) if FAST else (512, 1024, 2048, 4096, 8192)
logging.getLogger("bdh.tokenizer").setLevel(logging.ERROR)  # else it warns of vocabularies that a text cannot fill

# %% [markdown]
# ## Train them
#
# `pydoc` is Python's language reference. A tenth is held out: tokenizers are measured on text that they have not seen. Each is asked
# for 4,096 entries; Unigram finds no more than 3,744 in a text of 0.4 MB.

# %%
data = DataConfig(source="pydoc")
held_out = list(validation_texts(data))
tokenizers, seconds = {"byte": byte_tokenizer()}, {"byte": 0.0}
for kind in ("bpe", "unigram", "wordpiece"):
    start = time.perf_counter()
    tokenizers[kind] = train_tokenizer(training_texts(data), kind, SIZES[-1] if FAST else 4096)
    seconds[kind] = time.perf_counter() - start
for kind, tokenizer in tokenizers.items():
    ratio = compression_ratio(tokenizer, held_out)
    print(f"{kind:<10} {len(tokenizer):>6,} entries, {ratio:.2f} bytes per token, trained in {seconds[kind]:.1f} s")

# %% [markdown]
# ## How each cuts a text
#
# A middle dot stands between tokens. � is a byte that is no letter by itself: in UTF-8 an ï has two.

# %%
TEXT = "def read(self):\n    return [line.strip() for line in self.file]  # naïve"


def pieces(tokenizer, text):
    return [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False)]


for kind, tokenizer in tokenizers.items():
    shown = pieces(tokenizer, TEXT)
    print(f"{kind} ({len(shown)} tokens)\n  {'·'.join(shown)!r}\n")

# %% [markdown]
# ## What comes back
#
# Bytes, BPE and Unigram give every text back exactly. WordPiece knows words, not spaces.

# %%
SAMPLES = (TEXT, "  two  spaces", "Ελληνικά", "emoji 🐉 and tabs\t\tend")
for kind, tokenizer in tokenizers.items():
    back = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in SAMPLES]
    exact = sum(a == b for a, b in zip(back, SAMPLES, strict=True))
    first_lost = next((f"; {a!r} became {b!r}" for a, b in zip(SAMPLES, back, strict=True) if a != b), "")
    print(f"{kind:<10} {exact} of {len(SAMPLES)} texts come back exactly{first_lost}")

# %% [markdown]
# ## Larger vocabularies say more with a token
#
# Each point is a tokenizer, measured on the held-out text, at the number of entries that it has: this small text fills neither 8,192
# entries of BPE nor 4,096 of Unigram. Each doubling gains less than the one before, while the model's embedding and head grow with the
# vocabulary.

# %%
fig, axis = plt.subplots(figsize=(6, 3))
for kind in ("bpe", "unigram"):
    trained = [train_tokenizer(training_texts(data), kind, size) for size in SIZES]
    axis.plot(
        [len(each) for each in trained], [compression_ratio(each, held_out) for each in trained], "o-", label=kind
    )
axis.axhline(1, color="grey", linestyle=":", label="byte")
axis.set_xscale("log", base=2)
axis.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
axis.set(title="Compression of held-out text", xlabel="entries of the vocabulary", ylabel="bytes per token")
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Bytes against BPE
#
# Two models with the same layer, trained on the same text for similar times. Losses per token cannot be compared, since a BPE
# token is several bytes: *bits per byte* can.

# %%
import shutil

tokenizers["bpe"].save_pretrained("runs/notebook-04-bpe")
STEPS = 40 if FAST else 900
COMMON = ["--config", "tiny", "--train.eval_every_steps", str(STEPS // 8), "--train.sample_every_steps", "0"]
COMMON += ["--checkpoint.export", "none", "--train.eval_windows", "16" if FAST else "64", "--train.warmup_steps", "20"]
curves = {}
for name, tokenizer, steps in (("byte", "byte", STEPS), ("bpe", "runs/notebook-04-bpe", STEPS // 2)):
    run = Path(f"runs/notebook-04-{name}-run")
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "bdh", "train", *COMMON, "--run_dir", str(run)]
    command += ["--tokenizer.path", tokenizer, "--train.max_steps", str(steps)]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = time.perf_counter() - start
    curves[name] = [
        (row["step"] / steps * taken, row["val/bits_per_byte"]) for row in rows if "val/bits_per_byte" in row
    ]
    print(f"{name}: {steps} steps in {taken:.0f} s, {curves[name][-1][1]:.3f} bits per byte at the end")

# %%
fig, axis = plt.subplots(figsize=(6, 3))
for name, points in curves.items():
    axis.plot(*zip(*points, strict=True), "o-", label=name)
axis.set(title="Held-out text while training", xlabel="seconds", ylabel="bits per byte")
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# With BPE a step reads four times as much text, mostly in whole words; but its model needs 2.5 times the parameters, of which nearly two
# thirds are embedding and head. It is ahead at first, and by less and less. Which one wins depends on the time and the size: measure it
# for yours.
#
# Next: [sampling](05_sampling.ipynb).
