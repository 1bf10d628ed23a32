"""/v1/embeddings as OpenAI's own package sees it, against what the model's forward gives."""

import threading

import httpx
import numpy as np
import openai
import pytest
import torch

from bdh.generate.params import EngineConfig
from bdh.serve.config import LimitSettings
from bdh.tokenizer import byte_tokenizer
from tests.serve.conftest import SENTENCES, made_model
from tests.serve.test_openai import client_of


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def residuals_of(model, text: str) -> np.ndarray:
    """v after the last layer step, (T, D)."""
    with torch.no_grad():
        output = model(torch.tensor([list(text.encode())]), output_hidden_states=True, attention_form="parallel")
    return output.hidden_states[-1][0].double().numpy()


def embedded(server, given, **fields):
    answer = server.http.post("/v1/embeddings", json={"input": given, **fields})
    assert answer.status_code == 200, answer.text
    return [each["embedding"] for each in answer.json()["data"]]


def raw(server, given, pooling="mean") -> np.ndarray:
    return np.array(embedded(server, given, bdh={"pooling": pooling, "normalize": False}), np.float32)


def test_an_embedding_is_the_mean_residual_at_length_1(client, server, bytes_pair):
    answer = client.embeddings.create(model="tiny", input=SENTENCES)
    assert [each.index for each in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text.encode()) for text in SENTENCES)
    for text, each in zip(SENTENCES, answer.data, strict=True):
        v = residuals_of(bytes_pair[0], text)
        mean = v.mean(axis=0)
        # The kernels sum in another order than the forward: float32's rounding, over 3 layer steps.
        np.testing.assert_allclose(each.embedding, mean / np.linalg.norm(mean), atol=2e-5)
        assert np.linalg.norm(each.embedding) == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(raw(server, text)[0], mean, atol=1e-4)
        np.testing.assert_allclose(raw(server, text, "last")[0], v[-1], atol=1e-4)


def test_a_text_has_the_same_bits_alone_and_among_others(server):
    texts = [sentence * number for number, sentence in enumerate(SENTENCES * 4, 1)]
    together = raw(server, texts)
    for number, text in enumerate(texts):
        assert np.array_equal(raw(server, text)[0], together[number])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            server.text("abc", max_tokens=30)

    neighbour = threading.Thread(target=write)
    neighbour.start()
    try:
        assert np.array_equal(raw(server, texts), together)
    finally:
        stop.set()
        neighbour.join()
    server.idle()


def test_token_ids_are_the_text_that_they_mean(client):
    ids = [list(text.encode()) for text in SENTENCES]
    of_texts, of_ids = (client.embeddings.create(model="tiny", input=given).data for given in (SENTENCES, ids))
    assert [each.embedding for each in of_texts] == [each.embedding for each in of_ids]
    (one,) = client.embeddings.create(model="tiny", input=ids[0]).data
    assert one.embedding == of_texts[0].embedding


def test_base64_has_the_same_numbers(client, server):
    """The package asks for it unless told otherwise."""
    (numbers,) = embedded(server, "abc", encoding_format="float")
    assert client.embeddings.create(model="tiny", input="abc").data[0].embedding == numbers
    assert client.embeddings.create(model="tiny", input="abc", encoding_format="float").data[0].embedding == numbers
    assert isinstance(embedded(server, "abc", encoding_format="base64")[0], str)


def test_more_texts_than_may_wait_are_read_one_after_the_other(start_server, bytes_pair):
    limits = LimitSettings(queue_requests=2, prompts=1)
    server = start_server(*bytes_pair, limits=limits, engine=EngineConfig(max_running=2))
    texts = [f"text {number}" for number in range(40)]
    assert len(embedded(server, texts)) == 40
    server.idle()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [999]}, "input"),
        ({"input": "a" * 200}, "input"),
        ({"input": ["a"] * 5}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "bdh": {"pooling": "first"}}, "bdh.pooling"),
        ({"input": "a", "truncate": "end"}, "truncate"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(small_server, fields, param):
    answer = small_server.http.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_text_that_is_too_long_is_refused_before_the_first_is_read(start_server, bytes_pair):
    server = start_server(*bytes_pair, limits=LimitSettings(prompts=1, prompt_tokens=100))
    answer = server.http.post("/v1/embeddings", json={"input": ["abc", "a" * 200]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input.1")
    assert server.service.loaded.engine.stats.prompt_tokens == 0


@pytest.fixture(scope="module")
def small_server(start_server, bytes_pair):
    return start_server(*bytes_pair, limits=LimitSettings(prompt_tokens=100, embeddings=4))


def test_its_width_is_the_only_number_of_dimensions(client, bytes_pair):
    width = bytes_pair[0].config.n_embd
    (one,) = client.embeddings.create(model="tiny", input="abc", dimensions=width).data
    assert len(one.embedding) == width
    with pytest.raises(openai.BadRequestError, match=f"dimensions is 3: must be {width}"):
        client.embeddings.create(model="tiny", input="abc", dimensions=3)


def test_a_client_that_leaves_ends_its_reading(start_server, bytes_pair):
    server = start_server(*bytes_pair)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/embeddings", json={"input": ["a" * 10_000] * 300}, timeout=0.3)
    server.idle()
    assert server.text("abc", max_tokens=3)


@pytest.mark.parametrize("settings", [{"path": "torch"}, {"window": 32}, {"path": "torch", "window": 32}])
def test_every_path_gives_the_residuals(start_server, settings):
    model = made_model(256)
    server = start_server(model, byte_tokenizer(), engine=EngineConfig(**settings))
    text = SENTENCES[0][:16]  # shorter than the window
    v = residuals_of(model, text)
    np.testing.assert_allclose(raw(server, text)[0], v.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(raw(server, text, "last")[0], v[-1], atol=1e-4)
    np.testing.assert_allclose(raw(server, "a", "last")[0], residuals_of(model, "a")[-1], atol=1e-4)
