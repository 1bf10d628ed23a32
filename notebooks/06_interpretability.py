# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 6. Looking inside
#
# At the end you will have seen which neurons of a small model fire on which letters, how sparse they are beside a model that
# was not trained, one synapse getting stronger along a text, the graph between neurons beside random graphs, and what
# attention looks like without a softmax. Each figure comes with what it would be by chance. About a minute on two CPU cores.

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
import os

import bdh  # before transformers, which then knows the model

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from bdh import inspect
from bdh.data import DataConfig, training_texts, validation_texts

disable_progress_bar()
set_verbosity_error()
FAST = os.environ.get("BDH_NOTEBOOK_FAST") == "1"  # small settings, for a test of this notebook
model = AutoModelForCausalLM.from_pretrained("runs/demo/model")
tokenizer = AutoTokenizer.from_pretrained("runs/demo/model")
text = "".join(validation_texts(DataConfig(source="pydoc")))[: 600 if FAST else 4000]  # what the training held out
ids = tokenizer(text).input_ids
print(text[:300])

# %% [markdown]
# ## Which neurons fire where
#
# `model.trace` reads a text and keeps what the layer computes. Here x, the neurons that fire on what the model has just read, of the
# last layer step and the first head.

# %%
SENTENCE = "A class is a list of names."
trace = model.trace(SENTENCE, ["x"], tokenizer=tokenizer, layer_steps=[-1], heads=[0])
x = trace.x[0, 0]  # tokens, neurons
print(f"{(x > 0).float().mean():.1%} of the neurons of this head fire on a token, on average")
strongest = x.sum(0).topk(40).indices
fig, axis = plt.subplots(figsize=(9, 4.5))
axis.imshow(x[:, strongest].T, aspect="auto", cmap="Greens", interpolation="nearest")
axis.set_xticks(range(len(SENTENCE)), list(SENTENCE.replace(" ", "·")))
axis.set(title="The 40 neurons that fire most on this sentence", xlabel="byte that is read", ylabel="neuron, by rank")
fig.tight_layout()
plt.show()

# %% [markdown]
# The darker, the stronger. The upper neurons fire on nearly everything; a row with a few dark cells is a neuron that waits for something,
# as that of rank 31 does for a space. To see what, take neurons that fire rarely but strongly, and list the places of the
# held-out text where each fires most strongly:

# %%
longer = model.trace(text, ["x"], tokenizer=tokenizer, layer_steps=[-1], heads=[0]).x[0, 0]
share = (longer > 0).float().mean(0)
rare = [n for n in longer.amax(0).argsort(descending=True).tolist() if 0.005 < share[n] < 0.08]
for neuron in rare[:8]:
    places = longer[:, neuron].topk(6).indices.tolist()
    shown = [text[max(0, place - 6) : place + 1].replace("\n", "⏎") for place in places]
    print(f"neuron {neuron:>3} fires on {share[neuron]:.1%} of the bytes, most strongly at the end of {shown}")

# %% [markdown]
# In the run that is stored here, three of the six places of neuron 316 are an I that begins a sentence, and three of those of neuron 206 an
# opening bracket. Most others fire at several letters that seem to have nothing in common: six places are few, and a neuron of so small a
# model need not stand for one thing.
#
# ## How sparse
#
# A share says nothing without one to compare: the same model with fresh weights.

# %%
found = inspect.density(model, ids)
fig, axes = plt.subplots(1, 3, figsize=(11, 2.8), sharey=True)
for axis, name in zip(axes, ("x", "y", "z"), strict=True):
    for which, shares in (("trained", found.model), ("untrained", found.untrained)):
        for step, of_step in enumerate(shares.by_head[name]):
            color = {"trained": "teal", "untrained": "grey"}[which]
            axis.plot(
                range(1, 5), of_step, "o-" if step == 0 else "s--", color=color, label=f"{which}, step {step + 1}"
            )
    axis.set(title=f"Neurons of {name} that fire", xlabel="head", xticks=range(1, 5), ylim=(0, 0.6))
axes[0].set_ylabel("share")
axes[2].legend(fontsize=7)
fig.tight_layout()
plt.show()

# %% [markdown]
# Without training half of x fires, since nothing says otherwise. Training has made it sparse in both layer steps, though nothing in the
# loss asks for it. z = x * y is what goes on to the next layer step.

# %%
fig, axis = plt.subplots(figsize=(7, 2.6))
for name, color in (("x", "teal"), ("y", "darkorange"), ("z", "purple")):
    axis.plot(found.model.by_position[name][-1][:200], color=color, label=name, linewidth=0.9)
axis.set(title="Along the text, last layer step", xlabel="position", ylabel="share that fires")
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# At the first byte there is nothing to recall, so no y fires, and no z.
#
# ## One synapse
#
# How strongly would neuron i, if it fired now, drive neuron j through the state? The state changes with every byte, so that is a
# curve along the text. Grey is what the same bytes give in random order: what is left there is due to which bytes there are, not to
# what they say.

# %%
length = 200 if FAST else 600
first = model.trace(text[:length], ["x", "z"], tokenizer=tokenizer, layer_steps=[-1], heads=[0])
source, target = int(first.x.sum((0, 1, 2)).argmax()), int(first.z.sum((0, 1, 2)).argmax())
synapse = inspect.synapse_trace(model, ids[:length], head=0, layer_step=1, source=source, target=target)
fig, axis = plt.subplots(figsize=(9, 3))
mean, spread = synapse.shuffled_mean, synapse.shuffled_spread
axis.fill_between(
    range(length), mean - 2 * spread, mean + 2 * spread, color="lightgrey", label="random order, ± 2 spreads"
)
axis.plot(synapse.strength, color="teal", label="this text")
axis.set(title=f"From neuron {source} to neuron {target}", xlabel="position in the text", ylabel="strength")
axis.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# Where the line leaves the grey band, the order of the bytes matters. In the stored run it does so a little in the first
# hundred bytes, and not after them: the synapse grows, but which bytes there are explains that, whatever their order. The
# waves are the rotation of the pair that the neuron belongs to. The strength has no unit: only its course means something.
# One synapse on one text is an example, and no proof of anything.
#
# ## The graph between neurons
#
# What neuron j adds to the stream may make neuron i fire in the next layer step: a connection, by the weights alone. We keep the
# strongest, eight per neuron on average, look for communities, and compare with random graphs in which every neuron has as many
# edges as here.

# %%
rows = []
for head in range(model.config.n_head):
    for name, of in (("trained", model), ("untrained", inspect.untrained_twin(model))):
        graph = inspect.neuron_graph(of, head)
        rows.append((head, name, graph))
        print(
            f"head {head + 1}, {name:<9}: modularity {graph.modularity:.3f}, random graphs {graph.random_mean:.3f} ± "
            f"{graph.random_spread:.3f}, {graph.z_score:5.1f} spreads above"
        )

# %%
fig, axis = plt.subplots(figsize=(7, 2.8))
for place, (_, _, graph) in enumerate(rows):
    axis.bar(place, graph.modularity, color="teal" if place % 2 == 0 else "lightgrey")
    axis.errorbar(place, graph.random_mean, 2 * graph.random_spread, color="black", capsize=6, marker="_")
axis.set_xticks(range(len(rows)), [f"{head + 1}\n{name}" for head, name, _ in rows], fontsize=7)
axis.set(
    title="Communities, beside random graphs of the same degrees (black: ± 2 spreads)",
    xlabel="head",
    ylabel="modularity",
)
fig.tight_layout()
plt.show()

# %% [markdown]
# A bar by itself means little: every graph has communities if one searches for them. What counts is how far it is above its black mark.
# Untrained weights are within two spreads of theirs, trained ones far above. The densest part of one of these graphs, coloured by community:

# %%
import networkx

graph = networkx.Graph(rows[0][2].edges.tolist())
core = graph.subgraph(sorted(graph, key=graph.degree, reverse=True)[:60])
places = networkx.spring_layout(core, seed=1, iterations=30)
communities = networkx.community.louvain_communities(core, seed=1)
colors = {node: number for number, nodes in enumerate(communities) for node in nodes}
fig, axis = plt.subplots(figsize=(5, 4), dpi=70)
networkx.draw_networkx_edges(core, places, ax=axis, alpha=0.1)
networkx.draw_networkx_nodes(
    core, places, ax=axis, node_size=25, node_color=[colors[node] for node in core], cmap="tab10"
)
axis.set(title="The 60 neurons of head 1 with most connections")
axis.axis("off")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Attention
#
# A score is the product of a token's query with an earlier token's key, which are both its rotated x. There is no softmax, so scores
# may be negative and need not sum to 1. Beside it a small GPT-2, trained here for a moment on the same text, where each row sums to 1.

# %%
q = model.trace(SENTENCE, ["q"], tokenizer=tokenizer, layer_steps=[-1]).q[0]  # heads, tokens, neurons
scores = (q @ q.transpose(-1, -2)).tril(-1)

from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
gpt2 = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256,
        n_positions=128,
        n_layer=2,
        n_embd=96,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
)
read = torch.frombuffer(bytearray("".join(training_texts(DataConfig(source="pydoc"))).encode()), dtype=torch.uint8)
optimizer = torch.optim.AdamW(gpt2.parameters(), lr=2e-3)
generator = torch.Generator().manual_seed(0)
for _ in range(10 if FAST else 400):
    starts = torch.randint(len(read) - 96, (16,), generator=generator).tolist()
    batch = torch.stack([read[start : start + 96] for start in starts]).long()
    loss = gpt2(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"GPT-2: {loss.item():.2f} nats per byte on its last batch")
with torch.no_grad():
    attentions = gpt2.eval()(torch.tensor([tokenizer(SENTENCE).input_ids]), output_attentions=True).attentions[-1][0]

# %%
fig, axes = plt.subplots(2, 4, figsize=(11, 6))
for head in range(4):
    most = float(scores[head].abs().max())
    axes[0, head].imshow(scores[head], cmap="PRGn", vmin=-most, vmax=most)
    axes[0, head].set_title(f"BDH, head {head + 1}", fontsize=9)
    axes[1, head].imshow(attentions[head], cmap="Greens", vmin=0)
    axes[1, head].set_title(f"GPT-2, head {head + 1}", fontsize=9)
for axis in axes.flat:
    axis.set_xticks(range(len(SENTENCE)), list(SENTENCE.replace(" ", "·")), fontsize=5)
    axis.set_yticks(range(len(SENTENCE)), list(SENTENCE.replace(" ", "·")), fontsize=5)
fig.suptitle("Which earlier byte (column) a byte (row) attends to, last layer step")
fig.tight_layout()
plt.show()

# %% [markdown]
# Above, green adds an earlier byte's value and purple takes it away; the diagonal is empty, since a byte does not see itself. Below there is
# green alone. BDH's heads read mostly what is near here: a token's query and key are the same neurons, and rotation turns them apart
# with distance.
#
# Next: [beside a transformer](07_comparison.ipynb).
