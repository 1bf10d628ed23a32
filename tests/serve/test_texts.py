"""The same text whichever way it is asked for, and states that go on."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support
from tokenizers.processors import TemplateProcessing

from bdh.cli.main import main
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.serve.answers import CompletionAnswer, CompletionLogprobs
from bdh.serve.config import StateSettings
from bdh.tokenizer import train_tokenizer
from tests.serve.conftest import SENTENCES, made_model


def events(answer) -> list[dict]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


def streamed(server, prompt, **fields) -> str:
    found = events(server.complete(prompt, stream=True, **fields))
    return "".join(choice["text"] for each in found for choice in each["choices"])


def written(server, prompt, **fields) -> list[str]:
    """The names of the tokens: a text that ends within a character does not have all that was written."""
    answer = server.complete(prompt, logprobs=0, **fields)
    return answer.json()["choices"][0]["logprobs"]["tokens"]


def extras_of(server, prompt, **fields) -> dict:
    return server.complete(prompt, **fields).json()["choices"][0]["bdh"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_greedy_texts_are_the_same_every_way(shared_server, bytes_pair, bpe_pair, kind, tmp_path, capsys):
    model, tokenizer = bytes_pair if kind == "bytes" else bpe_pair
    server = shared_server(model, tokenizer)
    prompts = [sentence[: 5 + 3 * number] for number, sentence in enumerate(SENTENCES * 6)][:16]
    whole = [server.text(prompt, max_tokens=40) for prompt in prompts]
    assert [streamed(server, prompt, max_tokens=40) for prompt in prompts] == whole
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda prompt: server.text(prompt, max_tokens=40), prompts)) == whole
        assert list(pool.map(lambda prompt: streamed(server, prompt, max_tokens=40), prompts)) == whole
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    arguments = ["--prompts_file", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "texts.jsonl")]
    assert main(["generate", str(tmp_path / "model"), *arguments, "--temperature", "0", "--max_new_tokens", "40"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == whole
    assert any(ord(character) > 127 for text in whole for character in text)


def test_answers_have_the_described_shape(server):
    answer = server.complete("abc", logprobs=2, n=2, max_tokens=4, temperature=1).json()
    CompletionAnswer.model_validate(answer, strict=True)
    assert set(answer["choices"][0]["logprobs"]) == set(CompletionLogprobs.model_fields)


def test_a_saved_state_goes_on_as_if_it_had_never_stopped(server):
    whole = written(server, "Once upon a time", max_tokens=60)
    first = server.complete("Once upon a time", max_tokens=25, bdh={"save_state": True}).json()["choices"][0]
    state = first["bdh"]["state_id"]
    for _ in range(2):  # it stays as it was
        assert written(server, "", max_tokens=35, bdh={"from_state": state}) == whole[25:]
    assert server.complete("", bdh={"from_state": state}).json()["usage"]["prompt_tokens"] == 0
    several = server.complete(" and then", max_tokens=9, n=3, temperature=1, seed=1, bdh={"from_state": state}).json()
    tokens = [*b"Once upon a time", *(_id(name) for name in whole[:25]), *b" and then"]
    again = server.complete(tokens, max_tokens=9, n=3, temperature=1, seed=1)
    assert [c["text"] for c in several["choices"]] == [c["text"] for c in again.json()["choices"]]
    facts = server.http.get(f"/v1/states/{state}").json()
    assert (facts["tokens"], facts["status"]) == (16 + 25, "saved")
    assert server.http.delete(f"/v1/states/{state}").json() == {"id": state, "object": "state", "deleted": True}
    assert server.complete("", bdh={"from_state": state}).status_code == 404


def _id(name: str) -> int:
    return int(name.removeprefix("bytes:\\x"), 16) if name.startswith("bytes:") else ord(name)


def test_each_of_several_texts_can_be_saved(server):
    asked = {"n": 3, "temperature": 1, "seed": 3, "logprobs": 0}
    answer = server.complete("abc", max_tokens=5, bdh={"save_state": True}, **asked).json()
    states = [choice["bdh"]["state_id"] for choice in answer["choices"]]
    assert len(set(states)) == 3
    whole = server.complete("abc", max_tokens=11, **asked).json()
    for state, choice, expected in zip(states, answer["choices"], whole["choices"], strict=True):
        rest = written(server, "", max_tokens=6, temperature=1, bdh={"from_state": state})
        assert [*choice["logprobs"]["tokens"], *rest] == expected["logprobs"]["tokens"]


def test_a_stream_tells_the_state_at_its_end(server):
    found = events(server.complete("abc", max_tokens=5, stream=True, bdh={"save_state": True}))
    told = [choice.get("bdh") for each in found for choice in each["choices"]]
    assert [bool(extras) for extras in told] == [False] * (len(told) - 1) + [True]
    assert server.complete("", bdh={"from_state": told[-1]["state_id"]}).status_code == 200


def test_a_conversation_goes_on_in_its_state(chat_server, chat_pair):
    def ask(messages, **fields):
        body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
        answer = chat_server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    opening = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    first = ask(opening, bdh={"save_state": True})
    second = ask(
        [{"role": "user", "content": "And I?"}],
        bdh={"from_state": first["choices"][0]["bdh"]["state_id"], "save_state": True},
    )
    # What was read and written, and then what the template puts before the next answer.
    prompt = chat_pair[1].apply_chat_template(opening, add_generation_prompt=True)["input_ids"]
    engine = Engine(*chat_pair)
    end = chat_pair[1].convert_tokens_to_ids("<|end|>")
    params = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[end])
    (answer,) = engine.generate([prompt], params)[0]
    further = [
        end,
        *chat_pair[1].apply_chat_template([{"role": "user", "content": "And I?"}], add_generation_prompt=True)[
            "input_ids"
        ],
    ]
    (expected,) = engine.generate([[*prompt, *answer.token_ids, *further]], params)[0]
    assert second["choices"][0]["message"]["content"] == expected.text
    assert second["usage"]["prompt_tokens"] == len(further)
    third = ask([{"role": "user", "content": "Bye."}], bdh={"from_state": second["choices"][0]["bdh"]["state_id"]})
    assert third["choices"][0]["message"]["content"]


def test_a_plain_conversation_goes_on_in_its_state(shared_server, bytes_pair):
    server = shared_server(*bytes_pair, chat_template="plain")

    def ask(messages, **fields):
        body = {"messages": messages, "temperature": 0, "max_tokens": 9, **fields}
        return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]

    first = ask([{"role": "user", "content": "Hi"}], bdh={"save_state": True})
    second = ask([{"role": "user", "content": "Why?"}], bdh={"from_state": first["bdh"]["state_id"]})
    written = server.complete("User: Hi\nAssistant: ", max_tokens=9, bdh={"save_state": True}).json()["choices"][0]
    assert first["message"]["content"] == written["text"]
    rest = server.complete("\nUser: Why?\nAssistant: ", max_tokens=9, bdh={"from_state": written["bdh"]["state_id"]})
    assert second["message"]["content"] == rest.json()["choices"][0]["text"]
    refused = server.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "a"}], "bdh": {"from_state": written["bdh"]["state_id"]}},
    )
    assert refused.status_code == 400


def test_a_plain_reply_begins_with_its_first_word(start_server):
    """A reply began with the space behind the role; where a token has the space and the word, the model writes both."""
    tokenizer = train_tokenizer(["Ein Vogel singt im Baum."] * 40, "bpe", 280)
    server = start_server(made_model(len(tokenizer)), tokenizer, chat_template="plain")
    (token,) = tokenizer(" Vogel", add_special_tokens=False)["input_ids"]
    body = {"max_tokens": 3, "logit_bias": {str(token): 100}, "logprobs": True, "temperature": 0}

    def tokens(messages):
        return server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]

    opening = [{"role": "user", "content": "Was singt?"}]
    choice = server.http.post("/v1/chat/completions", json={"messages": opening, **body}).json()["choices"][0]
    assert choice["message"]["content"] == "Vogel Vogel Vogel"
    assert [each["token"] for each in choice["logprobs"]["content"]] == [" Vogel"] * 3  # as the model wrote it
    chunks = events(server.http.post("/v1/chat/completions", json={"messages": opening, **body, "stream": True}))
    pieces = [each["choices"][0]["delta"].get("content", "") for each in chunks]
    assert "".join(pieces) == "Vogel Vogel Vogel"
    following = tokens([*opening, choice["message"], *opening])
    assert following[: len(tokens(opening)) + 3] == [*tokens(opening), token, token, token]


def test_a_plain_prompt_of_bytes_ends_with_the_space(shared_server, bytes_pair):
    """So that the model begins with a word, as in what it has read; and what a reply began with is known in the next turn."""
    server = shared_server(*bytes_pair, chat_template="plain")
    messages = [{"role": "user", "content": "Is a bird that sings in the tree still a bird when it is silent?"}]
    ask = {"temperature": 0, "max_tokens": 9}
    first = server.http.post("/v1/chat/completions", json={"messages": messages, **ask}).json()
    prompt = server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert bytes(prompt).endswith(b"\nAssistant: ")
    messages += [first["choices"][0]["message"], {"role": "user", "content": "Why?"}]
    second = server.http.post("/v1/chat/completions", json={"messages": messages, **ask}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt)
    spaces = {"messages": messages, "max_tokens": 5, "logit_bias": {"32": 100}, "ignore_eos": True}
    answer = server.http.post("/v1/chat/completions", json=spaces).json()
    assert (answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]) == ("", 5)


def test_states_are_found_after_a_restart(start_server, bytes_pair, tmp_path):
    settings = {"states": StateSettings(folder=str(tmp_path / "states"))}
    before = start_server(*bytes_pair, **settings)
    whole = written(before, "Once upon", max_tokens=40)
    assert written(before, "Once upon", max_tokens=15, bdh={"save_state": True}) == whole[:15]
    before.close()
    after = start_server(*bytes_pair, **settings)
    (facts,) = after.http.get("/v1/states").json()["data"]
    assert written(after, "", max_tokens=25, bdh={"from_state": facts["id"]}) == whole[15:]


def test_states_that_do_not_fit_make_room_or_are_refused(start_server, bytes_pair):
    size = Engine(*bytes_pair).advancer.state_bytes
    server = start_server(*bytes_pair, states=StateSettings(max_bytes=int(2.9 * size)))
    saved = [extras_of(server, "abc", max_tokens=1, bdh={"save_state": True})["state_id"] for _ in range(4)]
    kept = [each["id"] for each in server.http.get("/v1/states").json()["data"]]
    assert sorted(kept) == sorted(saved[-2:])
    server = start_server(*bytes_pair, states=StateSettings(max_bytes=10))
    answer = server.complete("abc", max_tokens=1, bdh={"save_state": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_room")
    server.idle()


def test_activations_come_with_each_token_and_change_none(server, bytes_pair):
    plain = events(server.complete("abc", max_tokens=12, stream=True))
    watched = events(server.complete("abc", max_tokens=12, stream=True, bdh={"activations": 4}))
    texts = ["".join(c["text"] for each in found for c in each["choices"]) for found in (plain, watched)]
    assert texts[0] == texts[1]
    told = [a for each in watched for c in each["choices"] for a in c.get("bdh", {}).get("activations", [])]
    assert len(told) == 12
    layers = bytes_pair[0].config.n_layer
    for each in told:
        assert len(each["passes"]) == layers
        for one in each["passes"]:
            assert 0 <= one["fired"] <= 1
            assert len(one["neurons"]) == len(one["values"]) <= 4
            assert one["values"] == sorted(one["values"], reverse=True)
    assert not any("bdh" in c for each in plain for c in each["choices"])


def test_shared_beginnings_are_read_once(server):
    prompt = "a beginning that is long enough to be worth a state. " * 3
    cached = []
    for _ in range(2):
        usage = server.complete(prompt, max_tokens=2).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["prompt_tokens"] == len(prompt)
    assert cached == [0, len(prompt)]


def test_texts_and_tokens(server, chat_server):
    text = "Straße 🐦"
    tokens = server.http.post("/tokenize", json={"prompt": text}).json()
    assert tokens == {"tokens": list(text.encode()), "count": len(text.encode())}
    assert server.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    assert server.http.post("/detokenize", json={"tokens": [999]}).status_code == 400
    assert server.http.post("/tokenize", json={}).status_code == 400
    assert server.http.post("/tokenize", json={"content": text}).json() == tokens
    for body in ({"prompt": "a", "content": "a"}, {"messages": [], "content": "a"}, {"prompt": None}):
        assert server.http.post("/tokenize", json=body).status_code == 400
    messages = [{"role": "user", "content": "<|end|>"}]
    tokens = chat_server.http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tokens[1:8] == list(b"<|end|>")  # what a message spells is text


def test_special_tokens_are_put_around_a_text_where_asked_for(start_server, bpe_pair):
    model, tokenizer = bpe_pair
    tokenizer = copy.deepcopy(tokenizer)
    end = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=end)
    server = start_server(model, tokenizer)

    def tokens(**fields):
        return server.http.post("/tokenize", json={"prompt": "Vogel", **fields}).json()["tokens"]

    assert tokens() == tokens(add_special_tokens=False) == tokens(add_special_tokens=None)
    assert tokens(add_special_tokens=True) == [*tokens(), tokenizer.eos_token_id]
    body = {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}
    error = server.http.post("/tokenize", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("add_special_tokens", "invalid_value")


def test_facts_of_the_tokenizer(chat_server, shared_server, chat_pair, bpe_pair, bytes_pair):
    info = chat_server.http.get("/tokenizer_info").json()
    tokenizer = chat_pair[1]
    assert info["tokenizer_class"] == type(tokenizer).__name__
    assert info["chat_template"] == tokenizer.chat_template
    assert (info["vocab_size"], info["model_max_length"]) == (260, 100_000)
    assert {each["content"] for each in info["added_tokens_decoder"].values()} == set(tokenizer.added_tokens_encoder)
    assert info["eos_token"] is None
    with_special = shared_server(*bpe_pair)
    assert with_special.http.get("/tokenizer_info").json()["eos_token"] == "<eos>"
    plain = shared_server(*bytes_pair, chat_template="plain").http.get("/tokenizer_info").json()
    assert "Assistant: " in plain["chat_template"]
    assert check_remote_tokenizer_support(with_special.url)
    remote = RemoteTokenizer(with_special.url)
    assert remote.decode(remote.encode("Vogel")) == "Vogel"


def test_a_slash_at_the_end_makes_no_other_route(server):
    for path in ("/v1/models", "/v1/models/tiny", "/health", "/tokenizer_info", "/v1/states", "/openapi.json"):
        with_slash = server.http.get(f"{path}/", follow_redirects=False)
        assert (with_slash.status_code, with_slash.json()) == (200, server.http.get(path).json())
    body = {"prompt": "a", "temperature": 0, "max_tokens": 3}
    assert server.http.post("/v1/completions/", json=body).json()["choices"][0]["text"] == server.text(
        "a", max_tokens=3
    )
    assert server.http.post("/tokenize/", json={"prompt": "a"}).json() == {"tokens": [97], "count": 1}
    assert server.http.get("/v1/completions/").status_code == 405


def test_metrics_go_back_to_zero_and_count(start_server, bytes_pair):
    server = start_server(*bytes_pair, metrics=True)
    server.complete("abc", max_tokens=7, n=2, temperature=1)
    server.complete("abc", max_tokens=-1)
    server.idle()
    lines = dict(line.rsplit(" ", 1) for line in server.http.get("/metrics").text.splitlines() if line[0] != "#")
    named = 'model_name="tiny"'
    assert lines[f"bdh:generation_tokens_total{{{named}}}"] == "14.0"
    assert lines[f"bdh:num_requests_running{{{named}}}"] == "0.0"
    assert lines[f"bdh:state_bytes_in_use{{{named}}}"] == "0.0"
    assert lines[f'bdh:request_success_total{{finished_reason="length",{named}}}'] == "2.0"
    assert lines[f'bdh:requests_total{{{named},route="/v1/completions",status="400"}}'] == "1.0"
    assert lines[f"bdh:time_to_first_token_seconds_count{{{named}}}"] == "2.0"


@pytest.mark.parametrize(("weights", "state"), [("float32", "float32"), ("int8", "bfloat16")])
def test_the_formats_of_weights_and_states_are_said(start_server, bytes_pair, weights, state):
    server = start_server(*bytes_pair, metrics=True, engine=EngineConfig(weights=weights, state=state))
    facts = server.http.get("/v1/models/tiny").json()["bdh"]
    assert (facts["weights"], facts["state"]) == (weights, state)
    assert (
        f'bdh:engine_info{{model_name="tiny",state="{state}",weights="{weights}"}} 1.0'
        in server.http.get("/metrics").text
    )


def test_histograms_are_there_before_the_first_request(start_server, bytes_pair):
    """Else the first requests of a process are in no rate that Prometheus computes from them."""
    found = start_server(*bytes_pair, metrics=True).http.get("/metrics").text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert f'bdh:{name}_seconds_count{{model_name="tiny"}} 0.0' in found


def test_metrics_and_page_can_be_left_out(start_server, bytes_pair):
    server = start_server(*bytes_pair, page=False)
    assert server.http.get("/metrics").status_code == 404
    assert server.http.get("/").status_code == 404


def test_other_origins_are_let_in_only_where_that_was_asked_for(server, start_server, bytes_pair):
    asking = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.http.get("/v1/models", headers=asking).headers
    open_server = start_server(*bytes_pair, cors_origins=["https://example.org"])
    answer = open_server.http.options("/v1/completions", headers=asking)
    assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_requests_have_ids(server):
    assert server.http.get("/v1/models", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = server.http.get("/v1/models", headers={"X-Request-ID": "not fine"}).headers["x-request-id"]
    assert len(made) == 32


def test_silence_is_broken_by_comments(start_server, bytes_pair):
    server = start_server(*bytes_pair, options={"silence_seconds": 0.05}, engine=EngineConfig(max_running=1))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.complete, "abc", max_tokens=1500)
        while not server.service.loaded.engine.stats.running:
            time.sleep(0.005)
        waiting = server.complete("abc", max_tokens=2, stream=True)
        assert first.result().status_code == 200
    assert ": ping" in waiting.text
    assert events(waiting)


def test_a_state_is_not_continued_with_another_tokenizer(start_server, bpe_pair, tmp_path):
    """Of the same weights; what the tokens of the state meant changed without a word."""
    model, tokenizer = bpe_pair
    other = train_tokenizer([sentence[::-1] for sentence in SENTENCES] * 20, "bpe", len(tokenizer))

    def started(tokenizer):
        return start_server(model, tokenizer, states=StateSettings(folder=str(tmp_path)))

    saved = started(tokenizer).complete("abc", max_tokens=3, bdh={"save_state": True}).json()["choices"][0]
    fields = {"max_tokens": 2, "bdh": {"from_state": saved["bdh"]["state_id"]}}
    assert started(tokenizer).complete("d", **fields).status_code == 200
    answer = started(other).complete("d", **fields)
    assert answer.status_code == 400
    assert "another tokenizer or chat template" in answer.json()["error"]["message"]
