"""The server under load, beside the bare engine: answers, times to the first token, tokens per second, and its overhead.

    python benchmarks/serving.py [MODEL] [--clients 32] [--requests 200] [--tokens 32]

Without MODEL one of 25M parameters is made, whose neurons fire as sparsely as trained ones. The server is a process of
its own; so are the clients. Bare engine and server take turns. With ``--abuse`` clients leave at random moments, send
slowly, or send garbage, and what is left of them is counted.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx
import psutil

from bdh.bench.common import percentile

STATES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--abuse", type=int, metavar="CLIENTS", help="only this, with so many")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = settings.model or made_model(folder)
        found = abuse(model, settings.abuse) if settings.abuse else load(model, settings)
    if settings.json is not None:
        settings.json.write_text(json.dumps(found, indent=2))
    return 0


def made_model(folder: str) -> str:
    """In a process of its own: torch's threads would stand in the way of the others."""
    script = (
        "import sys; from bdh.bench.common import sparse_model; from bdh.model import BDHConfig;"
        "from bdh.tokenizer import byte_tokenizer;"
        "model = sparse_model(BDHConfig(n_embd=256, n_head=4, n_layer=6, mlp_internal_dim_multiplier=128, vocab_size=256));"
        "model.save_pretrained(sys.argv[1]); byte_tokenizer().save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", script, folder], check=True)
    return folder


def prompts_of(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(32, 127) for _ in range(draw.randrange(8, 48))] for _ in range(count)]


def load(model: str, settings: argparse.Namespace) -> dict:
    prompts = prompts_of(settings.requests)
    engines, servers = [], []
    for number in range(settings.rounds):
        print(f"round {number + 1}: the bare engine ...", file=sys.stderr)
        engines.append(bare_engine(model, prompts, settings.tokens))
        print(f"round {number + 1}: the server ...", file=sys.stderr)
        with server(model) as (url, _):
            servers.append(in_process(ask_all, url, prompts, settings.clients, settings.tokens))
    assert all(each["texts"] == engines[0]["texts"] for each in engines)
    for each in servers:
        wrong = sum(text is not None and text != engines[0]["texts"][i] for i, text in enumerate(each["texts"]))
        each["same_texts"] = sum(text is not None for text in each["texts"]) - wrong
        if wrong:
            raise SystemExit(f"{wrong} texts of the server are not those of the bare engine")
    bare, served = (median(each["tokens_per_s"] for each in several) for several in (engines, servers))
    last = servers[-1]
    facts = {
        "answered": last["answered"],
        "refused_with_retry_after": last["refused"],
        "without_an_answer": settings.requests - last["answered"] - last["refused_for_good"],
        "first_token_p50_s": median(last["first"]),
        "first_token_p95_s": percentile(last["first"], 0.95),
        "tokens_per_s": served,
        "engine_tokens_per_s": bare,
        "overhead": 1 - served / bare,
    }
    print(
        f"{settings.requests} requests of {settings.tokens} tokens from {settings.clients} clients, {STATES} states, a queue of 64"
    )
    print(f"  answered              {facts['answered']}, all with the bare engine's texts")
    print(f"  refused on the way    {facts['refused_with_retry_after']} times, each with Retry-After, and asked again")
    print(f"  neither               {facts['without_an_answer']}")
    print(f"  first token           p50 {facts['first_token_p50_s']:.2f} s, p95 {facts['first_token_p95_s']:.2f} s")
    print(f"  server                {served:.1f} tokens/s (medians of {settings.rounds} rounds by turns)")
    print(f"  bare engine           {bare:.1f} tokens/s, as many sequences at once")
    print(f"  overhead              {100 * facts['overhead']:.1f} %")
    return facts


def in_process(function, *arguments):
    """The result of a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def bare_engine(model: str, prompts: list[list[int]], tokens: int) -> dict:
    return in_process(_bare_engine, model, prompts, tokens)


def _bare_engine(model: str, prompts: list[list[int]], tokens: int) -> dict:
    from bdh.generate.engine import Engine
    from bdh.generate.params import EngineConfig, SamplingParams
    from bdh.train.models import load_model

    engine = Engine(*load_model(model), config=EngineConfig(max_running=STATES))
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    engine.generate(prompts[:STATES], params)
    start = time.perf_counter()
    found = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    return {"tokens_per_s": len(prompts) * tokens / seconds, "texts": [each[0].text for each in found]}


@contextmanager
def server(model: str, *arguments: str):
    """A server that is ready: its address and process."""
    command = [sys.executable, "-m", "bdh", "serve", model, "--port", "0", "--engine.max_running", str(STATES)]
    settings = ["--engine.prefix_cache_bytes", "0", "--served_model_name", "served", "--metrics", "true"]
    process = subprocess.Popen([*command, *settings, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        url = None
        for line in process.stderr:
            facts = json.loads(line) if line.startswith("{") else {}
            url = facts.get("url", url)
            if facts.get("event") == "ready":
                break
        else:
            raise SystemExit("the server has not started")
        drained = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # its log
        yield url, process
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            raise SystemExit(f"the server ended with status {process.returncode}")
        drained.wait()
    finally:
        process.kill()
        process.wait()


def ask_all(url: str, prompts: list[list[int]], clients: int, tokens: int) -> dict:
    return asyncio.run(_ask_all(url, prompts, clients, tokens))


async def _ask_all(url: str, prompts: list[list[int]], clients: int, tokens: int) -> dict:
    """Each client asks for one text after the other, streamed; who is refused waits as long as it is told.

    Over plain sockets: clients and server share the machine here, and what clients burn is not the server's.
    """
    texts: list[str | None] = [None] * len(prompts)
    first: list[float] = []
    refused = refused_for_good = 0
    waiting = list(enumerate(prompts))[::-1]
    port = int(url.rpartition(":")[2])

    async def client() -> None:
        nonlocal refused, refused_for_good
        while waiting:
            number, prompt = waiting.pop()
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
            for _ in range(20):
                start = time.perf_counter()
                status, seconds, came, lines = await post(port, body)
                if status == 200:
                    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
                    texts[number] = "".join(chunk["choices"][0]["text"] for chunk in chunks)
                    first.append(came - start)
                    break
                if status != 429:
                    raise SystemExit(f"the server answered {status}: {lines}")
                refused += 1
                await asyncio.sleep(seconds)
            else:
                refused_for_good += 1

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - start
    answered = sum(text is not None for text in texts)
    return {
        "texts": texts,
        "first": first,
        "answered": answered,
        "refused": refused,
        "refused_for_good": refused_for_good,
        "tokens_per_s": answered * tokens / seconds,
    }


async def post(port: int, body: dict) -> tuple[int, float, float, list[bytes]]:
    """Status, Retry-After, when the first event came, and the lines of the answer."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n" % len(content) + content
    )
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    wait = re.search(rb"retry-after: (\d+)", head, re.IGNORECASE)
    found = await reader.read(65536)
    came = time.perf_counter()
    while piece := await reader.read(65536):
        found += piece
    writer.close()
    return status, float(wait[1]) if wait else 5.0, came, found.splitlines()


def abuse(model: str, clients: int) -> dict:
    """Gauges and memory before and after clients that behave badly."""
    with server(model) as (url, process):
        measured = psutil.Process(process.pid)
        port = int(url.rpartition(":")[2])
        in_process(ask_all, url, prompts_of(40), 32, 8)  # what is taken once is taken
        before = measured.memory_info().rss
        in_process(misbehave, port, clients)
        deadline = time.monotonic() + 30
        while (left := gauges(url)) and time.monotonic() < deadline:
            time.sleep(0.1)
        in_process(ask_all, url, prompts_of(40), 32, 8)
        after = measured.memory_info().rss
        alive = process.poll() is None
    growth = after / before - 1
    print(f"{clients} clients that leave, send slowly, or send garbage")
    print(f"  the server            {'answers as before' if alive else 'has ended'}")
    print(f"  gauges above 0        {left or 'none'}")
    print(
        f"  memory                {before / 2**20:,.1f} MiB before, {after / 2**20:,.1f} MiB after: {100 * growth:+.1f} %"
    )
    return {"alive": alive, "gauges_above_0": left, "memory_before": before, "memory_after": after, "growth": growth}


def gauges(url: str) -> dict[str, float]:
    """Those that are not back at 0."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        match = re.match(r"bdh:(num_requests_running|num_requests_waiting|state_bytes_in_use)\{.*\} (.*)", line)
        if match and float(match[2]):
            found[match[1]] = float(match[2])
    return found


def misbehave(port: int, clients: int) -> None:
    draw = random.Random(1)
    body = json.dumps({"prompt": "abc", "max_tokens": 4000, "stream": True}).encode()
    whole = json.dumps({"prompt": "abc", "max_tokens": 4000}).encode()

    async def one() -> None:
        kind = draw.choice(["stream", "whole", "slow", "garbage", "half"])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            sent = whole if kind == "whole" else body
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            head += b"Content-Length: %d\r\n\r\n" % len(sent)
            if kind == "garbage":
                writer.write(draw.randbytes(draw.randrange(1, 5000)))
            elif kind == "slow":
                for byte in (head + sent)[: draw.randrange(10, 200)]:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.005)
            else:
                writer.write(head + sent)
            await writer.drain()
            if kind == "half":
                writer.write_eof()
            await asyncio.sleep(draw.random() * 2)
            if draw.random() < 0.5:  # with a reset
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def all_of_them() -> None:
        at_once = asyncio.Semaphore(50)

        async def guarded() -> None:
            async with at_once:
                await one()

        await asyncio.gather(*(guarded() for _ in range(clients)))

    asyncio.run(all_of_them())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
