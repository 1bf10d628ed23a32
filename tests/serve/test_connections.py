"""What a client may send before its request is whole, and how long it may take: bounded, whoever it is."""

import asyncio
import json
import re
import select
import socket
import threading
import time
from contextlib import ExitStack

import psutil
import pytest

from bdh.serve.config import AuthSettings, LimitSettings, listen
from bdh.serve.connections import Connection

CRLF = b"\r\n"
KEY_POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret-of-ann\r\n"
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """A socket, and what has come from it."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self._file = self.socket.makefile("rb")

    def send(self, *pieces: bytes) -> "Client":
        try:
            for piece in pieces:
                self.socket.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has been refused
        return self

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer."""
        line = self._file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        while (field := self._file.readline()) != CRLF:
            name, _, value = field.decode().partition(":")
            headers[name.lower()] = value.strip()
        return int(line.split()[1]), headers, self._file.read(int(headers.get("content-length", 0)))

    def rest(self) -> bytes:
        """Until the server ends the connection."""
        try:
            return self._file.read()
        except ConnectionResetError:
            return b""

    def assert_refused(self, status: int, code: str) -> None:
        found, headers, body = self.answer()
        error = json.loads(body)["error"]
        assert (found, error["code"]) == (status, code), error
        assert set(error) == {"message", "type", "param", "code"}
        assert headers["connection"] == "close"
        assert self.rest() == b""

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@pytest.fixture
def connect():
    with ExitStack() as stack:

        def connect(server) -> Client:
            client = Client(server)
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture(scope="module")
def strict(start_server, bytes_pair, tmp_path_factory):
    """Small limits, and a key: what is refused is refused before that is looked at."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret-of-ann")
    limits = LimitSettings(head_bytes=4096, head_fields=10, head_timeout=60)
    return start_server(*bytes_pair, limits=limits, auth=AuthSettings(keys_file=str(keys)))


@pytest.fixture(scope="module")
def hasty(start_server, bytes_pair):
    limits = LimitSettings(head_timeout=0.3, body_timeout=0.3, keep_alive_timeout=0.3)
    return start_server(*bytes_pair, limits=limits)


def head_of(size: int) -> bytes:
    start, end = b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Long: ", b"\r\n\r\n"
    return start + b"a" * (size - len(start) - len(end)) + end


def test_headers_up_to_the_limit_are_taken_and_one_byte_more_is_not(strict, connect):
    assert connect(strict).send(head_of(4096)).answer()[0] == 200
    connect(strict).send(head_of(4097)).assert_refused(431, "headers_too_large")


def test_the_limit_holds_for_each_request_of_a_connection(strict, connect):
    client = connect(strict)
    for _ in range(3):
        assert client.send(head_of(4000)).answer()[0] == 200
    client.send(head_of(5000)).assert_refused(431, "headers_too_large")


def test_an_address_over_the_limit_is_a_414(strict, connect):
    connect(strict).send(b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n").assert_refused(414, "uri_too_long")


def test_more_headers_than_allowed_are_refused(strict, connect):
    fields = b"".join(b"X-%d: 1\r\n" % number for number in range(10))
    assert (
        connect(strict)
        .send(b"GET /health/live HTTP/1.1\r\n" + fields[: -len(b"X-9: 1\r\n")] + b"Host: x\r\n\r\n")
        .answer()[0]
        == 200
    )
    status, _, body = connect(strict).send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + fields + CRLF).answer()
    assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_large")


def test_memory_stays_flat_while_headers_come_without_end(strict, connect):
    """A header of 300 MiB was taken whole."""
    client, piece = connect(strict), b"a" * (1 << 20)
    client.send(b"GET / HTTP/1.1\r\nX-Long: ", piece)
    process, most = psutil.Process(), 0
    before = process.memory_info().rss
    for _ in range(100):
        client.send(piece)
        most = max(most, process.memory_info().rss)
    client.assert_refused(431, "headers_too_large")
    assert most < before + (20 << 20)


def test_trailers_and_extensions_of_chunks_are_bounded_too(strict, connect):
    head = KEY_POST + b"Transfer-Encoding: chunked\r\n\r\n"
    for endless in (b"0\r\n" + b"X-Trailer: 1\r\n" * 10_000, b"0\r\nX-Long: " + b"a" * 50_000, b"3;a=" + b"a" * 50_000):
        connect(strict).send(head, endless).assert_refused(431, "headers_too_large")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
    ],
    ids=["tls", "no-address", "bad-header", "other-version"],
)
def test_what_is_not_http_is_told_so_in_the_shape_of_the_api(strict, connect, request_):
    status, headers, body = connect(strict).send(request_).answer()
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
    assert headers["content-type"] == "application/json"


def test_a_coding_of_the_body_other_than_chunked_is_a_501(strict, connect):
    connect(strict).send(KEY_POST + b"Transfer-Encoding: gzip\r\n\r\n").assert_refused(501, "invalid_http")


def test_a_body_that_breaks_off_into_garbage_is_a_400(server, connect):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    connect(server).send(head, b"3\r\nabc\r\n", b"what is this\r\n").assert_refused(400, "invalid_http")
    server.idle()


def test_headers_that_do_not_come_in_time_are_a_408(hasty, connect):
    client = connect(hasty).send(b"GET / HTTP/1.1\r\n")
    trickling = threading.Event()

    def trickle():
        while not trickling.wait(0.05):
            client.send(b"X-Slow: 1\r\n")

    thread = threading.Thread(target=trickle)
    thread.start()
    client.assert_refused(408, "request_timeout")
    trickling.set()
    thread.join()


def test_a_connection_without_a_request_is_closed(hasty, connect):
    assert connect(hasty).rest() == b""
    assert connect(hasty).send(b"\r\n\r\n").rest() == b""
    client = connect(hasty).send(GET)
    assert client.answer()[0] == 200
    assert client.rest() == b""


def test_one_connection_that_fails_leaves_the_time_of_the_others_bounded(hasty, connect, monkeypatch):
    """A client that had gone in the moment of its 408 ended the clock of all: half-sent heads stayed for ever."""
    original, failed = Connection.check_time, []

    def check_time(self):
        if not failed and self in hasty.connections.open:
            failed.append(self)
            raise OSError("not connected")
        original(self)

    monkeypatch.setattr(Connection, "check_time", check_time)
    clients = [connect(hasty).send(GET[:10]) for _ in range(3)]
    assert [client.rest()[9:12] for client in clients].count(b"408") == 2


def test_a_client_that_has_gone_when_it_is_refused_is_dropped(hasty, connect, monkeypatch):
    def gone(self):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(asyncio.selector_events._SelectorSocketTransport, "write_eof", gone)
    clients = [connect(hasty).send(GET[:10]) for _ in range(2)]
    assert all(client.rest()[9:12] in (b"", b"408") for client in clients)


def test_the_second_head_of_a_connection_has_its_time_too(hasty, connect):
    client = connect(hasty).send(GET)
    assert client.answer()[0] == 200
    client.send(b"GET / HT").assert_refused(408, "request_timeout")


def test_a_body_that_nobody_waits_for_does_not_keep_its_connection(guarded, connect):
    client = connect(guarded).send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert client.answer()[0] == 401
    assert client.rest() == b""


def test_a_client_that_waits_for_leave_to_send_gets_it_or_its_refusal(guarded, connect):
    body = b'{"prompt": "abc", "max_tokens": 1}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n" % len(body)
    )
    client = connect(guarded).send(head + b"Authorization: Bearer secret-of-ann\r\n\r\n")
    assert client.answer()[0] == 100
    assert client.send(body).answer()[0] == 200
    status, headers, _ = (client := connect(guarded).send(head + CRLF)).answer()
    assert (status, headers["connection"]) == (401, "close")
    assert client.rest() == b""


def test_a_request_with_an_offer_to_upgrade_is_answered_with_its_body(server, connect):
    """As Java's HttpClient sends it."""
    body = b'{"prompt": "abc", "max_tokens": 1}'
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    client = connect(server)
    for _ in range(2):
        assert client.send(head + body).answer()[0] == 200
    websocket = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert connect(server).send(websocket).answer()[0] == 200


def test_requests_sent_ahead_are_answered_in_order_and_bounded(strict, connect):
    client = connect(strict).send(GET * 20)
    assert [client.answer()[0] for _ in range(20)] == [200] * 20
    body = b'{"prompt": "abc", "max_tokens": 200, "temperature": 0}'
    head = KEY_POST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    client = connect(strict).send(head + body, GET * 1000)
    answers = re.findall(rb"HTTP/1.1 (\d+)", client.rest())
    assert answers[0] == b"200"
    assert len(answers) < 500


def test_an_empty_line_after_a_body_harms_nothing(server, connect):
    body = b'{"prompt": "abc", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    client = connect(server)
    for _ in range(3):
        assert client.send(head % len(body) + CRLF + body + CRLF).answer()[0] == 200
    client = connect(server).send(head % len(body) + b"Connection: close\r\n\r\n" + body, CRLF)
    assert client.answer()[0] == 200
    assert client.rest() == b""


def test_many_slow_connections_give_way_to_others(start_server, bytes_pair, connect):
    server = start_server(*bytes_pair, limits=LimitSettings(connections=10, head_timeout=60))
    body = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    slow = [connect(server).send(body if number % 2 else b"GET / HTTP/1.1\r\nX-S") for number in range(30)]
    assert server.http.get("/health/live").status_code == 200
    # Which ones is open: a whole head counts as news, and may be read after later connections have been accepted.
    refused: list[Client] = []
    for _ in range(100):
        refused = [client for client in slow if select.select([client.socket], [], [], 0)[0]]
        if len(refused) >= 20:
            break
        time.sleep(0.1)
    assert len(refused) >= 20
    for client in refused:
        client.assert_refused(503, "too_many_connections")
    assert server.http.get("/health/live").status_code == 200
    assert server.text("abc", max_tokens=2)


def test_connections_that_come_at_once_take_the_place_of_one_each(start_server, bytes_pair, connect):
    server = start_server(*bytes_pair, limits=LimitSettings(connections=10, head_timeout=60))
    assert server.http.get("/health/live").status_code == 200
    (idle,) = server.connections.open  # kept by the client, and the first to go
    # Meanwhile all of these come, so that one turn of the loop accepts them.
    idle.loop.call_soon_threadsafe(time.sleep, 0.5)
    slow = [connect(server).send(b"GET / HTTP/1.1\r\nX-S") for _ in range(30)]
    for client in slow[:20]:
        client.assert_refused(503, "too_many_connections")


def test_where_all_connections_are_at_work_a_new_one_is_refused(start_server, bytes_pair, connect):
    server = start_server(*bytes_pair, limits=LimitSettings(connections=2, head_timeout=60))
    body = b'{"prompt": "abc", "max_tokens": 16000, "temperature": 0, "stream": true}'
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    working = [connect(server).send(post % len(body) + body) for _ in range(2)]
    for client in working:
        assert client.answer()[0] == 200
    refused = connect(server)
    refused.assert_refused(503, "too_many_connections")
    for client in working:
        client.close()
    server.idle()
    assert server.http.get("/health/live").status_code == 200


@pytest.mark.slow
def test_a_client_that_does_not_take_its_answer_is_given_up(start_server, bytes_pair, connect):
    server = start_server(*bytes_pair, limits=LimitSettings(send_timeout=0.3))
    body = json.dumps({"prompt": "a" * 2000, "echo": True, "logprobs": 5, "max_tokens": 0}).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connect(server).send((post % len(body) + body) * 25)  # whose answers are more than what sockets keep
    seen = False
    for _ in range(2000):
        seen |= bool(server.connections.open)
        if seen and not server.connections.open:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it is still being written to")
    server.idle()


def test_head_is_get_without_a_body(server, connect):
    described = server.http.get("/openapi.json").json()
    assert not any("head" in operations for operations in described["paths"].values())
    paths = [path for path, operations in described["paths"].items() if "get" in operations and "{" not in path]
    for path in [*paths, "/", "/openapi.json", "/v1/models/tiny", "/v1/models/none", "/nowhere", "/v1/states/none"]:
        wanted = server.http.get(path)
        client = connect(server).send(b"HEAD %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
        answer = client.rest()
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *fields = head.decode().split("\r\n")
        found = {field.partition(":")[0].lower(): field.partition(": ")[2] for field in fields}
        differing = {"date", "x-request-id", "connection"}
        assert int(status.split()[1]) == wanted.status_code
        assert {name: found[name] for name in found.keys() - differing} == {
            name: wanted.headers[name] for name in wanted.headers.keys() - differing
        }
        assert int(found["content-length"]) == len(wanted.content)
        assert body == b""
    answer = server.http.head("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert server.http.delete("/v1/models").headers["allow"] == "GET, HEAD"


def test_a_stream_for_http_1_0_ends_with_its_connection(server, connect):
    body = b'{"prompt": "abc", "max_tokens": 5, "temperature": 0, "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    client = connect(server).send(head % len(body) + body)
    status, headers, _ = client.answer()
    assert status == 200
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    events = client.rest().strip().split(b"\n\n")
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"
    whole = connect(server).send(b"GET /health/live HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert whole.answer()[2] == b'{"status":"live"}'
    assert whole.rest() == b""


def test_answers_leave_at_once():
    """Each took 40 ms longer: its body waited for the client to acknowledge its head."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_is_refused_is_counted_and_logged(start_server, bytes_pair, connect, caplog):
    server = start_server(*bytes_pair, metrics=True)
    with caplog.at_level("INFO", "bdh.serve"):
        connect(server).send(b"nonsense\r\n\r\n").assert_refused(400, "invalid_http")
    facts = next(record.facts for record in caplog.records if record.message == "refused")
    assert facts == {"status": 400, "code": "invalid_http", "address": "127.0.0.1"}
    assert 'route="none",status="400"' in server.http.get("/metrics").text
