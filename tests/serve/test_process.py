"""The command itself, as a process: its start, its signals, its end."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from benchmarks.forked import ForkServer


@pytest.fixture(scope="module")
def fork_server():
    with ForkServer("bdh.cli.models", "bdh.serve.server", "bdh.model.network") as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bytes_pair):
    path = tmp_path_factory.mktemp("served") / "tiny"
    bytes_pair[0].save_pretrained(path)
    bytes_pair[1].save_pretrained(path)
    return path


class Process:
    """A server.

    Args:
        command: follows ``bdh``, or ``python`` where it begins with -c.
        forked: what starts it, from imports that are done; None for a Python of its own.
    """

    def __init__(self, command, tmp_path, forked, environment=None):
        self.log, self._changed = [], threading.Condition()
        pipe = tmp_path / f"stderr of {len(list(tmp_path.iterdir()))}"
        os.mkfifo(pipe)
        threading.Thread(target=self._read, args=[pipe], daemon=True).start()
        if forked:
            self.process = forked.start(command, environment, stderr=pipe)
        else:
            start = [sys.executable, "-m", "bdh", *command]
            with pipe.open("w") as stderr:
                self.process = subprocess.Popen(start, stderr=stderr, env={**os.environ, **(environment or {})})
        self.http = httpx.Client(base_url=self.wait_for("listening")["url"], timeout=60)

    def _read(self, pipe):
        with pipe.open() as lines:
            for line in lines:
                with self._changed:
                    self.log.append(json.loads(line) if line.startswith("{") else {"event": line.rstrip()})
                    self._changed.notify_all()

    def wait_for(self, event: str) -> dict:
        def found():
            return next((line for line in self.log if line["event"].startswith(event)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, 60), self.log
            return found()

    def complete(self, **fields):
        return self.http.post("/v1/completions", json={"temperature": 0, "logprobs": 0, **fields})

    def tokens(self, **fields) -> list[str]:
        return self.complete(**fields).json()["choices"][0]["logprobs"]["tokens"]

    def wait_for_running(self, count: int) -> None:
        """Until so many texts are being written."""
        for _ in range(6000):
            if f'bdh:num_requests_running{{model_name="tiny"}} {count}.0' in self.http.get("/metrics").text:
                return
            time.sleep(0.01)
        raise AssertionError(self.http.get("/metrics").text)

    def end(self, number=signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture
def start_process(tmp_path):
    started = []

    def start(*arguments, **options) -> Process:
        started.append(Process(*arguments, tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        each.http.close()


@pytest.fixture
def start(start_process, fork_server, folder):
    def start(*arguments, forked=fork_server, **options) -> Process:
        command = ["serve", str(folder), "--port", "0", "--metrics", "true", *arguments]
        server = start_process(command, forked=forked, **options)
        server.wait_for("ready")
        return server

    return start


@pytest.mark.slow
def test_sigterm_lets_what_runs_come_to_its_end(start):
    server = start("--drain_timeout", "50")
    lengths = [1000 + 40 * number for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.complete, prompt="abc", max_tokens=length) for length in lengths]
        server.wait_for_running(8)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("ending")
        late = server.http.get("/health/ready")
        answers = [each.result() for each in asked]
    assert [len(answer.json()["choices"][0]["logprobs"]["tokens"]) for answer in answers] == lengths
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert server.process.wait(60) == 0
    assert server.wait_for("drained")["cut_off"] == 0


@pytest.mark.slow
def test_what_is_cut_off_is_told_so_and_goes_on_after_a_restart(start, tmp_path):
    keeping = ("--drain_timeout", "0.3", "--states.folder", str(tmp_path / "states"), "--resume_on_restart", "true")
    server = start(*keeping, forked=None)  # the other one shares nothing with it
    whole = server.complete(prompt="abc", max_tokens=1500).json()["choices"][0]
    saved = server.complete(prompt="xyz", max_tokens=20, bdh={"save_state": True}).json()["choices"][0]
    rest = server.tokens(prompt="", max_tokens=15, bdh={"from_state": saved["bdh"]["state_id"]})
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(server.complete, prompt="abc", max_tokens=1500)
        streamed = pool.submit(server.complete, prompt="abc", max_tokens=1500, stream=True)
        server.wait_for_running(2)
        assert server.end() == 0
        answer, stream = plain.result(), streamed.result()
    assert server.wait_for("drained")["cut_off"] == 2
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "draining")
    last = json.loads(stream.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "draining"
    states = [*error["state_ids"], *last["error"]["state_ids"]]
    assert len(states) == 2

    server = start(*keeping)
    assert server.tokens(prompt="", max_tokens=15, bdh={"from_state": saved["bdh"]["state_id"]}) == rest
    for state in states:
        for _ in range(500):
            facts = server.http.get(f"/v1/states/{state}").json()
            if facts["status"] == "saved":
                break
            time.sleep(0.02)
        assert facts["text"] == whole["text"]
        assert facts["tokens"] == 3 + len(whole["logprobs"]["tokens"])
    assert server.end() == 0


@pytest.mark.slow
def test_a_log_that_has_lost_its_reader_ends_nothing(folder):
    command = [sys.executable, "-m", "bdh", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = json.loads(process.stderr.readline())["url"]
        while "ready" not in process.stderr.readline():
            pass
        process.stderr.close()
        with httpx.Client(base_url=url, timeout=60) as http:
            for _ in range(3):
                assert http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2}).status_code == 200
        process.send_signal(signal.SIGTERM)
        told = process.stdout.read()
    assert process.returncode == 0
    assert told == "warning: stderr cannot be written to (Broken pipe): what is written there is lost\n"


@pytest.mark.slow
def test_without_that_it_is_cut_off_all_the_same(start):
    server = start("--drain_timeout", "0")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, prompt="abc", max_tokens=10_000)
        server.wait_for_running(1)
        assert server.end() == 0
        error = asked.result().json()["error"]
    assert error["code"] == "draining"
    assert "state_ids" not in error


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(start):
    server = start("--drain_timeout", "60")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, prompt="abc", max_tokens=16_000)
        server.wait_for_running(1)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("ending")
        start_of_end = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert time.monotonic() - start_of_end < 20
        asked.exception()


@pytest.mark.slow
def test_sighup_reads_the_keys_again_and_the_log_has_neither_keys_nor_prompts(start, tmp_path):
    (tmp_path / "keys").write_text("secret-of-ann")
    server = start(
        "--auth.keys_file", str(tmp_path / "keys"), environment={"BDH_API_KEYS": "secret-of-all, secret-of-eve"}
    )
    ask = {"url": "/v1/models"}
    for key, status in (("ann", 200), ("all", 200), ("eve", 200), ("bob", 401)):
        assert server.http.get(**ask, headers={"Authorization": f"Bearer secret-of-{key}"}).status_code == status
    (tmp_path / "keys").write_text("secret-of-bob")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("API keys reloaded")
    for key, status in (("ann", 401), ("all", 200), ("bob", 200)):
        assert server.http.get(**ask, headers={"Authorization": f"Bearer secret-of-{key}"}).status_code == status
    body = {"prompt": "a very private prompt", "max_tokens": 2}
    server.http.post("/v1/completions", json=body, headers={"Authorization": "Bearer secret-of-bob"})
    assert server.end() == 0
    lines = json.dumps(server.log)
    assert "/v1/completions" in lines
    assert "secret-of" not in lines
    assert "private" not in lines


@pytest.mark.slow
def test_prompts_are_logged_where_asked_for_and_an_open_server_and_a_taken_port_are_told(start, folder):
    server = start("--log_prompts", "true", "--host", "0.0.0.0")
    server.complete(prompt="a very private prompt", max_tokens=2)
    assert server.wait_for("prompts")["prompts"] == ["a very private prompt"]
    assert server.wait_for("open to the network without API keys")["level"] == "warning"
    port = str(server.http.base_url.port)
    command = [sys.executable, "-m", "bdh", "serve", str(folder), "--host", "0.0.0.0", "--port", port]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert f"cannot listen on 0.0.0.0:{port}" in found.stderr


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_process(start_process, fork_server, folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    process = start_process(["serve", str(damaged), "--port", "0"], forked=fork_server)
    assert process.process.wait(60) == 1
    assert "cut off or damaged" in process.wait_for("the model cannot be served")["event"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "99999"], "port is 99999"),
        (["--resume_on_restart", "true"], "given with states.folder"),
        (["--auth.keys_file", "nowhere.txt"], "there is no such file"),
        (["--limits.prompts", "1000"], "limits.prompts is 1000: must be at most queue_requests"),
        (["--engine.path", "magic"], "engine.path is 'magic'"),
        (["--host", "256.256.256.256"], "cannot listen on 256.256.256.256"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(folder, arguments, told):
    command = [sys.executable, "-m", "bdh", "serve", str(folder), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert told in found.stderr


FAULTY = """
import sys, threading
from bdh.generate.engine import Engine
from bdh.model.network import Network
from bdh.serve.config import LimitSettings, ServeSettings
from bdh.serve.middleware import log
from bdh.serve.server import serve
from bdh.tokenizer import PlainTokenizer

add_request, step, is_faulty = Engine.add_request, Engine.step, threading.Event()
def add(self, prompt, params=None, **arguments):
    if params is not None and params.seed == 13:
        is_faulty.set()
    return add_request(self, prompt, params, **arguments)
def step_or_fail(self):
    if is_faulty.is_set():
        {fault}
    return step(self)
Engine.add_request, Engine.step = add, step_or_fail
settings = ServeSettings(model=sys.argv[1], port=0{settings})
sys.exit(serve(settings, lambda: (Network.load(sys.argv[1]), PlainTokenizer.load(sys.argv[1])), last_step_seconds=0.5))
"""


@pytest.fixture
def start_faulty(start_process, fork_server, folder):
    """A server whose engine has this fault with the first request of the seed 13."""

    def start(fault, settings="") -> Process:
        script = FAULTY.format(fault=fault, settings=settings)
        server = start_process(["-c", script, str(folder)], forked=fork_server)
        server.wait_for("ready")
        return server

    return start


@pytest.mark.slow
def test_a_dead_engine_ends_the_process_with_status_1(start_faulty):
    server = start_faulty("raise RuntimeError('the memory is on fire')")
    assert server.complete(prompt="abc").status_code == 200
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.complete, prompt="abc", max_tokens=5000, seed=13 - number) for number in range(4)]
        codes = [each.result().json()["error"]["code"] for each in asked]
    assert set(codes) == {"engine_failed"}
    assert server.process.wait(30) == 1
    assert server.wait_for("ended by a failure")["reason"] == "the memory is on fire"


@pytest.mark.slow
def test_a_hung_engine_ends_the_process_with_status_1(start_faulty):
    server = start_faulty("threading.Event().wait()", ", limits=LimitSettings(stall_timeout=0.5)")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, prompt="abc", max_tokens=5000, seed=13)
        assert server.process.wait(30) == 1
        asked.exception()
    assert "no progress" in server.wait_for("ended by a failure")["reason"]


@pytest.mark.slow
def test_an_engine_that_hangs_while_the_server_ends_does_not_keep_it(start_faulty):
    server = start_faulty("log('it hangs'); threading.Event().wait()", ", drain_timeout=0.1")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.complete, prompt="abc", max_tokens=5000, seed=13)
        server.wait_for("it hangs")
        server.process.terminate()
        assert server.process.wait(20) == 0
        asked.exception()
    server.wait_for("the engine did not finish its step in time, and was abandoned")


@pytest.mark.slow
def test_telemetry_goes_to_the_collector(start):
    found = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            found.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    server = start("--telemetry", "true", environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    assert server.complete(prompt="abc", max_tokens=2).status_code == 200
    assert server.end() == 0
    collector.shutdown()
    assert any(path == "/v1/traces" and b"/v1/completions" in decompressed(body) for path, body in found)


def decompressed(body: bytes) -> bytes:
    return gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body


def test_telemetry_without_a_collector_is_refused(folder, monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    command = [sys.executable, "-m", "bdh", "serve", str(folder), "--telemetry", "true", "--port", "0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert "set OTEL_EXPORTER_OTLP_ENDPOINT" in found.stderr
