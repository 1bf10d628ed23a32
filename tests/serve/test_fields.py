"""What asks for nothing is let in, what asks for something that is not there is refused by its name."""

import json
from pathlib import Path

import pytest

from bdh.serve.app import named
from bdh.serve.config import LimitSettings
from bdh.serve.schemas import WITHOUT_EFFECT
from tests.serve.test_bad_input import assert_refused

QUESTION = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def ask(server, messages=(QUESTION,), **fields):
    body = {"messages": list(messages), "temperature": 0, "max_tokens": 6, **fields}
    return server.http.post("/v1/chat/completions", json=body)


def text(server, messages=(QUESTION,), **fields):
    answer = ask(server, messages, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None, "tool_choice": "none", "functions": None},
        {"tool_choice": "auto", "parallel_tool_calls": True, "function_call": "none"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"store": False},
        {"metadata": {"topic": "birds"}},
        {"service_tier": "auto"},
        {"reasoning_effort": None, "audio": None, "prediction": None, "web_search_options": None},
        {"modalities": ["text"]},
        {"suffix": None},
        {"top_logprobs": 0},
        {"logprobs": False, "top_logprobs": None},
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": True}},
        {"stream": False, "stop": "", "model": "", "user": "", "logit_bias": {}, "stop_token_ids": []},
        {"prompt_cache_key": "a", "safety_identifier": "b", "verbosity": "medium", "n": None, "seed": None},
        {"min_tokens": 0, "length_penalty": 1.0, "skip_special_tokens": True, "chat_template_kwargs": {}},
        {"a_field_of_next_year": None, "and_another": {"of": None}},
    ],
    ids=str,
)
def test_a_field_that_asks_for_nothing_changes_nothing(plain_server, fields):
    assert text(plain_server, **fields) == text(plain_server)


@pytest.mark.parametrize(
    "fields",
    [
        {"refusal": None},
        {"tool_calls": None},
        {"tool_calls": [], "function_call": None, "audio": None, "annotations": []},
        {"reasoning_content": None, "reasoning": "", "parsed": None},
        {"name": "helper"},
        {"provider_specific_fields": {"refusal": None}},
        {"cache_control": {"type": "ephemeral"}},
        {"content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}, "annotations": []}]},
    ],
    ids=str,
)
def test_a_reply_comes_back_as_it_was_given(plain_server, fields):
    """The server refused its own answer in the second turn."""
    expected = text(plain_server, [QUESTION, REPLY, QUESTION])
    assert text(plain_server, [QUESTION, {**REPLY, **fields}, QUESTION]) == expected


def test_a_whole_message_of_the_server_comes_back(plain_server):
    message = ask(plain_server).json()["choices"][0]["message"]
    assert text(plain_server, [QUESTION, message, QUESTION])


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}], ids=str)
def test_an_assistant_may_have_said_nothing(plain_server, content):
    messages = [QUESTION, {"role": "assistant", **content}, QUESTION]
    assert text(plain_server, messages) == text(plain_server, [QUESTION, {**REPLY, "content": ""}, QUESTION])


def test_the_likeliest_tokens_of_probability_0_are_the_greedy_ones(plain_server):
    greedy = text(plain_server, temperature=0)
    assert [text(plain_server, temperature=1.5, top_p=0, seed=seed) for seed in range(3)] == [greedy] * 3


def test_usage_so_far_is_in_each_chunk_where_asked_for(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = server.complete("abc", max_tokens=5, stream=True, stream_options=options, ignore_eos=True)
    chunks = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line.startswith("data: {")]
    counts = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0] < 5, counts[-1]) == (True, 5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"guided_json": {}}, "guided_json"),
        ({"json_schema": {}}, "json_schema"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"min_tokens": False}, "min_tokens"),
        ({"metadata": "tag"}, "metadata"),
        ({"a_field_of_next_year": 0}, "a_field_of_next_year"),
        ({"a_field_of_next_year": {"of": {"it": None}}}, "a_field_of_next_year"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"messages": [QUESTION, {**REPLY, "tool_calls": [{"id": "a"}]}]}, "messages.1.tool_calls"),
        ({"messages": [QUESTION, {**REPLY, "refusal": "no"}]}, "messages.1.refusal"),
        ({"messages": [{**QUESTION, "name": 3}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, None),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_by_its_name(plain_server, fields, param):
    param = param or "messages.0.content.0.image_url"
    message = assert_refused(ask(plain_server, **fields), 400, param, "unsupported_field")
    assert message.startswith(f"{param} is not supported: leave it out")


@pytest.mark.parametrize(
    ("fields", "param", "meant"),
    [
        ({"max_token": 5}, "max_token", "max_tokens"),
        ({"temprature": 0.5}, "temprature", "temperature"),
        (
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "include_usage",
        ),
        ({"messages": [{**QUESTION, "contents": "a"}]}, "messages.0.contents", "content"),
        ({"min_tokens": 4}, "min_tokens", None),
    ],
    ids=str,
)
def test_a_field_that_is_misspelt_is_answered_with_the_one_that_is_meant(plain_server, fields, param, meant):
    message = assert_refused(ask(plain_server, **fields), 400, param, "unsupported_field")
    assert message == f"{param} is not supported: leave it out" + (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [QUESTION, {"role": "user", "content": None}]}, "messages.1.content"),
        ({"messages": [{"role": "system", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": ["a"]}, "messages.0"),
        ({"messages": [QUESTION], "top_logprobs": 3}, "top_logprobs"),
        ({"messages": [QUESTION], "max_tokens": 10**6}, "max_tokens"),
        ({"messages": [QUESTION], "max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"messages": [QUESTION], "logit_bias": {"300": 1}}, "logit_bias"),
        ({"messages": [QUESTION], "n": 17}, "n"),
        ({"messages": [QUESTION], "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [QUESTION], "stream_options": 3}, "stream_options"),
    ],
    ids=str,
)
def test_a_parameter_is_named_as_its_client_wrote_it(plain_server, body, param):
    content = json.dumps(body)
    answer = plain_server.http.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    message = assert_refused(answer, 400, param, "invalid_value")
    assert message.startswith((f"{param}: ", f"{param} is "))


def test_a_conversation_that_is_too_long_is_named_so(start_server, bytes_pair):
    server = start_server(*bytes_pair, chat_template="plain", limits=LimitSettings(prompt_tokens=20))
    assert_refused(ask(server, [{"role": "user", "content": "a" * 30}]), 400, "messages", "context_length_exceeded")


def test_places_of_a_schema_are_not_places_of_a_request():
    given = {"prompt": {"str": 1}, "messages": [{"content": [{}]}]}
    assert named(("messages", 0, "content", "list[TextPart]", 0, "text"), given, is_missing=True) == (
        "messages.0.content.0.text"
    )
    assert named(("prompt", "list[constrained-str]"), given) == "prompt"
    assert named((), given) == ""


def test_fields_without_effect_are_those_of_the_documentation():
    def shown(field) -> str:
        values = [f"`{json.dumps(value)}`" for value in field.values]
        return ", ".join([*values, *([f"any {field.type}"] if field.type else [])]) or "only `null`"

    lines = [
        f"| {place} | `{name}` | {shown(field)} | {field.why} |"
        for place, fields in WITHOUT_EFFECT.items()
        for name, field in fields.items()
    ]
    found = [line for line in DOCS.read_text().splitlines() if line.split("|")[1:2] and line.count("|") == 5]
    assert [line for line in found if line.split("|")[1].strip() in WITHOUT_EFFECT] == lines, "\n".join(lines)
