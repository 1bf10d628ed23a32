"""/v1/responses as OpenAI's own package sees it, and the states that conversations go on from."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field

from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig
from bdh.serve.config import AuthSettings, LimitSettings, StateSettings
from tests.serve.test_openai import client_of

QUESTION = "Is a Straße naß?"
END = "259"  # the token that ends a turn
# Letters: other bytes may be no text, which a conversation that is read again does not have.
LETTERS = {str(code): 50 for code in b"abcdefghijklmnopqrstuvwxyz"}
GREEDY = {"model": "chatty", "temperature": 0, "max_output_tokens": 12, "extra_body": {"logit_bias": LETTERS}}


@pytest.fixture(scope="module")
def client(chat_server):
    return client_of(chat_server)


def post(server, **fields):
    return server.http.post(
        "/v1/responses", json={"temperature": 0, "max_output_tokens": 9, "logit_bias": LETTERS, **fields}
    )


def created(server, **fields) -> dict:
    answer = post(server, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat_text(client, messages, **fields) -> str:
    settings = {"model": "chatty", "temperature": 0, "max_tokens": 12, "logit_bias": LETTERS, **fields}
    return client.chat.completions.create(messages=messages, **settings).choices[0].message.content


def error_of(answer) -> dict:
    return {"status": answer.status_code, **answer.json()["error"]}


def test_a_response_is_what_the_chat_says(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    response = client.responses.create(instructions="Be brief.", input=QUESTION, metadata={"a": "b"}, **GREEDY)
    assert response.output_text == chat_text(client, messages)
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", response.status)
    assert response.id.startswith("resp_")
    assert item.id.startswith("msg_")
    assert (response.object, response.model, response.instructions) == ("response", "chatty", "Be brief.")
    assert (response.metadata, response.temperature, response.tools) == ({"a": "b"}, 0, [])
    usage = client.chat.completions.create(model="chatty", messages=messages, max_tokens=1).usage
    assert response.usage.input_tokens == usage.prompt_tokens
    assert response.usage.output_tokens <= 12
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_how_it_ended_is_told(client):
    cut = client.responses.create(input=QUESTION, **GREEDY | {"max_output_tokens": 2})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete"
    stopped = client.responses.create(input=QUESTION, **GREEDY | {"extra_body": {"logit_bias": {END: 100}}})
    assert (stopped.status, stopped.incomplete_details, stopped.output_text) == ("completed", None, "")
    assert stopped.completed_at >= stopped.created_at


def test_a_stream_has_openais_events_in_their_order(client):
    whole = client.responses.create(input=QUESTION, **GREEDY)
    events = list(client.responses.create(input=QUESTION, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    names = [event.type.removeprefix("response.") for event in events]
    begin, end = ["created", "in_progress", "output_item.added", "content_part.added"], ["output_text.done"]
    end += ["content_part.done", "output_item.done", whole.status]
    assert names[:4] == begin
    assert names[-4:] == end
    deltas = events[4:-4]
    assert {event.type for event in deltas} == {"response.output_text.delta"}
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-4].text
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage
    assert {event.item_id for event in deltas} == {last.output[0].id} == {events[2].item.id}
    assert events[0].response.id == last.id
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])
    with client.responses.stream(input=QUESTION, **GREEDY) as stream:
        assert "".join(event.delta for event in stream if event.type.endswith("text.delta")) == whole.output_text
    end = whole.output_text[4:8]
    stop = {"extra_body": {"logit_bias": LETTERS, "stop": end}}
    with client.responses.stream(input=QUESTION, **GREEDY | stop) as stream:
        assert stream.get_final_response().output_text == whole.output_text.partition(end)[0]


def test_a_conversation_goes_on_from_its_state(client):
    first = client.responses.create(input="Who are you?", instructions="Be brief.", **GREEDY)
    second = client.responses.create(input="And I?", instructions="Be brief.", previous_response_id=first.id, **GREEDY)
    # All that the state had read was known, but for the token that was generated last.
    known = first.usage.total_tokens - (first.status == "incomplete")
    assert second.usage.input_tokens_details.cached_tokens == known
    assert second.usage.input_tokens > first.usage.total_tokens
    assert second.previous_response_id == first.id
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And I?"},
    ]
    assert second.output_text == chat_text(client, messages)
    # From the same response once more, and from the second.
    again = client.responses.create(input="And I?", instructions="Be brief.", previous_response_id=first.id, **GREEDY)
    assert again.output_text == second.output_text
    third = client.responses.create(input="Bye.", instructions="Be brief.", previous_response_id=second.id, **GREEDY)
    assert third.usage.input_tokens_details.cached_tokens > known
    events = list(
        client.responses.create(
            input="Bye.", instructions="Be brief.", previous_response_id=second.id, stream=True, **GREEDY
        )
    )
    assert events[-1].response.output_text == third.output_text


def test_instructions_are_of_one_response_only(client):
    """A state that has read others is not gone on from."""
    first = client.responses.create(input="Who are you?", instructions="Be brief.", **GREEDY)
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And I?"},
    ]
    for instructions in (None, "Be long."):
        second = client.responses.create(
            input="And I?", instructions=instructions, previous_response_id=first.id, **GREEDY
        )
        system = [{"role": "system", "content": instructions}] if instructions else []
        assert second.output_text == chat_text(client, [*system, *messages])


def test_a_response_is_kept_and_can_be_deleted(client):
    items = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    response = client.responses.create(input=items, **GREEDY)
    assert client.responses.retrieve(response.id) == response
    listed = list(client.responses.input_items.list(response.id, order="asc", limit=1))
    assert [(item.role, item.content[0].text) for item in listed] == [("developer", "Be brief."), ("user", QUESTION)]
    (newest,) = client.responses.input_items.list(response.id, limit=1).data
    assert newest.id == listed[1].id
    client.responses.delete(response.id)
    for use in (client.responses.retrieve, client.responses.delete, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="you have no response 'resp_"):
            use(response.id)
    with pytest.raises(openai.NotFoundError) as found:
        client.responses.create(input="a", previous_response_id=response.id, **GREEDY)
    assert (found.value.code, found.value.param) == ("previous_response_not_found", "previous_response_id")


def test_two_requests_delete_the_same_response(client, chat_server, monkeypatch):
    response, states = client.responses.create(input=QUESTION, **GREEDY), chat_server.service.loaded.states
    delete = states.delete

    def twice(*arguments):
        delete(*arguments)  # as the other one does, behind the first look
        delete(*arguments)

    monkeypatch.setattr(states, "delete", twice)
    with pytest.raises(openai.NotFoundError, match="you have no response 'resp_"):
        client.responses.delete(response.id)


def test_what_is_not_to_be_stored_is_not(client, chat_server):
    before = chat_server.service.loaded.states.num_states
    response = client.responses.create(input=QUESTION, store=False, **GREEDY)
    assert response.store is False
    assert chat_server.service.loaded.states.num_states == before
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_items_of_earlier_answers_are_taken_back_as_they_are(client):
    first = client.responses.create(input=[{"role": "user", "content": "Hi"}], **GREEDY)
    output = [item.model_dump(exclude_unset=True) for item in first.output]
    items = [{"role": "user", "content": "Hi"}, *output, {"role": "user", "content": "Why?"}]
    expected = client.responses.create(input=items, **GREEDY).output_text
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first.output_text}]
    assert expected == chat_text(client, [*plain, {"role": "user", "content": "Why?"}])
    (listed,) = client.responses.input_items.list(first.id).data
    for reference in (first.output[0].id, listed.id):
        client.responses.create(input=[{"type": "item_reference", "id": reference}, *items[2:]], **GREEDY)
    referred = [items[0], {"type": "item_reference", "id": first.output[0].id}, items[2]]
    assert client.responses.create(input=referred, **GREEDY).output_text == expected
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    assert client.responses.create(input=[items[0], reasoning, *items[1:]], **GREEDY).output_text == expected


def test_fields_that_ask_for_nothing_are_accepted(chat_server):
    nothing = {
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "max_tool_calls": None, "include": [],
        "reasoning": {"effort": "none", "summary": None}, "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "truncation": "disabled", "background": False, "service_tier": "auto", "top_logprobs": 0, "user": "ann",
        "safety_identifier": "a", "prompt_cache_key": "b", "conversation": None, "prompt": None, "metadata": None,
        "stream": False, "store": None, "instructions": "", "previous_response_id": None, "context_management": [],
    }  # fmt: skip
    expected = created(chat_server, input="Hi")["output"][0]["content"]
    assert created(chat_server, input="Hi", **nothing)["output"][0]["content"] == expected
    told = {"stream": True, "stream_options": {"include_obfuscation": False}}
    assert post(chat_server, input="Hi", **told).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "tree"}}}}, "text.format"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"nonsense": 1}, "nonsense"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]}, "input.1.role"),
        ({"input": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}]}, "input.0.summary"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"metadata": {"a": "\ud800"}}, "metadata.a"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_name(chat_server, fields, param):
    body = json.dumps({"input": "Hi", **fields})
    answer = chat_server.http.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["code"]


def test_parameters_of_a_query_are_named(chat_server):
    """They were refused without a name."""
    response_id = created(chat_server, input="Hi")["id"]
    for query, param in (
        ("?stream=true", "stream"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?order=up", "order"),
    ):
        error = chat_server.http.get(f"/v1/responses/{response_id}{query}").json()["error"]
        assert (error["param"], error["code"]) == (param, "invalid_value")
        assert error["message"].startswith(f"{param}: ")
    assert chat_server.http.get(f"/v1/responses/{response_id}?stream=false").status_code == 200


@pytest.mark.parametrize("seed", [-9223372036854776000, 9223372036854776000])
def test_seeds_may_be_as_large_as_openai_says(chat_server, seed):
    created(chat_server, input="Hi", seed=seed, temperature=1)


def test_references_to_nothing_are_named(chat_server):
    for item_id in ("msg_1", f"msg_{'0' * 32}"):
        items = [{"type": "reasoning", "summary": []}, {"type": "item_reference", "id": item_id}]
        found = error_of(post(chat_server, input=items))
        assert (found["status"], found["param"], found["code"]) == (404, "input.1.id", "item_not_found")


def test_log_probabilities_come_where_they_are_included(client):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = client.responses.create(input=QUESTION, **fields, **GREEDY)
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs) == response.usage.output_tokens
    assert all(len(entry.top_logprobs) == 2 and entry.bytes for entry in logprobs)
    events = list(client.responses.create(input=QUESTION, stream=True, **fields, **GREEDY))
    streamed = [entry for event in events if event.type.endswith("text.delta") for entry in event.logprobs]
    assert [entry.token for entry in streamed] == [entry.token for entry in logprobs]


class Bird(BaseModel):
    name: Literal["crow", "gull"]
    count: int = Field(ge=0, le=99)


def test_a_schema_is_held_as_in_a_chat(client):
    settings = {"model": "chatty", "input": QUESTION, "max_output_tokens": 200, "temperature": 0}
    response = client.responses.parse(text_format=Bird, **settings)
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Bird)
    assert response.text.format.type == "json_schema"
    with client.responses.stream(text_format=Bird, **settings) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed
    second = client.responses.parse(text_format=Bird, previous_response_id=response.id, **settings)
    assert isinstance(second.output_parsed, Bird)
    regex = {"format": {"type": "regex", "pattern": "[0-9]{3}"}}
    (part,) = client.responses.create(text=regex, **settings).output[0].content
    assert part.text.isdecimal()
    assert len(part.text) == 3


def test_without_a_chat_template_the_refusal_names_the_input(server):
    found = error_of(post(server, input="Hi"))
    assert (found["status"], found["param"], found["code"]) == (400, "input", "no_chat_template")


def test_responses_are_their_owners(start_server, chat_pair, tmp_path):
    (tmp_path / "keys").write_text("ann secret-of-ann\nbob secret-of-bob\n")
    server = start_server(*chat_pair, auth=AuthSettings(keys_file=str(tmp_path / "keys")), served_model_name=["chatty"])
    ann, bob = (client_of(server, api_key=f"secret-of-{name}") for name in ("ann", "bob"))
    response = ann.responses.create(input="Hi", **GREEDY)
    assert ann.responses.retrieve(response.id).id == response.id
    reference = [{"type": "item_reference", "id": response.output[0].id}]
    for use in (
        lambda: bob.responses.retrieve(response.id),
        lambda: bob.responses.delete(response.id),
        lambda: bob.responses.create(input="a", previous_response_id=response.id, **GREEDY),
        lambda: bob.responses.create(input=reference, **GREEDY),
    ):
        with pytest.raises(openai.NotFoundError):
            use()


def test_responses_outlast_a_restart(start_server, chat_pair, tmp_path):
    settings = {"states": StateSettings(folder=str(tmp_path / "states"))}
    before = start_server(*chat_pair, **settings)
    first = created(before, input="Who are you?")
    second = created(before, input="And I?", previous_response_id=first["id"])
    before.close()
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in (tmp_path / "states").iterdir()}
    assert modes == {".json": 0o600, ".safetensors": 0o600}  # texts of conversations are their owner's alone
    after = start_server(*chat_pair, **settings)
    assert after.http.get(f"/v1/responses/{first['id']}").json() == first
    again = created(after, input="And I?", previous_response_id=first["id"])
    assert again["output"][0]["content"] == second["output"][0]["content"]
    assert again["usage"] == second["usage"]  # nothing was read again
    (tmp_path / "states" / f"{first['id']}.safetensors").unlink()
    after.close()
    without = start_server(*chat_pair, **settings)
    again = created(without, input="And I?", previous_response_id=first["id"])
    assert again["output"][0]["content"] == second["output"][0]["content"]
    assert again["usage"]["input_tokens_details"]["cached_tokens"] == 0


def test_where_states_find_no_room_the_text_is_read_again(start_server, chat_pair):
    size = Engine(*chat_pair).advancer.state_bytes
    for max_bytes, num_kept in ((10, 0), (int(2.9 * size), 2)):
        server = start_server(*chat_pair, states=StateSettings(max_bytes=max_bytes), served_model_name=["chatty"])
        responses = [created(server, input=f"Who are you, {number}?") for number in range(4)]
        assert len(server.http.get("/v1/states").json()["data"]) == num_kept
        for response in responses:
            messages = [
                {"role": "user", "content": f"Who are you, {responses.index(response)}?"},
                {"role": "assistant", "content": response["output"][0]["content"][0]["text"]},
                {"role": "user", "content": "Why?"},
            ]
            second = created(server, input="Why?", previous_response_id=response["id"], store=False)
            assert second["output"][0]["content"][0]["text"] == chat_text(client_of(server), messages, max_tokens=9)
        server.idle()


def test_states_of_responses_never_push_out_those_that_were_saved_by_name(start_server, chat_pair):
    size = Engine(*chat_pair).advancer.state_bytes
    server = start_server(*chat_pair, states=StateSettings(max_bytes=int(2.9 * size)))
    saved = [server.complete("abc", max_tokens=1, bdh={"save_state": True}).json()["choices"][0]["bdh"]["state_id"]]
    responses = [created(server, input="Hi") for _ in range(3)]
    kept = {each["id"] for each in server.http.get("/v1/states").json()["data"]}
    assert kept == {*saved, responses[-1]["id"]}
    saved += [server.complete("abc", max_tokens=1, bdh={"save_state": True}).json()["choices"][0]["bdh"]["state_id"]]
    created(server, input="Hi")
    kept = {each["id"] for each in server.http.get("/v1/states").json()["data"]}
    assert kept == set(saved)
    assert server.http.get(f"/v1/responses/{responses[0]['id']}").status_code == 200


def test_texts_of_responses_have_a_limit_of_their_own(start_server, chat_pair):
    server = start_server(*chat_pair, states=StateSettings(response_bytes=6000))
    responses = [created(server, input="Hi" * 100) for _ in range(5)]
    found = [server.http.get(f"/v1/responses/{response['id']}").status_code for response in responses]
    assert found[0] == 404
    assert found[-1] == 200
    assert created(server, input="Hi" * 4000)["store"] is False
    nothing_kept = start_server(*chat_pair, states=StateSettings(response_bytes=0))
    assert created(nothing_kept, input="Hi")["store"] is False
    assert nothing_kept.service.loaded.states.num_states == 0


def test_the_state_of_a_response_serves_the_chat_route(chat_server, client):
    first = created(chat_server, input="Who are you?")
    extra = {"bdh": {"from_state": first["id"]}}
    question = [{"role": "user", "content": "And I?"}]
    text = chat_text(client, question, max_tokens=9, extra_body=extra)
    second = created(chat_server, input="And I?", previous_response_id=first["id"])
    assert text == second["output"][0]["content"][0]["text"]


def test_a_client_that_leaves_its_stream_frees_its_state(start_server, chat_pair):
    server = start_server(*chat_pair, limits=LimitSettings(max_tokens=100_000))
    body = {
        "input": "Hi",
        "stream": True,
        "max_output_tokens": 100_000,
        "ignore_eos": True,
        "logit_bias": {END: -100},
    }
    with server.http.stream("POST", "/v1/responses", json=body) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: response.created"
        while "delta" not in next(lines):
            pass
    server.idle()
    assert server.service.loaded.states.num_states == 0


def test_a_stream_that_fails_says_so_in_its_last_event(start_server, chat_pair):
    server = start_server(*chat_pair, engine=EngineConfig(max_running=1), limits=LimitSettings(request_timeout=0.3))
    body = {"input": "Hi", "stream": True, "max_output_tokens": 16_000, "ignore_eos": True, "logit_bias": {END: -100}}
    answer = server.http.post("/v1/responses", json=body)
    last = json.loads(answer.text.strip().rpartition("\n")[2].removeprefix("data: "))
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert "which is the time limit" in last["response"]["error"]["message"]
    server.idle()


def test_a_plain_conversation_goes_on_in_its_state(shared_server, bytes_pair):
    server = shared_server(*bytes_pair, chat_template="plain", served_model_name=["chatty"])
    first = created(server, input="Hi")
    second = created(server, input="Why?", previous_response_id=first["id"])
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert second["output"][0]["content"][0]["text"]


def test_an_answer_cut_off_by_the_end_of_the_server_is_told(start_server, chat_pair):
    server = start_server(*chat_pair)
    body = {"input": "Hi", "stream": True, "max_output_tokens": 16_000, "ignore_eos": True, "logit_bias": {END: -100}}
    with server.http.stream("POST", "/v1/responses", json=body) as stream:
        lines = stream.iter_lines()
        while "delta" not in next(lines):
            pass
        assert server.call(server.service.drain(0)) == 1
        last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert last["type"] == "response.failed"
    assert "was shut down before the text was finished" in last["response"]["error"]["message"]
