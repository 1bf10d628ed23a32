# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 3. Training a model further
#
# At the end the demo's model, which knows Python's documentation, will have learned Python code, with all of its weights and
# with small adapters (LoRA); and it will answer questions that it is asked as a chat. About four minutes on two CPU cores.

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
# ## Before
#
# The model has read documentation, and code surprises it. Perplexity says how much: 10 means that it is as unsure of the next byte as if
# ten were equally likely. It is measured on 30 kB of the part of `stdlib`, the source code of Python's library, that training holds out.

# %%
import itertools

from bdh.data import DataConfig, validation_texts

held_out = "".join(itertools.islice(validation_texts(DataConfig(source="stdlib")), 40))[: 5_000 if FAST else 30_000]
Path("code.txt").write_text(held_out, encoding="utf-8")
figures = {}


def evaluate(name, model):
    command = [sys.executable, "-m", "bdh", "eval", model, "--data.source", "code.txt", "--part", "all", "--json"]
    figures[name] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["perplexity"]
    print(f"{name:<12} perplexity {figures[name]:.2f} on held-out code")


evaluate("before", "runs/demo/model")
run_bdh(
    "generate", "runs/demo/model", "--prompt", "def read(", "--max_new_tokens", 80, "--temperature", 0.5, "--seed", 1
)

# %% [markdown]
# ## All weights
#
# `train.init_from` starts from a finished model; the rest is training as before. The learning rate is lower than it was for the demo.

# %%
STEPS = 10 if FAST else 400
SHARED = ["--train.max_steps", STEPS, "--train.eval_every_steps", STEPS // 2, "--train.sample_every_steps", 0]
SHARED += ["--train.eval_windows", 16 if FAST else 64, "--train.warmup_steps", 10]
shutil.rmtree("runs/notebook-03-full", ignore_errors=True)
run_bdh("train", "--config", "finetune", *SHARED, "--run_dir", "runs/notebook-03-full", lines=4)

# %% [markdown]
# ## Adapters
#
# With `train.lora.r` the weights stay as they are, to the bit, and small matrices beside them learn: 39,168 numbers instead of
# 245,760. They can be stored alone, so that one base model serves many purposes.

# %%
shutil.rmtree("runs/notebook-03-lora", ignore_errors=True)
run_bdh(
    "train", "--config", "lora", *SHARED, "--checkpoint.export", "last", "--run_dir", "runs/notebook-03-lora", lines=4
)
shutil.rmtree("runs/notebook-03-adapters", ignore_errors=True)
run_bdh("export", "runs/notebook-03-lora", "runs/notebook-03-adapters", "--merge", "false")


def megabytes(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6


print(
    f"whole model {megabytes('runs/notebook-03-full/model'):.2f} MB, adapters {megabytes('runs/notebook-03-adapters'):.2f} MB"
)

# %% [markdown]
# ## After
#
# The same text as before.

# %%
evaluate("all weights", "runs/notebook-03-full/model")
evaluate("adapters", "runs/notebook-03-adapters")

# %%
import matplotlib.pyplot as plt

fig, axis = plt.subplots(figsize=(5, 2))
axis.barh(list(figures)[::-1], list(figures.values())[::-1], color="teal")
axis.set(title="Code that none of them has seen", xlabel="perplexity per byte (lower is better)")
fig.tight_layout()
plt.show()

# %% [markdown]
# Both perplexities should be far below the first. Adapters, with so few numbers, usually end a little above training of all weights.
#
# ## A chat
#
# Conversations are lines of JSON. In ours the user asks for the first of three words. Only the assistant's answers are learned.

# %%
import random

WORDS = [
    "stone",
    "bread",
    "river",
    "tiger",
    "green",
    "apple",
    "cloud",
    "paper",
    "seven",
    "music",
    "horse",
    "light",
    "chair",
    "ocean",
    "candle",
    "garden",
]
random.seed(0)
with open("chat.jsonl", "w", encoding="utf-8") as file:
    for _ in range(2000):
        words = random.sample(WORDS, 3)
        ask = {"role": "user", "content": f"First of {', '.join(words)}?"}
        answer = {"role": "assistant", "content": f"It is {words[0]}."}
        file.write(json.dumps({"messages": [ask, answer]}) + "\n")
shutil.rmtree("runs/notebook-03-chat", ignore_errors=True)
chat_steps = ["--train.max_steps", 20 if FAST else 300, "--train.sample_every_steps", 0, "--train.eval_every_steps", 30]
run_bdh(
    "train",
    "--config",
    "chat",
    "--data.source",
    "chat.jsonl",
    *chat_steps,
    "--run_dir",
    "runs/notebook-03-chat",
    lines=4,
)

# %%
questions = [f"First of {words}?" for words in ("tiger, green, apple", "ocean, bread, seven", "music, tiger, stone")]
Path("questions.txt").write_text("\n".join(questions))
run_bdh(
    "generate", "runs/notebook-03-chat/model", "--chat", "--temperature", 0, "--prompts_file", "questions.txt", lines=5
)

# %% [markdown]
# The same with transformers alone: the chat template is part of the tokenizer.

# %%
import bdh  # before transformers, which then knows the model

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained("runs/notebook-03-chat/model")
model = AutoModelForCausalLM.from_pretrained("runs/notebook-03-chat/model")
messages = [{"role": "user", "content": "First of candle, river, light?"}]
asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**asked, do_sample=False, max_new_tokens=30)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))

# %% [markdown]
# `bdh chat runs/notebook-03-chat/model` talks in a terminal. Next: [tokenizers](04_tokenizers.ipynb).
