"""What clients are told, and what the metrics say, where a text of theirs cannot be generated or kept."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bdh.model.state import SynapticState
from bdh.serve.config import StateSettings
from bdh.serve.states import StateStore


def no_memory(*arguments, **keywords):
    raise MemoryError("not a byte")


def events(answer):
    return [line.removeprefix("data: ") for line in answer.text.strip().split("\n\n")]


def finished(server, reason):
    """How many texts have ended for this reason, by the metrics."""
    text = server.http.get("/metrics").text
    found = re.search(rf'bdh:request_success_total{{finished_reason="{reason}",[^}}]*}} (\d+)', text)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def server(start_server, bytes_pair):
    return start_server(*bytes_pair, metrics=True)


@pytest.fixture
def fragile(server, monkeypatch):
    """A server that cannot read the byte Z, and notices it after half of the states have moved."""
    advancer = server.service.loaded.engine.engine.advancer
    step = advancer.read_all

    def failing(feeds):
        if any(ord("Z") in feed.tokens for feed in feeds):
            step([feed for feed in feeds if ord("Z") not in feed.tokens])
            raise RuntimeError("out of memory")
        return step(feeds)

    monkeypatch.setattr(advancer, "read_all", failing)
    return server


def test_a_text_that_fails_is_a_500_or_an_event_and_changes_no_other(fragile):
    fields = {"max_tokens": 60, "logit_bias": {ord("Z"): -100}}
    expected = fragile.text("abc", **fields)
    num_errors = finished(fragile, "error")
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(fragile.text, "abc", **fields) for _ in range(2)]
        answer = fragile.complete("aZ")
        stream = fragile.complete("aZ", stream=True)
        assert [each.result() for each in good] == [expected] * 2
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "out of memory" not in answer.text  # which the log says
    assert stream.status_code == 200
    *_, last = events(stream)
    assert json.loads(last)["error"]["code"] == "internal_error"
    assert finished(fragile, "error") == num_errors + 2
    fragile.idle()
    assert fragile.http.get("/health/ready").status_code == 200


def test_a_state_that_finds_no_memory_is_a_507_or_an_event(server, monkeypatch):
    expected = server.text()
    with monkeypatch.context() as patch:
        patch.setattr(SynapticState, "clone", no_memory)
        answer = server.complete(bdh={"save_state": True})
        stream = server.complete(bdh={"save_state": True}, stream=True)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (507, "no_room", "bdh.save_state")
    assert error["message"] == "the state cannot be kept: not a byte"
    *_, last = events(stream)
    assert json.loads(last)["error"] == error
    server.idle()
    assert server.text() == expected


@pytest.mark.parametrize("where", [(SynapticState, "clone"), (StateStore, "put")])
def test_texts_are_cut_off_where_there_is_no_memory_to_keep_them(
    start_server, bytes_pair, tmp_path, monkeypatch, where
):
    """At SIGTERM, with resume: the engine's thread died of it, and all waited for their timeouts."""
    states = StateSettings(folder=str(tmp_path))
    server = start_server(*bytes_pair, resume_on_restart=True, states=states)
    monkeypatch.setattr(*where, no_memory)
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(server.complete, max_tokens=10_000)
        streamed = pool.submit(server.complete, max_tokens=10_000, stream=True)
        while server.service.loaded.engine.stats.running < 2:
            time.sleep(0.01)
        assert server.call(server.service.drain(0)) == 2
        answer, stream = plain.result(), streamed.result()
    *_, last = events(stream)
    for error in (answer.json()["error"], json.loads(last)["error"]):
        assert error["code"] == "draining"
        assert "state_ids" not in error
    assert answer.status_code == 503
    server.idle()
    assert server.service.loaded.engine.failure is None
