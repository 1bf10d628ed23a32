"""`bdh serve` of models that torchao or bitsandbytes have quantized, from its start to its end."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM

from bdh.generate.params import EngineConfig
from bdh.serve.config import ServeSettings
from bdh.serve.server import load
from benchmarks.forked import ForkServer
from tests.model.test_quantized_by_libraries import config_of

from .test_process import start_process  # noqa: F401 (a fixture)

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")
FORMATS = ["torchao int8 weight-only", "bitsandbytes int8", "bitsandbytes nf4"]


@pytest.fixture(scope="module")
def fork_server():
    with ForkServer("bdh.cli.models", "bdh.serve.server", "bdh.train.models", "torchao", "bitsandbytes") as server:
        yield server


@pytest.fixture(scope="module")
def quantized(chat_pair, tmp_path_factory):
    """By format: the model, and its folder."""
    model, tokenizer = chat_pair
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    found = {}
    for name in FORMATS:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config_of(name))
        its_folder = tmp_path_factory.mktemp(name.replace(" ", "-")) / "quantized"
        model.save_pretrained(its_folder)
        tokenizer.save_pretrained(its_folder)
        found[name] = model, its_folder
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_it_answers_says_which_path_runs_and_ends(quantized, chat_pair, start_process, fork_server, name):  # noqa: F811
    (model, folder), tokenizer = quantized[name], chat_pair[1]
    server = start_process(["serve", str(folder), "--port", "0"], forked=fork_server)
    library = name.split()[0]
    path = (
        f"torch on cpu, weights {library}, dense recurrent steps (a layer is quantized by {library}, which the kernels cannot "
        "read: int8 and int4 of bdh quantize are faster)"
    )
    assert server.wait_for("ready")["runs"] == path
    (listed,) = server.http.get("/v1/models").json()["data"]
    assert (listed["id"], listed["bdh"]["path"], listed["bdh"]["weights"]) == ("quantized", path, library)

    (choice,) = server.complete(prompt="abc", max_tokens=6, bdh={"save_state": True}).json()["choices"]
    assert choice["text"] == model.generate_text(tokenizer, "abc", max_new_tokens=6, temperature=0)
    state = {"from_state": choice["bdh"]["state_id"]}
    rest = server.complete(prompt="", max_tokens=3, bdh=state).json()["choices"][0]["logprobs"]["tokens"]
    assert choice["logprobs"]["tokens"] + rest == server.tokens(prompt="abc", max_tokens=9)

    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
    whole = server.http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    lines = server.http.post("/v1/chat/completions", json=chat | {"stream": True}).text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(piece.get("content") or "" for piece in pieces) == whole
    assert server.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_the_kernels_are_refused_by_name(quantized, chat_pair, name):
    library = name.split()[0]
    for engine, told in (
        (
            EngineConfig(weights="int8"),
            f"must be left out: the model's weights are stored in another format, {library}",
        ),
        (EngineConfig(state="int16"), f"must be float32 with torch's operations (a layer is quantized by {library}"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            load(ServeSettings(model="quantized", engine=engine), lambda: (quantized[name][0], chat_pair[1]))
