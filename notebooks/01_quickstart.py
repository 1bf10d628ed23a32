# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 1. Quickstart
#
# In five minutes you will have a small Dragon Hatchling language model, text that it wrote, and a feeling for
# what temperature and top-k change. No GPU and no network are needed: it is trained on the language reference
# that comes with Python.

# %%
# Where bdh is missing (Colab, say), it is installed: from the checkout around this notebook, or a wheel beside it.
import importlib.util
import pathlib
import subprocess
import sys

if importlib.util.find_spec("bdh") is None:
    wheels = sorted(map(str, pathlib.Path().glob("bdh-*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", wheels[-1] if wheels else ".."], check=True)

# %% [markdown]
# ## A model
#
# `bdh demo` trains one with 0.2 million parameters, unless `runs/demo` has it already: in three to six minutes on a CPU.

# %%
from pathlib import Path

if not Path("runs/demo/model").exists():
    subprocess.run([sys.executable, "-m", "bdh", "demo"], check=True, stdout=subprocess.DEVNULL)
print(*sorted(path.name for path in Path("runs/demo/model").iterdir()), sep="\n")

# %% [markdown]
# ## Load it
#
# After `import bdh`, the auto classes of `transformers` know the model. A token is a byte here, so there are 256.

# %%
import bdh  # before transformers, which then knows the model

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained("runs/demo/model").to(device)
tokenizer = AutoTokenizer.from_pretrained("runs/demo/model")

config = model.config
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
print(f"{config.n_layer} layer steps with the same weights, {config.n_head} heads of {config.neurons_per_head} neurons")

# %% [markdown]
# ## Let it write

# %%
print(model.generate_text(tokenizer, "The ", max_new_tokens=120, temperature=0.7, seed=1))

# %% [markdown]
# Piece by piece, as it is written:

# %%
for piece in model.stream_text(tokenizer, "A class is ", max_new_tokens=120, temperature=0.7, seed=1):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Temperature and top-k
#
# The model gives every next byte a probability. *Temperature* below 1 sharpens these, above 1 flattens them; 0 always takes
# the likeliest. *top-k* keeps only the k likeliest. The same seed gives the same text.
#
# Read the five below from the top: from dull and repetitive to inventive, and at 1.5 to nonsense.

# %%
for temperature, top_k in ((0, None), (0.5, None), (1.0, None), (1.0, 5), (1.5, None)):
    text = model.generate_text(
        tokenizer, "If the ", max_new_tokens=70, temperature=temperature, top_k=top_k or 0, seed=3
    )
    print(f"temperature {temperature}, top-k {top_k or 'all'}:\n    {text!r}")

# %% [markdown]
# ## What it expects next
#
# The logits of the last position, as probabilities. After "impor" a model of Python's documentation should know what comes.

# %%
import matplotlib.pyplot as plt

with torch.no_grad():
    logits = model(**tokenizer("The file object is impor", return_tensors="pt").to(device)).logits[0, -1]
top = logits.softmax(-1).topk(8)
fig, axis = plt.subplots(figsize=(6, 2.6))
axis.barh([repr(tokenizer.decode([i])) for i in top.indices.tolist()][::-1], top.values.cpu().flip(0))
axis.set(title="The next byte after “impor”", xlabel="probability", xlim=(0, 1))
fig.tight_layout()
plt.show()

# %% [markdown]
# The bar of `'t'` should be by far the longest.
#
# ## The state has one size
#
# A transformer keeps keys and values of every token that it has read. This model keeps a state of fixed size, whatever the length:

# %%
for length in (8, 100, 1000):
    text = "The " * (length // 4)
    with torch.no_grad():
        state = model(**tokenizer(text, return_tensors="pt").to(device)).cache
    print(f"{length:5} bytes of text: a state of {state.nbytes:,} bytes")

# %% [markdown]
# ## Where to go next
#
# Train one on your own text in [02](02_training.ipynb), make it talk in [03](03_finetuning.ipynb), see which neurons fire in
# [06](06_interpretability.ipynb), serve it in [09](09_deployment.ipynb).
