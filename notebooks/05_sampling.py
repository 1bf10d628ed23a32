# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 5. Sampling
#
# At the end you will know what temperature, top-k, top-p, min-p and the penalties do to a distribution, because you will
# have drawn it; and what they do to texts. In Jupyter, sliders let you play with them; elsewhere there are pictures.

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
from pathlib import Path

if not Path("runs/demo/model").exists():  # three to six minutes on two CPU cores
    subprocess.run([sys.executable, "-m", "bdh", "demo"], check=True, stdout=subprocess.DEVNULL)

# %%
import bdh  # before transformers, which then knows the model

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained("runs/demo/model").to(device)
tokenizer = AutoTokenizer.from_pretrained("runs/demo/model")

# %% [markdown]
# ## The distribution before anything is done to it
#
# The model reads a prompt and gives every byte a probability of being next. The 15 likeliest are drawn, always in this order.

# %%
PROMPT = "The function returns a "
with torch.no_grad():
    logits = model(**tokenizer(PROMPT, return_tensors="pt").to(device)).logits[0, -1].cpu()


def only(p, keep):
    """Removes the other tokens; what is left adds up to 1 again."""
    kept = torch.where(keep, p, 0)
    return kept / kept.sum()


def probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What is drawn from. Each setting is applied to what those before it have left."""
    p = (logits / temperature).softmax(-1)
    if top_k:
        p = only(p, p >= p.topk(top_k).values[-1])
    # top-p: the likeliest tokens, until together they have this probability.
    ordered = p.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    p = only(p, torch.zeros_like(p, dtype=torch.bool).scatter(0, ordered.indices, before < top_p))
    return only(p, p >= min_p * p.max())


def draw(axis, p, title):
    top = logits.softmax(-1).topk(15).indices
    axis.bar(range(15), p[top], color="teal")
    axis.set_xticks(range(15), [repr(tokenizer.decode([i]))[1:-1] for i in top.tolist()])
    axis.set(title=title, xlabel="next byte", ylabel="probability", ylim=(0, max(0.5, p.max())))


fig, axis = plt.subplots(figsize=(7, 2.6))
draw(axis, probabilities(logits), f"The next byte after {PROMPT!r}")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## What the settings do to it

# %%
SETTINGS = (
    {"temperature": 0.5},
    {"temperature": 1.5},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.5, "min_p": 0.2},
)
fig, axes = plt.subplots(2, 3, figsize=(12, 5), sharey=True)
for axis, settings in zip(axes.flat, SETTINGS, strict=True):
    draw(axis, probabilities(logits, **settings), ", ".join(f"{name} {value}" for name, value in settings.items()))
fig.tight_layout()
plt.show()

# %% [markdown]
# - *temperature* changes all bars and removes none; below 1 the high ones grow.
# - *top-k* keeps a fixed number, whether the model is sure or not.
# - *top-p* keeps few where the model is sure and many where it is not.
# - *min-p* keeps what is not much less likely than the best, so that a high temperature need not give nonsense.
#
# ## Does the library do the same?
#
# The shares of 2,000 draws by the library's own sampler, compared with the computed distribution:

# %%
SETTING = {"temperature": 1.2, "top_k": 6, "top_p": 0.9}
draws = model.generate_texts(tokenizer, [PROMPT] * 2000, max_new_tokens=1, seed=None, **SETTING)
counts = torch.zeros(len(logits))
for (text,) in draws:
    for token in tokenizer.encode(text):
        counts[token] += 1
expected = probabilities(logits, **SETTING)
difference = float((counts / counts.sum() - expected).abs().max())
print("the largest difference of a probability:", round(difference, 3))
assert difference < 0.06

# %% [markdown]
# With 2,000 draws a difference of up to about 0.03 is chance; one of 0.06, more than five standard deviations, would be a fault.
#
# ## Sliders
#
# In Jupyter, sliders below this cell move the bars. Where widgets do not run, as on GitHub, the pictures above say the same.

# %%
try:
    from ipywidgets import FloatSlider, IntSlider, interact

    @interact(
        temperature=FloatSlider(1.0, min=0.1, max=3),
        top_k=IntSlider(0, min=0, max=15),
        top_p=FloatSlider(1.0, min=0.05, max=1, step=0.05),
        min_p=FloatSlider(0.0, min=0, max=0.9, step=0.05),
    )
    def play(temperature, top_k, top_p, min_p):
        _, axis = plt.subplots(figsize=(7, 2.6))
        p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        draw(axis, p, f"{int((p > 0).sum())} of {len(p)} bytes can be drawn")
        plt.show()

except ImportError:
    print("pip install ipywidgets shows sliders here")

# %% [markdown]
# ## Texts
#
# The same prompt and seed under other settings.

# %%
for settings in ({"temperature": 0}, {"temperature": 0.6}, {"temperature": 1.2}, {"temperature": 1.2, "min_p": 0.1}):
    text = model.generate_text(tokenizer, "If the ", max_new_tokens=110, seed=5, **settings)
    print(f"{settings}\n    {text!r}\n")

# %% [markdown]
# ## Penalties
#
# At temperature 0 a small model repeats itself. Penalties make tokens that the text has already less likely: a *repetition penalty*
# divides or multiplies their logits, a *presence penalty* subtracts the same from each, a *frequency penalty* more the more often it was
# there. Tokens are bytes here, so strong penalties forbid letters: they are made for larger vocabularies.

# %%
for settings in ({}, {"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": 1.0}):
    text = model.generate_text(tokenizer, "The ", max_new_tokens=110, temperature=0, **settings)
    print(f"{settings or 'none'}\n    {text!r}\n")

# %% [markdown]
# ## Several at once
#
# `n` continuations of one prompt, which is read once. Each has its own seed, and none depends on what runs beside it.

# %%
for text in model.generate_texts(tokenizer, ["A list "], n=4, max_new_tokens=60, temperature=0.8, seed=11)[0]:
    print(repr(text))

# %% [markdown]
# Next: [look inside](06_interpretability.ipynb).
