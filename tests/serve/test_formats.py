"""``response_format``: answers that parse, as OpenAI's own package asks for them."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from enum import StrEnum

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from bdh.generate.engine import Engine
from bdh.generate.grammar import GRAMMAR_FAULT
from bdh.generate.params import SamplingParams
from bdh.serve.completions import finish_unfinished
from bdh.serve.config import StateSettings
from bdh.tokenizer import train_tokenizer
from tests.serve.conftest import made_model

QUESTION = [{"role": "user", "content": "How many birds?"}]
NAMES = {
    "type": "object",
    "properties": {"bird": {"enum": ["crow", "κόρακας"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["bird", "count"],
    "additionalProperties": False,
}


class Bird(StrEnum):
    crow = "crow"
    gull = "gull"


class Sighting(BaseModel):
    bird: Bird
    count: int = Field(ge=0, le=99)
    place: str = Field(max_length=5)
    calls: list[bool] = Field(max_length=2)


@pytest.fixture(scope="module")
def client(chat_server):
    return OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0)


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "found", "schema": schema, **more}}


@pytest.mark.parametrize("seed", range(3))
def test_a_pydantic_model_comes_back_whole_and_streamed(client, seed):
    asked = {"model": "chatty", "messages": QUESTION, "seed": seed, "max_completion_tokens": 600}
    message = client.chat.completions.parse(response_format=Sighting, **asked).choices[0].message
    assert isinstance(message.parsed, Sighting)
    with client.chat.completions.stream(response_format=Sighting, **asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("stop", message.content)
    assert final.message.parsed == message.parsed


@pytest.mark.parametrize("strict", [True, False, None])
def test_every_choice_follows_the_schema_and_n_of_them_differ(client, strict):
    answer = client.chat.completions.create(
        model="chatty",
        messages=QUESTION,
        n=4,
        seed=1,
        max_tokens=300,
        response_format=schema_format(NAMES, strict=strict, description="a sighting"),
    )
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    found = [json.loads(choice.message.content) for choice in answer.choices]
    assert all(each["bird"] in ("crow", "κόρακας") and 0 <= each["count"] <= 99 for each in found)
    assert len({choice.message.content for choice in answer.choices}) == 4


def test_a_json_object_is_one_or_is_cut_off(client):
    for seed in range(4):
        answer = client.chat.completions.create(
            model="chatty", messages=QUESTION, seed=seed, max_tokens=80, response_format={"type": "json_object"}
        )
        (choice,) = answer.choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_text_is_any_text(server, client):
    assert server.text(response_format={"type": "text"}, max_tokens=20) == server.text(max_tokens=20)
    assert server.text(response_format=None, max_tokens=20) == server.text(max_tokens=20)
    assert server.text(response_format={}, max_tokens=20) == server.text(max_tokens=20)
    free = client.chat.completions.create(model="chatty", messages=QUESTION, temperature=0, max_tokens=9)
    text = client.chat.completions.create(
        model="chatty", messages=QUESTION, temperature=0, max_tokens=9, response_format={"type": "text"}
    )
    assert free.choices[0].message.content == text.choices[0].message.content


def test_completions_have_it_too_with_the_best_of_several_and_a_state(server, bytes_pair):
    pattern = {"type": "regex", "pattern": "[a-c]{3}-[0-9]{1,3}!"}
    answer = server.complete(["one", "two"], n=2, temperature=1, seed=1, max_tokens=20, response_format=pattern).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 4
    assert all(re.fullmatch(pattern["pattern"], text) for text in texts)
    params = SamplingParams(max_tokens=20, n=2, seed=1, grammar={"regex": pattern["pattern"]})
    expected = Engine(*bytes_pair).generate(["one", "two"], params)
    assert texts == [each.text for several in expected for each in several]

    best = server.complete(best_of=3, temperature=1, max_tokens=20, response_format=pattern, bdh={"save_state": True})
    (choice,) = best.json()["choices"]
    assert re.fullmatch(pattern["pattern"], choice["text"])
    again = {"from_state": choice["bdh"]["state_id"]}
    assert re.fullmatch(pattern["pattern"], server.text("", max_tokens=20, response_format=pattern, bdh=again))


@pytest.mark.parametrize(
    ("given", "told", "param"),
    [
        ({"type": "yaml"}, "Input should be 'text', 'json_object', 'json_schema' or 'regex'", "response_format.type"),
        ({"pattern": "a"}, "must be given with the type regex", "response_format.pattern"),
        ({"type": "regex"}, "must be given with the type regex", "response_format.pattern"),
        ({"type": "text", "pattern": "a"}, "must be given with the type regex", "response_format.pattern"),
        ({"type": "json_schema"}, "must be given with the type json_schema", "response_format.json_schema"),
        ({"type": "regex", "pattern": "(a"}, "unclosed group", "response_format"),
        (schema_format({"type": "objekt"}), "Invalid type: objekt", "response_format"),
        (schema_format({"not": {}}), 'Unimplemented keys: ["not"]', "response_format"),
        (schema_format({"description": "\ud800"}), "half of a surrogate pair", "response_format"),
        (schema_format({"const": "x" * 100_001}), "at most 100,000", "response_format"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(server, given, told, param):
    body = json.dumps({"prompt": "a", "response_format": given})
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert told in error["message"]


def test_a_grammar_that_grows_too_complex_is_the_requests_own_fault(server):
    bomb = {"type": "regex", "pattern": "((a{1,1000}){1,1000}){1,1000}"}
    answer = server.complete(max_tokens=200, ignore_eos=True, response_format=bomb)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
    assert GRAMMAR_FAULT in answer.json()["error"]["message"]
    streamed = server.complete(max_tokens=200, ignore_eos=True, response_format=bomb, stream=True)
    last = json.loads(streamed.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["param"] == "response_format"
    server.idle()


def test_a_tokenizer_without_bytes_is_told(start_server):
    tokenizer = train_tokenizer(["a bird sings"] * 20, "wordpiece", 30)
    server = start_server(made_model(len(tokenizer)), tokenizer)
    answer = server.complete(response_format={"type": "json_object"})
    assert answer.status_code == 400
    assert "cannot be enforced with this tokenizer" in answer.json()["error"]["message"]


def test_tools_are_refused_by_name(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="chatty", messages=QUESTION, tools=[tool])


def test_a_text_that_the_end_of_a_server_cut_off_is_finished_in_its_form(
    start_server, bytes_pair, tmp_path, monkeypatch
):
    folder = StateSettings(folder=str(tmp_path / "states"))
    server = start_server(*bytes_pair, states=folder, resume_on_restart=True)
    pattern = {"type": "regex", "pattern": "[a-z]{300}"}
    asked = {"max_tokens": 300, "seed": 3, "temperature": 1, "response_format": pattern}
    whole = server.text(**asked)
    loaded = server.service.loaded
    step, cut = loaded.engine.engine.step, threading.Event()

    def step_slowly():
        cut.wait(0.1 if loaded.engine.stats.generated_tokens > 350 else 0)
        return step()

    monkeypatch.setattr(loaded.engine.engine, "step", step_slowly)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, **asked)
        while loaded.engine.stats.generated_tokens <= 350:
            time.sleep(0.001)
        assert server.call(server.service.drain(0)) == 1
        cut.set()
        (state,) = answer.result().json()["error"]["state_ids"]
    saved = loaded.states.unfinished()[0]
    assert saved.unfinished["grammar"] == {"regex": "[a-z]{300}", "written": saved.num_tokens - 3}
    assert 50 <= saved.num_tokens - 3 < 300
    server.call(finish_unfinished(loaded))
    assert loaded.states.get(state, saved.owner).text == whole


def test_a_conversation_that_is_finished_later_knows_what_has_stopped_it(start_server, bytes_pair):
    """The next message began with the stop string, which the state had read already."""
    server = start_server(*bytes_pair, chat_template="plain")
    loaded, owner = server.service.loaded, "address 127.0.0.1"
    body = {"messages": QUESTION, "max_tokens": 5, "temperature": 0, "bdh": {"save_state": True}}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    snapshot = loaded.states.snapshot(answer["choices"][0]["bdh"]["state_id"], owner)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    (whole,) = server.call(loaded.engine.generate(None, params, snapshot=snapshot))
    params.stop = [whole.text[6:9]]
    saved = loaded.states.put(snapshot, owner=owner, model="m", unfinished=asdict(params), text="")
    server.call(finish_unfinished(loaded))
    assert loaded.states.unfinished() == []
    assert loaded.states.snapshot(saved.id, owner).notes["stopped_by"] == whole.text[6:9] != ""
