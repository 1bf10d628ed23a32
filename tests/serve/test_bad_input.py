"""Whatever comes in, the server answers in its own shape, stays up, and lets others be."""

import asyncio
import io
import json
import logging
import socket
import threading
import time

import pytest

import bdh.generate.advance
import bdh.generate.async_engine
from bdh.generate.params import EngineConfig
from bdh.serve.config import AuthSettings, LimitSettings
from bdh.serve.middleware import EventStream, JsonFormatter, TextFormatter
from bdh.serve.schemas import CompletionRequest


def assert_refused(answer, status: int, param: str | None = None, code: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 17}, "n"),
        ({"best_of": 17}, "best_of"),
        ({"prompt": ["a", ""]}, "prompt.1"),
        ({"prompt": [[97], [300]]}, "prompt.1"),
        ({"n": 10**30}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": 6}, "logprobs"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ({"maxTokens": 3}, "maxTokens"),
        ({"top-p": 1}, "top-p"),
        ({"x" * 1000: 1}, "x" * 64),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 1, "03": 2}}, "logit_bias"),
        ({"logit_bias": {"3": 1000}}, "logit_bias.3"),
        ({"stop_token_ids": [256]}, "stop_token_ids"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a", "\ud800"]}, "prompt"),
        ({"stop": "\udfff"}, "stop"),
        ({"model": "\ud800"}, "model"),
        ({"\ud800": 1}, None),
        ({"suffix": "x"}, "suffix"),
        ({"bdh": {"what": 1}}, "bdh.what"),
        ({"bdh": {"activations": 1000}, "stream": True}, "bdh.activations"),
        ({"bdh": {"activations": 3}}, "bdh.activations"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(server, fields, param):
    assert_refused(
        server.http.post("/v1/completions", content=json.dumps({"prompt": "abc", **fields}), headers=JSON), 400, param
    )
    assert server.text("abc", max_tokens=3)


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"prompt": "abc", "temperature": NaN}',
        b'{"prompt": "abc", "temperature": Infinity}',
        b'{"prompt": "abc", "temperature": 1e999}',
        b'{"prompt": "abc", "n": ' + b"9" * 5000 + b"}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xf0\x9f"}',
        b"[" * 100_000,
        b'{"prompt": "abc"',
        b"\x00" * 50,
        b'{"prompt": "abc", "prompt": 3}',
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_is_no_request_is_a_400(server, path, body):
    assert_refused(server.http.post(path, content=body, headers=JSON), 400)
    assert server.http.get("/health").status_code == 200


NUMBERS = [name for name, field in CompletionRequest.model_fields.items() if "float" in str(field.annotation)]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("field", [*NUMBERS, "n", "max_tokens", "seed", "top_k", "stop_token_ids", "prompt", "unknown"])
def test_a_number_that_is_not_finite_is_a_400_and_named(server, field, number):
    """Also in a field for whole numbers, or for none, and in the answer that names it."""
    value = {"logit_bias": f'{{"3": {number}}}', "stop_token_ids": f"[{number}]", "prompt": f"[1, {number}]"}
    text = f'{{"{field}": {value.get(field, number)}' + ("}" if field == "prompt" else ', "prompt": "abc"}')
    answer = server.http.post("/v1/completions", content=text, headers=JSON)
    message = assert_refused(answer, 400)
    assert answer.json()["error"]["param"].split(".")[0] == field, message


def test_the_numbers_of_a_request_are_all_tried():
    assert len(NUMBERS) == 7, NUMBERS


def test_another_content_type_is_refused(server):
    assert_refused(server.http.post("/v1/completions", data={"prompt": "abc"}), 400)
    assert_refused(
        server.http.post("/v1/completions", content=b'{"prompt": "abc"}', headers={"Content-Type": "text/plain"}), 400
    )


def test_a_body_of_ten_megabytes_is_refused_before_it_is_parsed(server):
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    assert_refused(server.http.post("/v1/completions", content=body, headers=JSON), 413, code="request_too_large")

    def in_pieces():
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    assert_refused(server.http.post("/v1/completions", content=in_pieces(), headers=JSON), 413)
    assert server.text("abc")


def test_a_prompt_over_the_limit_is_refused(start_server, bytes_pair):
    server = start_server(*bytes_pair, limits=LimitSettings(prompt_tokens=100))
    assert_refused(server.complete("a" * 101), 400, "prompt", "context_length_exceeded")
    assert server.text("a" * 100)


def test_paths_and_methods_that_are_not_there(server):
    assert_refused(server.http.get("/v1/nothing"), 404, code="not_found")
    assert_refused(server.http.get("/v1/nothing/"), 404, code="not_found")
    assert_refused(server.http.get("/v1/states/..%2f..%2fetc"), 404)
    answer = server.http.get("/v1/completions")
    assert_refused(answer, 405, code="method_not_allowed")
    assert answer.headers["allow"] == "POST"
    answer = server.http.put("/v1/states/a")
    assert_refused(answer, 405)
    assert answer.headers["allow"] == "DELETE, GET, HEAD"


def test_states_of_others_are_not_there(start_server, bytes_pair, tmp_path):
    (tmp_path / "keys").write_text("ann secret-of-ann\nbob secret-of-bob\n")
    server = start_server(*bytes_pair, auth=AuthSettings(keys_file=str(tmp_path / "keys")))
    ann, bob = ({"Authorization": f"Bearer secret-of-{name}"} for name in ("ann", "bob"))
    body = {"prompt": "abc", "max_tokens": 2, "bdh": {"save_state": True}}
    state = server.http.post("/v1/completions", json=body, headers=ann).json()["choices"][0]["bdh"]["state_id"]
    further = {"prompt": "d", "bdh": {"from_state": state}}
    assert server.http.post("/v1/completions", json=further, headers=ann).status_code == 200
    assert_refused(
        server.http.post("/v1/completions", json=further, headers=bob), 404, "bdh.from_state", "state_not_found"
    )
    assert_refused(server.http.get(f"/v1/states/{state}", headers=bob), 404, code="state_not_found")
    assert_refused(server.http.delete(f"/v1/states/{state}", headers=bob), 404)
    assert server.http.get("/v1/states", headers=bob).json()["data"] == []
    assert [each["id"] for each in server.http.get("/v1/states", headers=ann).json()["data"]] == [state]
    assert_refused(server.http.get("/v1/states"), 401, code="missing_api_key")
    assert server.http.get("/health/ready").status_code == 200
    assert_refused(server.http.get("/v1/models", headers={"Authorization": "Basic abc"}), 401)


def raw(server, request: bytes, *, wait: float = 5.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(request)
        found = b""
        try:
            while piece := connection.recv(65536):
                found += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def test_garbage_on_the_socket_is_answered_or_dropped(server):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"\xff" * 4096,
        b"POST / HTTP/9.9\r\n\r\n",
        b"A" * 200_000,
    ):
        found = raw(server, garbage, wait=0.3)
        assert not found or found.split()[1] == (b"414" if len(garbage) > 100_000 else b"400")
    assert server.text("abc")


def test_a_slow_body_is_given_up(start_server, bytes_pair):
    server = start_server(*bytes_pair, limits=LimitSettings(body_timeout=0.5))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    found = raw(server, head + b'{"prompt": "a')
    assert b" 408 " in found.split(b"\r\n")[0]
    assert b"request_timeout" in found
    assert server.text("abc")


def test_a_socket_that_is_half_closed_frees_everything(server):
    body = json.dumps({"prompt": "abc", "max_tokens": 10_000, "stream": True, "temperature": 0}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in connection.recv(100)
        connection.shutdown(socket.SHUT_WR)
    server.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_state(server, stream):
    generated = server.service.loaded.engine.stats.generated_tokens
    body = json.dumps({"prompt": "abc", "max_tokens": 16_000, "stream": stream, "temperature": 0}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        for _ in range(1000):
            if server.service.loaded.engine.stats.running:
                break
            time.sleep(0.005)
        else:
            raise AssertionError("it has not begun")
    server.idle()
    assert server.service.loaded.engine.stats.generated_tokens < generated + 16_000


def test_a_prompt_that_waits_too_long_is_sent_away(start_server, bytes_pair):
    limits = LimitSettings(queue_timeout=0.3)
    server = start_server(*bytes_pair, limits=limits, engine=EngineConfig(max_running=1))
    answers = []
    first = threading.Thread(target=lambda: answers.append(server.complete("abc", max_tokens=2000)))
    first.start()
    while not server.service.loaded.engine.stats.running:
        time.sleep(0.005)
    answer = server.complete("abc", max_tokens=1)
    assert_refused(answer, 503, code="queue_timeout")
    assert int(answer.headers["retry-after"]) >= 1
    first.join()
    assert answers[0].status_code == 200
    server.idle()


def test_a_request_that_takes_too_long_is_ended(start_server, bytes_pair):
    server = start_server(*bytes_pair, limits=LimitSettings(request_timeout=0.4))
    assert_refused(server.complete("abc", max_tokens=16_000), 503, code="request_timeout")
    lines = server.complete("abc", max_tokens=16_000, stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
    server.idle()


def test_nothing_is_answered_before_the_model_is_there(start_server):
    server = start_server(None, None)
    answer = server.http.get("/health/ready")
    assert_refused(answer, 503, code="loading")
    assert "retry-after" in answer.headers
    assert server.http.get("/health/live").json() == {"status": "live"}
    assert_refused(server.http.get("/v1/models"), 503, code="loading")
    assert_refused(server.complete("abc"), 503, code="loading")


def test_an_engine_that_fails_turns_the_server_off(start_server, bytes_pair, monkeypatch):
    server = start_server(*bytes_pair)
    async_engine = server.service.loaded.engine

    def fail():
        raise RuntimeError("the memory is on fire")

    monkeypatch.setattr(async_engine.engine, "step", fail)
    answer = server.complete("abc")
    message = assert_refused(answer, 503, code="engine_failed")
    assert "fire" not in message
    assert_refused(server.http.get("/health/ready"), 503, code="engine_failed")
    assert server.http.get("/health/live").status_code == 200


class Clock:
    def __init__(self):
        self.now = time.monotonic()

    def monotonic(self):
        return self.now


def test_a_long_step_that_makes_progress_is_no_hang(start_server, bytes_pair, monkeypatch):
    """A step of more than a minute ended the server, whatever it was doing."""
    server = start_server(*bytes_pair, limits=LimitSettings(stall_timeout=60))
    advancer = server.service.loaded.engine.engine.advancer
    step, clock = advancer.read_all, Clock()

    def slow(inputs):
        for _ in range(4):
            clock.now += 50
            server.service.check_engine()
            advancer.mark_progress()
        step(inputs)

    monkeypatch.setattr(advancer, "read_all", slow)
    for module in (bdh.generate.advance, bdh.generate.async_engine):
        monkeypatch.setattr(module, "time", clock)
    assert server.complete("abc", max_tokens=1).status_code == 200
    assert server.service.status == "ready"


@pytest.mark.parametrize("stall_timeout", [0.2, None])
def test_a_step_without_progress_is_a_hang_unless_that_is_switched_off(
    start_server, bytes_pair, monkeypatch, stall_timeout
):
    server = start_server(*bytes_pair, limits=LimitSettings(stall_timeout=stall_timeout))
    async_engine, going_on = server.service.loaded.engine, threading.Event()
    step = async_engine.engine.advancer.read_all

    def hanging(feeds):
        going_on.wait(60)
        step(feeds)

    monkeypatch.setattr(async_engine.engine.advancer, "read_all", hanging)
    asked = threading.Thread(target=server.complete, kwargs={"max_tokens": 1})
    asked.start()
    while async_engine.seconds_without_progress < 0.3:
        time.sleep(0.01)
    answer = server.http.get("/health/ready")
    assert answer.status_code == (200 if stall_timeout is None else 503)
    if stall_timeout is not None:
        assert str(server.service.failure).startswith("the engine has made no progress for")
    going_on.set()
    asked.join()


def test_an_error_of_the_program_is_told_without_its_insides(server, monkeypatch):
    def fail(*arguments, **settings):
        raise RuntimeError("a secret path")

    with monkeypatch.context() as patch:
        patch.setattr(server.service, "begin", fail)
        answer = server.complete("abc")
    message = assert_refused(answer, 500, code="internal_error")
    assert "secret" not in message
    assert server.text("abc")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_path_cannot_write_lines_into_the_log(log_format):
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter({"json": JsonFormatter, "text": TextFormatter}[log_format]())
    record = logging.makeLogRecord(
        {"msg": "request", "levelno": 20, "levelname": "INFO", "facts": {"path": "/a\n12:00 forged"}}
    )
    handler.handle(record)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_stream_that_has_not_begun_is_ended_all_the_same():
    ended = []

    async def events():
        yield b"never"

    async def run():
        async def gone():
            return {"type": "http.disconnect"}

        async def closed(message):
            raise OSError("the connection is closed")

        stream = EventStream(events(), lambda: ended.append(True))
        with pytest.raises(OSError, match="closed"):
            await stream({"type": "http", "state": {"facts": {}}}, gone, closed)

    asyncio.run(run())
    assert ended == [True]
