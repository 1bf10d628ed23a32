"""A server on a port of this machine, in a thread of this process: what clients talk to."""

import asyncio
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch
import uvicorn

from bdh import BDHConfig, BDHForCausalLM
from bdh.generate.params import EngineConfig
from bdh.serve.config import AuthSettings, LimitSettings, ServeSettings
from bdh.serve.middleware import ApiKeys
from bdh.serve.server import load, uvicorn_config
from bdh.serve.service import Service
from bdh.tokenizer import byte_tokenizer, train_tokenizer, with_chat_template

SENTENCES = ["Die Straße ist naß, und der Vogel singt.", "Ένα πουλί στο δέντρο.", "鳥が木で歌う。🐦🌳 Naïve café!"]


def made_model(vocab_size: int, seed: int = 0) -> BDHForCausalLM:
    """A small model whose texts are of all kinds of tokens."""
    sizes = {"n_embd": 24, "n_head": 3, "n_layer": 3, "mlp_internal_dim_multiplier": 6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BDHForCausalLM(BDHConfig(vocab_size=vocab_size, dropout=0.0, initializer_range=0.3, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model


@pytest.fixture(scope="session")
def bytes_pair():
    """A model of bytes, without a chat template."""
    return made_model(256), byte_tokenizer()


@pytest.fixture(scope="session")
def chat_pair():
    tokenizer = with_chat_template(byte_tokenizer(), "default", needs_one=True)
    return made_model(len(tokenizer)), tokenizer


@pytest.fixture(scope="session")
def bpe_pair():
    tokenizer = train_tokenizer(SENTENCES * 20, "bpe", 300)
    return made_model(len(tokenizer)), tokenizer


class Running:
    """A server, its service, and clients for it."""

    def __init__(self, settings, model, tokenizer, **options):
        self.settings = settings
        self.service = Service(settings, **options)
        self.keys = ApiKeys(settings.auth)
        config = uvicorn_config(self.service, self.keys)
        config.port, config.log_level = 0, "error"
        self.connections = config.http.__self__
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        if model is not None:
            self.service.open(load(settings, lambda: (model, tokenizer)))
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _run(self):
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._server.serve())
        left = asyncio.all_tasks(self.loop)  # of requests that still ran
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.loop.close()

    def call(self, coroutine):
        """Runs something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def complete(self, prompt="abc", **fields):
        return self.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})

    def text(self, prompt="abc", **fields):
        answer = self.complete(prompt, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def idle(self):
        """Waits until nothing runs; the gauges are those of an engine without work."""
        for _ in range(1000):
            stats = self.service.loaded.engine.stats
            waits = len(self.service.waiting)
            if not (stats.running or stats.waiting or stats.state_bytes or waits or self.service.running):
                return
            time.sleep(0.01)
        raise AssertionError(f"something goes on: {stats}, {waits} wait, {len(self.service.running)} requests")

    def close(self):
        self.http.close()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        if self._thread.is_alive():
            at = "".join(traceback.format_stack(sys._current_frames()[self._thread.ident]))
            tasks = "\n".join(map(repr, asyncio.all_tasks(self.loop)))
            raise AssertionError(f"the server at {self.url} does not end; its thread is at\n{at}its tasks are\n{tasks}")
        if self.service.loaded is not None:
            self.service.loaded.engine.close()


@contextmanager
def servers():
    """Starts servers, which end with it."""
    running = []

    def start(model, tokenizer, *, options=None, **settings):
        settings.setdefault("engine", EngineConfig(max_running=8, prefix_cache_bytes=1 << 26))
        running.append(Running(ServeSettings(model="made/tiny", **settings), model, tokenizer, **(options or {})))
        return running[-1]

    yield start
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Running.close, running))


@pytest.fixture(scope="session")
def shared_server():
    """A server for all tests that ask for one of this model and these settings."""
    found = {}
    with servers() as start:

        def shared(model, tokenizer, **settings):
            key = id(model), id(tokenizer), repr(settings)
            if key not in found:
                found[key] = start(model, tokenizer, **settings)
            return found[key]

        yield shared


@pytest.fixture(scope="module")
def start_server():
    """Starts servers of a test's own."""
    with servers() as start:
        yield start


@pytest.fixture(scope="session")
def server(shared_server, bytes_pair):
    return shared_server(*bytes_pair, served_model_name=["tiny", "tiny-alias"])


@pytest.fixture(scope="session")
def chat_server(shared_server, chat_pair):
    return shared_server(*chat_pair, served_model_name=["chatty"])


@pytest.fixture(scope="session")
def plain_server(shared_server, bytes_pair):
    return shared_server(*bytes_pair, chat_template="plain")


@pytest.fixture(scope="session")
def served(shared_server, bytes_pair):
    """For recorded bodies: a model called tiny, in the plain form, whose replies are short."""
    limits = LimitSettings(max_tokens=16, chat_tokens=8)
    return shared_server(*bytes_pair, chat_template="plain", served_model_name=["tiny"], limits=limits)


@pytest.fixture(scope="session")
def guarded(shared_server, bytes_pair, tmp_path_factory):
    """A server that asks for the key secret-of-ann."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("secret-of-ann")
    return shared_server(*bytes_pair, auth=AuthSettings(keys_file=str(keys)))
