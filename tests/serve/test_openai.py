"""What OpenAI's own package makes of the server."""

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.serve.config import AuthSettings, LimitSettings

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is a Straße naß?"}]


def client_of(server, **fields) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=fields.pop("api_key", "none"), max_retries=0, **fields)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


@pytest.fixture(scope="module")
def chat_client(chat_server):
    return client_of(chat_server)


@pytest.fixture(scope="module")
def engine(bytes_pair):
    return Engine(*bytes_pair, config=EngineConfig())


def test_a_completion_is_what_the_engine_gives(client, engine):
    answer = client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=30, temperature=0.9, seed=4, top_p=0.9
    )
    (expected,) = engine.generate("Once upon", SamplingParams(max_tokens=30, temperature=0.9, seed=4, top_p=0.9))[0]
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 30
    assert answer.usage.total_tokens == 39


def test_sixteen_tokens_are_the_default_of_a_completion(client):
    assert client.completions.create(model="tiny", prompt="a").usage.completion_tokens == 16


def test_several_prompts_and_several_texts_of_each(client, engine):
    prompts = ["one", "another one"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=9, n=3, seed=1)
    expected = engine.generate(prompts, SamplingParams(max_tokens=9, n=3, seed=1))
    assert [choice.text for choice in answer.choices] == [each.text for several in expected for each in several]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 54
    ids = [list(prompt.encode()) for prompt in prompts]
    of_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=9, n=3, seed=1)
    assert [choice.text for choice in of_ids.choices] == [choice.text for choice in answer.choices]
    (alone,) = client.completions.create(model="tiny", prompt=ids[0], max_tokens=9, seed=1).choices
    assert alone.text == answer.choices[0].text


def test_a_stream_is_the_text_in_pieces(client):
    settings = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "n": 2, "seed": 3}
    whole = client.completions.create(**settings)
    texts, reasons, ids = ["", ""], [[], []], set()
    for chunk in client.completions.create(**settings, stream=True):
        ids.add(chunk.id)
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                reasons[choice.index].append(choice.finish_reason)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [["length"], ["length"]]
    assert len(ids) == 1


def test_usage_comes_last_and_only_when_asked_for(client):
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="tiny", prompt="Once", max_tokens=5, stream=True, stream_options=options)
    )
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (4, 5)


def test_stop_strings_end_the_text_and_never_leak(client):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 0.8, "seed": 8}
    free = client.completions.create(**settings).choices[0].text
    stop = free[10:13]
    (choice,) = client.completions.create(**settings, stop=stop).choices
    assert (choice.text, choice.finish_reason) == (free[: free.index(stop)], "stop")
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**settings, stop=[stop, "@@@"], stream=True)
    )
    assert streamed == choice.text


def test_log_probabilities_are_those_of_the_engine_and_name_bytes(client, engine):
    settings = {"max_tokens": 24, "temperature": 1.0, "seed": 2, "logprobs": 2}
    (choice,) = client.completions.create(model="tiny", prompt="é", **settings).choices
    (expected,) = engine.generate("é", SamplingParams(**settings))[0]
    found = choice.logprobs
    assert found.token_logprobs == [each.logprob for each in expected.logprobs]
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == 24
    names = [rf"bytes:\x{token:02x}" if token > 127 else chr(token) for token in expected.token_ids]
    assert found.tokens == names
    assert any(name.startswith("bytes:") for name in names)
    for name, top, logprob in zip(found.tokens, found.top_logprobs, found.token_logprobs, strict=True):
        assert top[name] == logprob
        assert len(top) in (2, 3)
    assert found.text_offset[0] == 0


def test_an_echo_has_the_prompt_and_its_log_probabilities(client):
    settings = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "logprobs": 1, "echo": True, "temperature": 0}
    (choice,) = client.completions.create(**settings).choices
    assert choice.text.startswith("Hello")
    assert choice.logprobs.tokens[:5] == list("Hello")
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset[:5] == [0, 1, 2, 3, 4]
    assert len(choice.logprobs.tokens) == 8
    pieces = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
    assert "".join(piece.text for piece in pieces) == choice.text
    streamed = [logprob for piece in pieces if piece.logprobs for logprob in piece.logprobs.token_logprobs]
    assert streamed == choice.logprobs.token_logprobs
    offsets = [offset for piece in pieces if piece.logprobs for offset in piece.logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset
    (only_read,) = client.completions.create(**{**settings, "max_tokens": 0}).choices
    assert only_read.text == "Hello"
    assert only_read.logprobs.token_logprobs == choice.logprobs.token_logprobs[:5]


def test_the_best_of_several_is_the_likeliest(client):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 5, "logprobs": 0}
    all_of_them = client.completions.create(**settings, n=6).choices
    (best,) = client.completions.create(**settings, best_of=6).choices
    means = [sum(choice.logprobs.token_logprobs) / 8 for choice in all_of_them]
    assert best.text == all_of_them[means.index(max(means))].text


def test_a_bias_forces_a_token(client):
    (choice,) = client.completions.create(model="tiny", prompt="abc", max_tokens=4, logit_bias={"65": 100}).choices
    assert choice.text == "AAAA"


def test_a_chat_is_answered(chat_client, chat_pair):
    answer = chat_client.chat.completions.create(model="chatty", messages=QUESTION, max_tokens=20, seed=1)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    prompt = chat_pair[1].apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(prompt)
    end = chat_pair[1].convert_tokens_to_ids("<|end|>")
    params = SamplingParams(max_tokens=20, seed=1, stop_token_ids=[end])
    (expected,) = Engine(*chat_pair).generate([prompt], params)[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    same = chat_client.chat.completions.create(model="chatty", messages=QUESTION, max_completion_tokens=20, seed=1)
    assert same.choices[0].message.content == choice.message.content


def test_a_chat_streams_with_its_role_first(chat_client):
    settings = {"model": "chatty", "messages": QUESTION, "max_tokens": 20, "seed": 2, "n": 2}
    whole = chat_client.chat.completions.create(**settings)
    seen, texts, reasons = set(), ["", ""], [0, 0]
    for chunk in chat_client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            assert (choice.delta.role == "assistant") == (choice.index not in seen)
            seen.add(choice.index)
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [1, 1]


def test_content_may_come_in_parts(chat_client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is a "}, {"type": "text", "text": "dog wet?"}]}]
    whole = [{"role": "user", "content": "Is a dog wet?"}]
    texts = [
        chat_client.chat.completions.create(model="chatty", messages=messages, temperature=0, max_tokens=9)
        for messages in (parts, whole)
    ]
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_log_probabilities_of_a_chat_have_their_bytes(chat_client):
    answer = chat_client.chat.completions.create(
        model="chatty", messages=QUESTION, max_tokens=9, seed=2, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes).decode(errors="replace") or entry.bytes == []
        assert entry.logprob <= max(top.logprob for top in entry.top_logprobs)
    joined = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert joined.decode(errors="replace") == choice.message.content


def test_models_are_listed_by_all_their_names(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-alias"]
    assert client.models.retrieve("tiny-alias").object == "model"
    assert client.completions.create(model="tiny-alias", prompt="a", max_tokens=1).model == "tiny-alias"


def test_errors_are_the_packages_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="other", prompt="a")
    assert found.value.code == "model_not_found"
    assert found.value.param == "model"
    assert "'other'" in found.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model="tiny", prompt="a", suffix="b")
    with pytest.raises(openai.BadRequestError, match="has no chat template") as found:
        client.chat.completions.create(model="tiny", messages=QUESTION)
    assert found.value.code == "no_chat_template"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="tiny", messages=QUESTION, tools=[{"type": "function"}])


def test_a_wrong_key_is_refused_and_a_right_one_is_not(start_server, bytes_pair, tmp_path):
    (tmp_path / "keys").write_text("# ours\nann secret-of-ann\n\nsecret-of-nobody  # no name\n")
    server = start_server(*bytes_pair, auth=AuthSettings(keys_file=str(tmp_path / "keys")))
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    with pytest.raises(openai.AuthenticationError) as found:
        client_of(server, api_key="secret-of-bob").completions.create(**ask)
    assert found.value.code == "invalid_api_key"
    for key in ("secret-of-ann", "secret-of-nobody"):
        assert client_of(server, api_key=key).completions.create(**ask).choices
    # Other keys are read while it runs, and a broken file changes nothing.
    (tmp_path / "keys").write_text("")
    with pytest.raises(ValueError, match="has no key"):
        server.keys.load()
    assert client_of(server, api_key="secret-of-ann").completions.create(**ask).choices
    (tmp_path / "keys").write_text("secret-of-bob")
    server.keys.load()
    assert client_of(server, api_key="secret-of-bob").completions.create(**ask).choices
    with pytest.raises(openai.AuthenticationError):
        client_of(server, api_key="secret-of-ann").completions.create(**ask)


def test_a_limit_of_requests_is_retried_by_the_package(start_server, bytes_pair):
    server = start_server(*bytes_pair, auth=AuthSettings(requests_per_minute=120))
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    impatient = client_of(server)

    def ask_without_a_pause():
        for _ in range(200):
            impatient.completions.create(**ask)

    with pytest.raises(openai.RateLimitError) as found:
        ask_without_a_pause()
    assert found.value.code == "rate_limit_exceeded"
    assert int(found.value.response.headers["retry-after"]) >= 1
    patient = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
    assert patient.completions.create(**ask).choices


def test_a_full_queue_says_when_to_come_back(start_server, bytes_pair):
    limits = LimitSettings(queue_requests=2)
    server = start_server(*bytes_pair, limits=limits, engine=EngineConfig(max_running=1))

    async def ask_at_once():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = [client.completions.create(model="tiny", prompt="abc", max_tokens=400, seed=i) for i in range(8)]
            return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask_at_once())
    refused = [each for each in found if isinstance(each, openai.RateLimitError)]
    answered = [each for each in found if not isinstance(each, Exception)]
    assert len(refused) + len(answered) == 8
    assert len(answered) >= 3  # one runs, two wait
    assert refused
    assert all(each.code == "queue_full" and int(each.response.headers["retry-after"]) >= 1 for each in refused)
    assert all(each.usage.completion_tokens == 400 for each in answered)


def test_the_asynchronous_client_streams_many_at_once(server, engine):
    prompts = [f"prompt {number} " * (1 + number % 3) for number in range(12)]

    async def ask():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(prompt):
                text = ""
                stream = await client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=25, temperature=0, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].text
                return text

            return await asyncio.gather(*map(one, prompts))

    expected = engine.generate(prompts, SamplingParams(max_tokens=25, temperature=0))
    assert asyncio.run(ask()) == [each[0].text for each in expected]
