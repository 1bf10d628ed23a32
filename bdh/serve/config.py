"""The settings of a server, and the checks that need neither PyTorch nor FastAPI."""

import errno
import hashlib
import importlib.util
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from bdh.extras import install_command
from bdh.generate.params import EngineConfig
from bdh.text_files import read_text
from bdh.validation import (
    Allowed,
    Faults,
    NonNegativeInt,
    PathText,
    PositiveInt,
    PositiveSeconds,
    Settings,
    Unit,
)
from bdh.words import counted

PLAIN = "plain"
PACKAGES = ("fastapi", "uvicorn", "h11", "prometheus_client")  # of the extra `serve`
_SMALLEST_KEY = 8
_ENDPOINTS = [f"OTEL_EXPORTER_OTLP_{name}ENDPOINT" for name in ("", "TRACES_", "METRICS_")]


@dataclass
class LimitSettings(Settings):
    queue_requests: PositiveInt = 64
    """Number of prompts that may wait for a state; more are refused with 429."""
    queue_tokens: PositiveInt = 1_000_000
    """Number of tokens that the waiting prompts may have together; more are refused with 429."""
    prompt_tokens: PositiveInt = 100_000
    """Largest number of tokens in a prompt."""
    max_tokens: PositiveInt = 16_384
    """Largest number of tokens that a request may ask for."""
    chat_tokens: PositiveInt = 1_024
    """Default max_tokens of chats and responses. For completions it is 16, as in OpenAI's API."""
    prompts: PositiveInt = 64
    """Largest number of prompts in a request."""
    texts: PositiveInt = 16
    """Largest number of texts for each prompt (n or best_of)."""
    embeddings: PositiveInt = 2048
    """Largest number of texts in a request for embeddings."""
    body_bytes: Annotated[int, Ge(1024)] = 4 << 20
    """Largest size of a request's body; a larger one is refused before it is read."""
    body_timeout: PositiveSeconds = 30.0
    """Seconds in which a request's body must arrive."""
    queue_timeout: PositiveSeconds = 60.0
    """Seconds that a prompt may wait for a state."""
    request_timeout: PositiveSeconds = 600.0
    """Seconds from a request's arrival to its last token."""
    connections: PositiveInt = 512
    """Largest number of open connections. A further one replaces the connection that has gone longest without a
    complete request; if all are busy, it is refused with 503."""
    head_bytes: Annotated[int, Ge(1024)] = 64 << 10
    """Largest size of a request's first line and headers; larger ones are refused with 414 or 431."""
    head_fields: PositiveInt = 100
    """Largest number of headers in a request; more are refused with 431."""
    head_timeout: PositiveSeconds = 10.0
    """Seconds in which the headers must arrive."""
    keep_alive_timeout: PositiveSeconds = 30.0
    """Seconds that a connection stays open between two requests."""
    send_timeout: PositiveSeconds = 60.0
    """Seconds in which a client must receive some of its answer."""
    stall_timeout: PositiveSeconds | None = 60.0
    """Seconds without any progress of the engine, within a step or between two, after which the server considers it
    stalled and ends with status 1. null: never."""

    def collect_faults(self, faults: Faults) -> None:
        for name, most in (("chat_tokens", "max_tokens"), ("prompts", "queue_requests")):
            value, limit = getattr(self, name), getattr(self, most)
            faults.require(value <= limit, name, value, f"at most {most}, {limit}")


@dataclass(frozen=True)
class Caller:
    """The owner of a key, or an address if there are no keys."""

    id: str
    """A hash of the key, or the address. Saved states belong to it."""
    name: str
    """The name in the log."""


@dataclass
class AuthSettings(Settings):
    keys_file: PathText | None = None
    """File with an API key in each line, or a name and a key; # begins a comment. SIGHUP reloads it."""
    keys_variable: str = "BDH_API_KEYS"
    """Environment variable with further keys, or names and keys, separated by commas: "alice KEY, bob KEY". If there are
    no keys at all, everyone has access."""
    requests_per_minute: PositiveInt | None = None
    """Limit of requests for each key, or for each address if there are no keys. None: no limit."""
    tokens_per_minute: PositiveInt | None = None
    """Limit of tokens, read and generated, for each key. None: no limit."""

    def callers(self) -> dict[bytes, Caller]:
        """Returns the callers by the SHA-256 digests of their keys, from the file and the environment variable.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: a key is too short or given twice, or the file has no key.
        """
        given = os.environ.get(self.keys_variable, "")
        lines = [(f"the variable {self.keys_variable}", key.strip()) for key in given.split(",")]
        if self.keys_file is not None:
            path = Path(self.keys_file)
            if not path.is_file():
                raise FileNotFoundError(f"auth.keys_file is {str(path)!r}: there is no such file")
            of_file = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
            if not any(of_file):
                raise ValueError(f"{path} has no key: must have at least one, or anyone could use the server")
            lines += [(f"line {number} of {path}", line) for number, line in enumerate(of_file, 1)]
        found: dict[bytes, Caller] = {}
        for place, line in lines:
            if not line:
                continue
            name, _, key = line.rpartition(" ")
            if len(key) < _SMALLEST_KEY:
                raise ValueError(
                    f"the key in {place} has {counted(len(key), 'character')}: must be at least {_SMALLEST_KEY}"
                )
            digest = hashlib.sha256(key.encode()).digest()
            if digest in found:
                raise ValueError(f"the key in {place} is given twice: give it once")
            found[digest] = Caller(digest.hex()[:32], name.strip() or f"key-{digest.hex()[:8]}")
        return found

    def check_available(self) -> None:
        self.callers()


@dataclass
class StateSettings(Settings):
    max_bytes: NonNegativeInt = 2 << 30
    """Memory for saved states. Beyond it, the least recently used are dropped, or kept only on the disk."""
    folder: PathText | None = None
    """Folder for saved states, which then survive a restart. None: memory only."""
    folder_bytes: NonNegativeInt = 20 << 30
    """Largest size of that folder. Beyond it, the least recently used states are deleted."""
    ttl: PositiveSeconds = 24 * 3600.0
    """Seconds after which an unused state is deleted."""
    response_bytes: NonNegativeInt = 64 << 20
    """Memory for the texts of stored responses. Beyond it, the least recently used are dropped; 0: store none."""


@dataclass(kw_only=True)
class ServeSettings(Settings):
    model: PathText
    """Folder of an exported model or a run, or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on: 0.0.0.0 opens the server to the network."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """Port to listen on; 0: any free one."""
    served_model_name: list[Annotated[str, Allowed(bool, "names, not empty")]] = field(default_factory=list)
    """Model names that requests may use; answers contain the first one. By default the last part of model."""
    chat_template: PathText | None = None
    """For a tokenizer without a chat template: plain (User: and Assistant: before each message), or a file. None:
    refuse chats."""
    chat_stop: list[Annotated[str, Allowed(bool, "strings of at least one character")]] = field(default_factory=list)
    """Strings that end every reply of a chat."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(prefix_cache_bytes=1 << 30))
    limits: LimitSettings = field(default_factory=LimitSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
    states: StateSettings = field(default_factory=StateSettings)
    drain_timeout: Annotated[float, Ge(0), Unit("seconds")] = 30.0
    """Seconds that running requests have to finish after SIGTERM."""
    resume_on_restart: bool = False
    """Keep requests that were cut off at the shutdown in states.folder, and finish them after the next start."""
    metrics: bool = False
    """Serve /metrics for Prometheus, without a key."""
    page: bool = True
    """Serve the page at /."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins whose pages may send requests: https://example.org, or * for all. By default only the server's own."""
    log_format: Literal["json", "text"] = "json"
    """Format of the log on the standard error: json (an object in each line) or text."""
    log_prompts: bool = False
    """Log prompts and generated texts."""
    telemetry: bool = False
    """Send OpenTelemetry traces and metrics of FastAPI to OTEL_EXPORTER_OTLP_ENDPOINT."""

    def collect_faults(self, faults: Faults) -> None:
        faults.require(
            not self.resume_on_restart or self.states.folder is not None,
            "resume_on_restart",
            self.resume_on_restart,
            "given with states.folder",
        )

    def check_available(self) -> None:
        super().check_available()
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise ImportError(f"bdh serve needs more packages ({', '.join(missing)}): {install_command('serve')}")
        check_telemetry(self.telemetry)
        if self.chat_template not in (None, PLAIN):
            read_template(Path(str(self.chat_template)))
        listen(self.host, self.port).close()


def check_telemetry(is_wanted: bool) -> None:
    """Raises ``ValueError`` if telemetry is wanted and no environment variable says where to send it."""
    if is_wanted and not any(os.environ.get(name) for name in _ENDPOINTS):
        raise ValueError(f"telemetry is true, but its endpoint is not set: set {_ENDPOINTS[0]}")


def read_template(path: Path) -> str:
    """Returns the text of the file ``chat_template``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"chat_template is {str(path)!r}: there is no such file; {PLAIN!r} is the plain form")
    return read_text(path)


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
        OSError: the address is in use, does not belong to this machine, or is not allowed.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=1024)
        # Connections inherit this. Without it, an answer waits 40 ms for the client to acknowledge its headers.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = "another program uses this port: choose another with --port N, or a free one with --port 0"
        raise OSError(f"cannot listen on {host}:{port}: {reason}") from error
