"""A server beside clients that never finish their requests: what they are answered, its memory, and how others fare.

    python benchmarks/slow_clients.py MODEL [--megabytes 300] [--headers 1000000] [--half_sent 200]

One header without end, headers without number, and connections that send half of a request and then a byte now and then.
Meanwhile a client asks for texts. The server is a process of its own, with its default limits.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from statistics import median

import httpx
import psutil

MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--headers", type=int, default=1_000_000)
    parser.add_argument("--half_sent", type=int, default=200)
    settings = parser.parse_args()
    command = [sys.executable, "-m", "bdh", "serve", settings.model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = 0
        for line in process.stderr:
            facts = json.loads(line) if line.startswith("{") else {}
            if facts.get("event") == "listening":
                port = int(facts["url"].rpartition(":")[2])
            if facts.get("event") == "ready":
                break
        asyncio.run(attack(port, process, settings))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        print(f"  {'the server':24}ended with status {process.wait(60)}")
    return 0


async def attack(port: int, process: subprocess.Popen, settings: argparse.Namespace) -> None:
    # Its log is read on, or it would wait for a reader.
    reading = asyncio.create_task(asyncio.to_thread(process.stderr.read))
    memory = psutil.Process(process.pid).memory_info
    await normal_client(port, 20)
    before, most, done = memory().rss, 0, asyncio.Event()

    async def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, memory().rss)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    alone = await normal_client(port, 100)
    meanwhile = asyncio.create_task(normal_client(port, None, done))
    start, piece = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"a" * MIB
    long = await send(port, [start + b"X-Long: ", *[piece] * settings.megabytes])
    field = b"X-Many: 1\r\n"
    many = await send(port, [start, *[field * 1000] * (settings.headers // 1000)])
    slow = await asyncio.gather(*(trickle(port, start) for _ in range(settings.half_sent)))
    done.set()
    times = await meanwhile
    await watching
    statuses = ", ".join(f"{count} times {status}" for status, count in Counter(status for status, _ in slow).items())
    after = memory().rss
    for name, value in (
        (f"{settings.megabytes} MiB in a header", f"{long[0]} after {long[1] / MIB:.1f} MiB were sent"),
        (f"{settings.headers:,} headers", f"{many[0]} after {many[1] / MIB:.1f} MiB were sent"),
        (f"{settings.half_sent} half-sent requests", f"{statuses}, after {max(each for _, each in slow):.1f} s"),
        ("memory", f"{before / MIB:,.1f} MiB before, {most / MIB:,.1f} at most, {after / MIB:,.1f} after"),
        ("another client", f"{len(times)} texts, median {1000 * median(times):.0f} ms, at most {max(times):.2f} s"),
        (
            "the same one before",
            f"{len(alone)} texts, median {1000 * median(alone):.0f} ms, at most {max(alone):.2f} s",
        ),
    ):
        print(f"  {name:24}{value}")
    process.send_signal(signal.SIGTERM)
    await reading


async def normal_client(port: int, count: int | None, done: asyncio.Event | None = None) -> list[float]:
    """Seconds of each of its requests, one after the other, each over a new connection."""
    times: list[float] = []
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0}
    while len(times) < count if count is not None else not (done is None or done.is_set()):
        start = time.perf_counter()
        async with httpx.AsyncClient(timeout=60) as client:
            (await client.post(f"http://127.0.0.1:{port}/v1/completions", json=body)).raise_for_status()
        times.append(time.perf_counter() - start)
    return times


async def send(port: int, pieces: list[bytes]) -> tuple[int | str, int]:
    """The status that comes while all of this is sent, and the bytes that the server has let through until then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answering = asyncio.create_task(reader.readline())
    sent = 0
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
            if answering.done():
                break
    except ConnectionError:
        pass
    return await status_of(answering), sent


async def trickle(port: int, head: bytes) -> tuple[int | str, float]:
    """The status that half of a request gets, of which a byte comes each half second, and the seconds until then."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"X-Slow: ")
    answering = asyncio.create_task(reader.readline())
    while not answering.done():
        writer.write(b"a")
        await asyncio.wait({answering}, timeout=0.5)
    seconds = time.perf_counter() - start
    writer.close()
    return await status_of(answering), seconds


async def status_of(answering: "asyncio.Task[bytes]") -> int | str:
    try:
        line = await asyncio.wait_for(answering, 30)
    except ConnectionError:
        return "reset"
    return int(line.split()[1]) if line else "closed"


if __name__ == "__main__":
    sys.exit(main())
