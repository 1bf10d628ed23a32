# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # 9. Deployment
#
# At the end a server with OpenAI's API will have run in this notebook, with a key, clients, streaming, answers in a
# given form, a saved state and metrics; and you will know how to put it behind a proxy or into a container.

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

# %% [markdown]
# ## Start it
#
# In a terminal: `bdh serve runs/demo/model`. Here it runs in the background, with a key that clients must send.

# %%
import os
import time
import urllib.request

PORT, KEY = 8765, "a-key-of-our-own"
log = open("server.log", "w")  # noqa: SIM115 (for as long as the server runs)
server = subprocess.Popen(
    [sys.executable, "-m", "bdh", "serve", "runs/demo/model", "--port", str(PORT), "--metrics", "true"],
    env={**os.environ, "BDH_API_KEYS": KEY},
    stdout=log,
    stderr=log,
)
BASE = f"http://127.0.0.1:{PORT}"
for _ in range(600):
    try:
        print(urllib.request.urlopen(f"{BASE}/health/ready").read().decode())
        break
    except OSError:
        assert server.poll() is None, Path("server.log").read_text()
        time.sleep(0.2)

# %% [markdown]
# ## Ask it
#
# Any client for OpenAI's API will do; this is OpenAI's own (`pip install openai`).

# %%
from openai import OpenAI

client = OpenAI(base_url=f"{BASE}/v1", api_key=KEY)
model = client.models.list().data[0]
print(model.id, model.model_extra)
completion = client.completions.create(model=model.id, prompt="The ", max_tokens=60, temperature=0.7, seed=1)
print(repr(completion.choices[0].text))
print(completion.usage)

# %% [markdown]
# ## A stream

# %%
for chunk in client.completions.create(
    model=model.id, prompt="A class ", max_tokens=80, temperature=0.7, seed=2, stream=True
):
    print(chunk.choices[0].text, end="", flush=True)

# %% [markdown]
# ## Without a client, and without a key

# %%
import json

body = {"model": model.id, "prompt": "import ", "max_tokens": 30, "temperature": 0}


def post(path, body, key):
    request = urllib.request.Request(f"{BASE}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


print(post("/v1/completions", body, KEY)[1]["choices"][0]["text"])
print(post("/v1/completions", body, None))

# %% [markdown]
# ## An answer of a given form
#
# Which bytes may follow is computed from the form, so it is held exactly, whatever the model would like to write.

# %%
form = {"type": "regex", "pattern": "[0-9]{4}-[0-9]{2}-[0-9]{2}"}
dated = {"model": model.id, "prompt": "Released on ", "max_tokens": 20, "seed": 3, "response_format": form}
print(post("/v1/completions", dated, KEY)[1]["choices"][0]["text"])

# %% [markdown]
# ## A state that outlasts the request
#
# The model's memory of a text has a fixed size, so it can be kept: read a long text once, ask many times. The answer names
# the state, and the next request continues from it. (What is written then is poor: this model was trained on sequences of 96 bytes, and
# the text has 1,020. That it was not read again is what to see: only the new bytes are counted.)

# %%
text = "The with statement wraps the execution of a block. " * 20
read = {"model": model.id, "prompt": text, "max_tokens": 1, "bdh": {"save_state": True}}
status, answer = post("/v1/completions", read, KEY)
print(status, answer["usage"])
state = answer["choices"][0]["bdh"]["state_id"]
print(state)
for prompt in ("It ", "A block "):
    more = {
        "model": model.id,
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0.5,
        "seed": 4,
        "bdh": {"from_state": state},
    }
    _, answer = post("/v1/completions", more, KEY)
    print(answer["usage"]["prompt_tokens"], "tokens read:", repr(answer["choices"][0]["text"]))

# %% [markdown]
# ## Many at once
#
# Requests join and leave at every token, and no text depends on another.

# %%
from concurrent.futures import ThreadPoolExecutor

start = time.perf_counter()
with ThreadPoolExecutor(8) as pool:
    ask = {"model": model.id, "prompt": "The ", "max_tokens": 100, "temperature": 0.7, "seed": 1}
    answers = list(pool.map(lambda _: post("/v1/completions", ask, KEY)[1], range(16)))
seconds = time.perf_counter() - start
tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
print(f"16 requests, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s")
print("all texts equal:", len({answer["choices"][0]["text"] for answer in answers}) == 1)

# %% [markdown]
# ## Metrics
#
# In Prometheus' format, for dashboards and alarms.

# %%
request = urllib.request.Request(f"{BASE}/metrics", headers={"Authorization": f"Bearer {KEY}"})
lines = urllib.request.urlopen(request).read().decode().splitlines()
print(
    *(line for line in lines if not line.startswith("#") and "bucket" not in line and "_created" not in line), sep="\n"
)

# %% [markdown]
# ## Stopping it
#
# On SIGTERM it refuses new requests, finishes those that are running, and exits.

# %%
server.terminate()
print("status", server.wait(60))
log.close()
print(*Path("server.log").read_text().splitlines()[-3:], sep="\n")

# %% [markdown]
# ## Behind a proxy, in a container
#
# `deploy/` of the checkout has a Dockerfile, two replicas behind nginx with TLS, Prometheus and Grafana, Kubernetes and systemd:
#
# ```sh
# docker build -f deploy/Dockerfile -t bdh .
# docker run -p 8000:8000 -v $PWD/runs/demo/model:/model:ro bdh
# ```
#
# These two lines are not run here, since a notebook has no Docker. That was the last one: back to the [first](01_quickstart.ipynb).
