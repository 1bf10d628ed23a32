"""Runs a server: the socket, loading the model, signals, and the exit status."""

import asyncio
import contextlib
import hashlib
import logging
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import uvicorn

from bdh.generate.async_engine import AsyncEngine
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.model.network import ModelParts
from bdh.serve.app import make_app
from bdh.serve.completions import finish_unfinished
from bdh.serve.config import ServeSettings, check_telemetry, listen
from bdh.serve.connections import Connections, Server
from bdh.serve.middleware import ApiKeys, log, log_to_stderr
from bdh.serve.service import Loaded, Service
from bdh.serve.states import StateStore
from bdh.serve.text import ChatPrompts, TokenNames
from bdh.tokenizer import PlainTokenizer, TextEncoder

LoadModel = Callable[[], tuple[ModelParts, Any]]
_CHECK_SECONDS = 0.5
_OTHER_FILES = 128  # besides connections: the model, the log, states, and connections that are ending


def load(settings: ServeSettings, load_model: LoadModel) -> Loaded:
    """Loads everything that requests need, except what is compiled with the first request.

    Raises:
        FileNotFoundError, ValueError: the model cannot be loaded, or a setting does not fit it.
    """
    model, loaded = load_model()
    tokenizer = PlainTokenizer.of(loaded)
    engine = Engine(model, tokenizer, config=settings.engine)
    chat = ChatPrompts(tokenizer, settings.chat_template, settings.chat_stop)
    encoding = hashlib.sha256(f"{TextEncoder(tokenizer).hash}{tokenizer.chat_template}".encode()).hexdigest()
    states = StateStore(settings.states, model, tokenizer=encoding)
    names = list(settings.served_model_name) or [settings.model.rstrip("/").rpartition("/")[2]]
    return Loaded(model, tokenizer, AsyncEngine(engine), chat, TokenNames(tokenizer), states, names)


def serve(settings: ServeSettings, load_model: LoadModel, *, last_step_seconds: float = 5.0) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit status: 0, or 1 if loading the model or the engine failed.

    Args:
        settings: the settings.
        load_model: returns the model and its tokenizer.
        last_step_seconds: the time that the engine has at the end for its current step, whose result is not needed.

    Raises:
        ValueError, OSError: a setting is out of range, telemetry has no destination, the keys cannot be read, or the
            server cannot listen on the address.
    """
    settings.validated()
    check_telemetry(settings.telemetry)
    log_to_stderr(settings.log_format)
    keys = ApiKeys(settings.auth)
    with listen(settings.host, settings.port) as listening:
        return asyncio.run(_run(settings, load_model, keys, listening, last_step_seconds))


def uvicorn_config(service: Service, keys: ApiKeys) -> uvicorn.Config:
    """Returns the settings of uvicorn for the application."""
    settings = service.settings
    return uvicorn.Config(
        make_app(service, keys),
        http=Connections(settings.limits, service.answered).new,  # type: ignore[arg-type]  # called like a class
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on" if settings.telemetry else "off",  # it starts and ends the exporters
        server_header=False,
        timeout_keep_alive=settings.limits.keep_alive_timeout,  # type: ignore[arg-type]  # a float works too
        h11_max_incomplete_event_size=settings.limits.head_bytes,
    )


def _allow_open_files(connections: int) -> None:
    """Raises the process's limit of open files to what this many connections need, as far as the system allows."""
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        needs = f"limits.connections is {connections}, for which the process needs {needed} open files"
        log(f"{needs}: it may open only {hard}", level=logging.WARNING)


async def _run(
    settings: ServeSettings, load_model: LoadModel, keys: ApiKeys, listening: socket.socket, last_step_seconds: float
) -> int:
    _allow_open_files(settings.limits.connections)
    service = Service(settings)
    server = Server(uvicorn_config(service, keys))
    host, port = listening.getsockname()[:2]
    log("listening", url=f"http://{host}:{port}", keys=keys.are_needed)
    if not keys.are_needed and host not in ("127.0.0.1", "::1"):
        log("open to the network without API keys: anyone who can reach the server may use it", level=logging.WARNING)

    ending, forced, is_signalled = asyncio.Event(), asyncio.Event(), False

    def end() -> None:
        nonlocal is_signalled
        if is_signalled:
            server.force_exit = True
            forced.set()
        service.refuse()  # before the line below is logged, since its reader may send a request at once
        if not is_signalled:
            log("ending", drain_timeout=settings.drain_timeout)
        is_signalled = True
        ending.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, _reload, keys)

    serving = asyncio.create_task(server.serve([listening]))
    loading = asyncio.create_task(_load(service, settings, load_model))
    checking = asyncio.create_task(_check_engine(service, ending))
    await asyncio.wait({asyncio.create_task(ending.wait()), serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        service.failure = service.failure or serving.exception() or RuntimeError("the server could not start")
    # A failed engine cannot finish requests.
    draining = asyncio.create_task(service.drain(settings.drain_timeout if service.failure is None else 0))
    forcing = asyncio.create_task(forced.wait())
    await asyncio.wait({draining, forcing}, return_when=asyncio.FIRST_COMPLETED)
    if draining.done():
        log("drained", cut_off=draining.result())
    server.should_exit = True
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(serving, 10)
    for task in (loading, checking, draining, forcing):
        task.cancel()
    loaded = service.loaded if service.failure is None else None  # otherwise its thread may hang
    if loaded is not None and not await asyncio.to_thread(loaded.engine.close, last_step_seconds):
        log("the engine did not finish its step in time, and was abandoned", level=logging.WARNING)
    if service.failure is not None:
        log("ended by a failure", level=logging.ERROR, reason=str(service.failure))
        return 1
    log("ended")
    return 0


async def _load(service: Service, settings: ServeSettings, load_model: LoadModel) -> None:
    try:
        loaded = await asyncio.to_thread(load, settings, load_model)
        # In the engine's own thread: OpenMP creates a team for each thread that calls the kernels. With more threads than
        # cores, all of them wait passively, which costs a tenth of the speed.
        await loaded.engine.generate([0], SamplingParams(max_tokens=2, ignore_eos=True))
    except Exception as error:
        known = isinstance(error, ValueError | OSError)
        log(f"the model cannot be served: {error}", level=logging.ERROR, error=None if known else error)
        service.status, service.failure = "failed", error
        return
    service.open(loaded)
    engine = loaded.engine.engine
    log(
        "ready",
        models=loaded.model_names,
        runs=engine.advancer.description,
        threads=torch.get_num_threads(),
        states=engine.max_sequences,
        state_bytes=engine.advancer.state_bytes,
        chat=loaded.chat.template is not None,
    )
    if settings.resume_on_restart:
        await finish_unfinished(loaded)


async def _check_engine(service: Service, ending: asyncio.Event) -> None:
    """Ends the server if its engine has failed."""
    while not ending.is_set():
        service.check_engine()
        if service.status == "failed":
            log("the engine has failed", level=logging.ERROR, reason=str(service.failure))
            await asyncio.sleep(_CHECK_SECONDS)  # so that waiting clients get an error
            ending.set()
        await asyncio.sleep(_CHECK_SECONDS)


def _reload(keys: ApiKeys) -> None:
    try:
        keys.load()
        log("API keys reloaded")
    except (ValueError, OSError) as error:
        log(f"the API keys were not reloaded: {error}", level=logging.ERROR)
