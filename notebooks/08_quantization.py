# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 8. Weights in 8 and 4 bits
#
# At the end you will have a model in a quarter and in a seventh of its bytes, know what that does to its predictions and to its
# speed on this machine, and have loaded it like any other. About two minutes on two CPU cores.

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

if not Path("runs/demo/model").exists():  # about three minutes on two CPU cores
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
# Everything that was printed is in `quantization.json` beside the weights.

# %%
reports = {}
for name in FORMATS:
    folder = Path(f"runs/notebook-08-{name.replace(' ', '-')}")
    reports[name] = json.loads((folder / "quantization.json").read_text())
    bytes_on_disk = (folder / "model.safetensors").stat().st_size
    reports[name]["share"] = bytes_on_disk / Path("runs/demo/model/model.safetensors").stat().st_size
print(json.dumps(reports["int8"], indent=1)[:1500])

# %%
import matplotlib.pyplot as plt

fig, axis = plt.subplots(figsize=(6, 2.4))
axis.barh(["float32", *FORMATS][::-1], [1, *(report["share"] for report in reports.values())][::-1], color="teal")
axis.set(title="Bytes on disk", xlabel="of float32's")
fig.tight_layout()
plt.show()

# %% [markdown]
# The embedding and the head of this small model stay in float32; at 25M parameters the shares are 0.256, 0.182 and 0.145.
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
# Text at temperature 0 is the same for as long as no two bytes are nearly equally likely.
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
# that do not fit into the cache. `bdh bench quantize` makes one of 25M parameters, checks that all agree, and times them by turns;
# here with a smaller one, to be quick.

# %%
SIZES = ["--quick"] if FAST else ["--n_embd", 128, "--n_layer", 4, "--agreement_tokens", 200]
run_bdh("bench", "quantize", *SIZES, lines=30)

# %% [markdown]
# ## Deployment
#
# `bdh serve runs/notebook-08-int8` serves it; `/v1/models` says the format. Next: [deployment](09_deployment.ipynb).
