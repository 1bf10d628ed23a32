# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 8. Weights in 8 and 4 bits
#
# At the end you will have a model in a third and in a quarter of its bytes (of a larger one it would be a quarter and a seventh), know
# what that does to its predictions and to the speed on this machine, and have loaded it like any other. About two minutes on two CPU cores.

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
import json
import os
import shutil

FAST = os.environ.get("BDH_NOTEBOOK_FAST") == "1"  # small settings, for a test of this notebook


def run_bdh(*arguments, lines=12):
    """Runs a command and shows its last lines."""
    command = [sys.executable, "-m", "bdh", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}  # no moving bars
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    print(*run.stdout.strip().splitlines()[-lines:], sep="\n")
    assert run.returncode == 0


# %% [markdown]
# ## Write them
#
# `rtn` rounds each weight to the nearest code; `gptq` chooses the codes so that the layer's outputs change least on a text. The
# report measures both on text that was held out.

# %%
TOKENS = ["--held_out_tokens", 2048 if FAST else 16384]
FORMATS = {
    "int8": [],
    "mixed": [],
    "int4": [],
    "int4 gptq": ["--method", "gptq", "--calibration_tokens", 2048 if FAST else 16384],
}
for name, more in FORMATS.items():
    out = f"runs/notebook-08-{name.replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    print(f"--- {name}")
    run_bdh("quantize", "runs/demo", out, "--weights", name.split()[0], *more, *TOKENS, lines=6)

# %% [markdown]
# ## Size and quality
#
# Everything that was printed is in `quantization.json` beside the weights. As a table:

# %%
reports = {}
for name in FORMATS:
    folder = Path(f"runs/notebook-08-{name.replace(' ', '-')}")
    report = json.loads((folder / "quantization.json").read_text())
    text = report["text"]
    reports[name] = {
        "share of bytes": report["bytes"]["after"] / report["bytes"]["before"],
        "perplexity, %": 100 * (text["after"]["perplexity"] / text["before"]["perplexity"] - 1),
        "KL, nats": text["kl"],
        "same prediction": text["same_prediction"],
    }
print(f"{'':<10}", *(f"{column:>16}" for column in reports["int8"]))
for name, columns in reports.items():
    print(f"{name:<10}", *(f"{value:>16.4f}" for value in columns.values()))

# %%
import matplotlib.pyplot as plt

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True)
names = ["float32", *FORMATS][::-1]
left.barh(names, [1, *(columns["share of bytes"] for columns in reports.values())][::-1], color="teal")
left.set(title="Bytes", xlabel="share of float32's")
right.barh(names, [0, *(columns["perplexity, %"] for columns in reports.values())][::-1], color="darkorange")
right.set(title="Perplexity on held-out text", xlabel="change in % (0: none)")
fig.tight_layout()
plt.show()

# %% [markdown]
# Eight bits change next to nothing; four cost a little, and `gptq` wins back most of that. The embedding and the head, a tenth of this
# small model, stay in float32. Of a larger one they are less: at 25M parameters int8 takes 0.256 of the bytes, mixed 0.182, int4 0.145.
#
# ## They load like any model

# %%
import bdh  # before transformers, which then knows the model

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained("runs/demo/model")
for name in ("runs/demo/model", "runs/notebook-08-int8", "runs/notebook-08-int4"):
    model = AutoModelForCausalLM.from_pretrained(name)
    print(f"{name}\n    {model.generate_text(tokenizer, 'The ', max_new_tokens=90, temperature=0)!r}")

# %% [markdown]
# At temperature 0 the texts are the same until two bytes are nearly equally likely; with four bits that comes sooner.
#
# ## Without writing anything
#
# `from_pretrained` rounds while it loads, and every command that generates takes `--engine.weights int8`.

# %%
from bdh import BDHQuantizationConfig

model = AutoModelForCausalLM.from_pretrained("runs/demo/model", quantization_config=BDHQuantizationConfig("int8"))
print(type(model.encoder).__name__, f"{sum(b.numel() * b.element_size() for b in model.encoder.buffers()):,} bytes")

# %% [markdown]
# ## Speed
#
# Decoding moves the weights and the state through the processor once for each token: fewer bytes, less time. That shows in models
# that do not fit into the cache. Unpacking four bits costs time too, at this size more than it saves over eight. `bdh bench
# quantize` makes a model of 25M parameters, checks that all formats agree, and times them by turns; here a smaller one, to be
# quick. Below 1 in the column `times float32` is faster. GPT-2, torchao and bitsandbytes are there for comparison, the last
# two where they are installed.

# %%
SIZES = ["--quick"] if FAST else ["--n_embd", 128, "--n_layer", 4, "--agreement_tokens", 200]
run_bdh("bench", "quantize", *SIZES, lines=30)

# %% [markdown]
# ## Deployment
#
# `bdh serve runs/notebook-08-int8` serves it; `/v1/models` tells the format. Next: [deployment](09_deployment.ipynb).
