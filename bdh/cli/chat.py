"""bdh chat: a conversation in the terminal, or over a pipe: a message a line."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh.cli.models import ModelSettings, load_for_generation
from bdh.cli.output import print_error, show_kept
from bdh.cli.settings import command, verbatim
from bdh.generate.params import DrawSettings, EngineConfig, SamplingParams
from bdh.ops import StateFormat, StepPath, WeightFormat
from bdh.storage import check_file
from bdh.validation import NonNegativeInt, PathText, PositiveInt
from bdh.words import counted, nearest

if TYPE_CHECKING:
    from bdh.generate.chat import Conversation

_PROMPT = "> "
_PIECE_TOKENS = 256
_HISTORY_LINES = 1000
# Control characters, which could move the cursor or change colours. A byte-level model can generate them.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(kw_only=True)
class ChatSettings(ModelSettings, DrawSettings):
    max_tokens: PositiveInt = 500
    """Largest number of tokens in a reply."""
    system: str | None = verbatim(None)
    """System message, which tells the model how to answer. Without a chat template, it is text in front of everything."""
    load: PathText | None = None
    """Continue a conversation from a file that /save wrote."""
    plain: bool = False
    """Continue the typed text, even if the tokenizer has a chat template."""
    max_undo_bytes: NonNegativeInt = 1 << 30
    """Memory for the states that /undo restores, one for each turn; the oldest are dropped."""
    path: StepPath = "auto"
    """Implementation of the steps: kernels (sparse, on the CPU), torch, or auto: the kernels if they can run."""
    window: PositiveInt | None = None
    """Attend only to this many last tokens, for models that were trained on short blocks. None: to all."""
    weights: WeightFormat = "float32"
    """Format of the kernels' weights, as engine.weights of bdh generate."""
    state: StateFormat | None = None
    """Format of the kernels' state. None: what the model recommends, else float32."""

    def check_available(self) -> None:
        super().check_available()
        if self.load is not None:
            check_file(Path(self.load).expanduser(), "snapshot file")

    def params(self) -> SamplingParams:
        drawing = {each.name: getattr(self, each.name) for each in fields(DrawSettings)}
        return SamplingParams(max_tokens=self.max_tokens, **drawing)

    def engine(self) -> EngineConfig:
        """Returns the settings of an engine for one sequence.

        Prompts are read in pieces, so that an interruption takes effect after the current piece.
        """
        how = {name: getattr(self, name) for name in ("path", "window", "weights", "state")}
        return EngineConfig(**how, max_running=1, tokens_per_step=_PIECE_TOKENS)


@command("model")
def run_chat(settings: ChatSettings) -> int:
    """Chat with a model in the terminal. If its tokenizer has no chat template, write a text together."""
    from bdh.generate.chat import Conversation
    from bdh.generate.engine import Engine

    model, tokenizer = load_for_generation(settings)
    show_kept()
    conversation = Conversation(
        Engine(model, tokenizer, config=settings.engine()),
        settings.params(),
        system=settings.system,
        plain=settings.plain,
        max_undo_bytes=settings.max_undo_bytes,
        notify=_tell,
    )
    session = Session(conversation)
    if settings.load is not None:
        session.load(settings.load)
    session.introduce(settings.model)
    return session.run()


class Session:
    """Reads lines from the standard input, and writes replies to the standard output.

    Everything else is written to the standard error.
    """

    def __init__(self, conversation: "Conversation"):
        self.conversation = conversation
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._failed = False
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/help": ("", "show this list", self._help),
            "/temp": ("X", "temperature; 0 always takes the likeliest token", self._setter("temperature", float)),
            "/top_k": ("K", "sample only from the K likeliest tokens; 0: from all", self._setter("top_k", int)),
            "/top_p": ("P", "sample from the likeliest tokens of total probability P", self._setter("top_p", float)),
            "/max_tokens": ("N", "largest number of tokens in a reply", self._setter("max_tokens", int)),
            "/seed": ("S", "seed of the next replies; none: no fixed seed", self._seed),
            "/system": ("TEXT", 'set the system message, "" for none; messages are read again after it', self._system),
            "/reset": ("", "forget the conversation", self._reset),
            "/save": ("FILE", "save the conversation to a file", self._save),
            "/load": ("FILE", "continue a saved conversation", self.load),
            "/undo": ("", "take back the last turn", self._undo),
            "/stats": ("", "show tokens, speed and the state", self._stats),
            "/quit": ("", "end, like Ctrl-D", lambda value: None),
        }

    def introduce(self, name: str) -> None:
        advancer = self.conversation.engine.advancer
        _tell(f"  model      {name}")
        _tell(f"  runs       {advancer.description}")
        _tell(f"  mode       {self._mode()}")
        _tell(f"  memory     a state of {advancer.state_bytes:,} bytes, at any length of the conversation")
        if self.is_terminal:
            _tell("/help lists the commands; Ctrl-C stops a reply, Ctrl-D ends")

    def run(self) -> int:
        """Runs until the input ends. Returns the exit status: 2 if a line of piped input failed, otherwise 0."""
        for stream, settings in ((sys.stdin, {"errors": "surrogateescape"}), (sys.stdout, {"errors": "replace"})):
            if hasattr(stream, "reconfigure"):  # a replaced stream may not have it
                stream.reconfigure(**settings)
        with _history() if self.is_terminal else nullcontext():
            for line in self._typed() if self.is_terminal else sys.stdin:
                if line.split()[:1] == ["/quit"]:
                    break
                try:
                    self._take(line.rstrip("\r\n"))
                except BrokenPipeError:  # the reader of the replies is gone
                    raise
                except (ValueError, OSError) as error:
                    self._failed = True
                    print_error(str(error))
                except KeyboardInterrupt:
                    if not self.is_terminal:
                        raise
                    _tell("interrupted: nothing was done")
        return 2 if self._failed and not self.is_terminal else 0

    def _typed(self) -> Iterator[str]:
        """Yields lines from the terminal. A single Ctrl-C at the prompt may be a slip; a second one ends the input."""
        slips = 0
        while True:
            try:
                line = input(_PROMPT)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                slips += 1
                if slips == 2:
                    return
                _tell("Ctrl-C again, Ctrl-D or /quit ends the conversation")
                continue
            slips = 0
            yield line

    def _take(self, line: str) -> None:
        try:
            line.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the line is not UTF-8 from character {error.start + 1} on: it was ignored") from error
        if line.startswith("//"):
            self._say(line[1:])
        elif line.startswith("/"):
            self._command(*line.partition(" ")[::2])
        elif line or self.conversation.is_plain:
            self._say(line)

    def _say(self, text: str) -> None:
        num_messages = len(self.conversation.messages)
        pieces = self.conversation.say(text)
        ended_by_ctrl_c = False

        def stop(*_: object) -> None:
            nonlocal ended_by_ctrl_c
            if ended_by_ctrl_c:  # the second one ends the reply at once, and undoes the turn
                raise KeyboardInterrupt
            ended_by_ctrl_c = True
            self.conversation.interrupt()

        before = signal.signal(signal.SIGINT, stop)
        try:
            for piece in pieces:
                sys.stdout.write(piece.translate(_CONTROLS) if self.is_terminal else piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
        finally:
            signal.signal(signal.SIGINT, before)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if len(self.conversation.messages) == num_messages:
            _tell("stopped before the reply: the message is taken back")
        elif ended_by_ctrl_c:
            _tell("stopped: what was written stays in the conversation")

    def _command(self, name: str, value: str) -> None:
        if name not in self._commands:
            near = nearest(name, self._commands, 0.5)
            hint = f"did you mean {near}?" if near else "/help lists them."
            raise ValueError(f"{name} is not a command: {hint} A message that begins with a slash gets two")
        takes, _, function = self._commands[name]
        value = value.strip()
        if value and not takes:
            raise ValueError(f"{name} takes no value, and was given {value!r}: nothing was done")
        if not value and takes == "FILE":
            raise ValueError(f"{name} is given without a file: {name} FILE")
        function(value)

    def _help(self, value: str) -> None:
        _tell(f"This is {self._mode()}.")
        for name, (takes, about, _) in self._commands.items():
            _tell(f"  {f'{name} {takes}':<16}{about}")
        _tell("  //...           a message that begins with a slash")
        _tell("Without its value a command shows the present one. Ctrl-C stops a reply, Ctrl-D ends.")

    def _mode(self) -> str:
        if self.conversation.is_plain:
            return "plain continuation: what you type is put after the text, and an empty line continues it"
        return "a conversation: each line is a message, put into the tokenizer's chat template"

    def _setter(self, name: str, convert: Callable[[str], Any]) -> Callable[[str], None]:
        def set_it(value: str) -> None:
            conversation = self.conversation
            if value:
                conversation.set_params(**{name: _number(name, value, convert)})
            _tell(f"{name} is {getattr(conversation.params, name)}")

        return set_it

    def _seed(self, value: str) -> None:
        if value:
            self.conversation.set_seed(None if value == "none" else _number("seed", value, int))
        seed = self.conversation.params.seed
        _tell(f"seed is {'none' if seed is None else seed}")

    def _system(self, value: str) -> None:
        if value:
            self.conversation.set_system(None if value == '""' else value)
            if self.conversation.messages:
                _tell("what was said before is read again after it, with the next message")
        system = self.conversation.system
        _tell("there is no system message" if system is None else f"the system message is {system!r}")

    def _reset(self, value: str) -> None:
        self.conversation.reset()
        _tell("all is forgotten" + ("" if self.conversation.system is None else " but the system message"))

    def _save(self, value: str) -> None:
        from bdh.generate.snapshot import is_snapshot

        path = Path(value).expanduser()
        if path.exists() and not is_snapshot(path):
            raise FileExistsError(
                f"{path} exists and is not a saved conversation: it was left unchanged, choose another name"
            )
        self.conversation.save(path)
        _tell(f"{path}: {counted(len(self.conversation.messages), 'message')}, {path.stat().st_size:,} bytes")

    def load(self, value: str) -> None:
        conversation = self.conversation
        conversation.load(Path(value).expanduser())
        messages = conversation.messages
        _tell(f"{value}: {counted(len(messages), 'message')}, at position {conversation.position:,}")
        for message in messages[-2:]:
            _tell(f"  {message['role']}: {_shortened(message['content'])}")

    def _undo(self, value: str) -> None:
        user, _ = self.conversation.undo()
        more = counted(self.conversation.num_undoable, "more turn")
        _tell(f"taken back: {_shortened(user['content'])} ({more} can be taken back)")

    def _stats(self, value: str) -> None:
        conversation, stats, advancer = self.conversation, self.conversation.stats, self.conversation.engine.advancer
        for what, num_tokens, seconds in (
            ("read", stats.tokens_read, stats.seconds_reading),
            ("written", stats.tokens_written, stats.seconds_writing),
        ):
            speed = f", {num_tokens / seconds:,.0f} tokens/s" if num_tokens and seconds else ""
            _tell(f"  {what:<10} {counted(num_tokens, 'token')} in {seconds:.1f} s{speed}")
        _tell(f"  state      {advancer.state_bytes:,} bytes, at position {conversation.position:,}")
        turns = len(conversation.messages) // 2
        _tell(f"  turns      {turns}, of which the last {conversation.num_undoable} can be taken back")
        _tell(f"  runs       {advancer.description}")


def _number(name: str, value: str, convert: Callable[[str], Any]) -> Any:
    try:
        return convert(value)
    except ValueError:
        kind = "a whole number" if convert is int else "a number"
        raise ValueError(f"{name} is {value!r}: must be {kind}") from None


def _shortened(text: str) -> str:
    text = " ".join(text.translate(_CONTROLS).split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _history() -> Iterator[None]:
    """A context in which the arrow keys recall typed lines, including those of earlier sessions.

    It has no effect without readline.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    state_home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state_home).expanduser() / "bdh" / "chat_history"
    readline.set_history_length(_HISTORY_LINES)
    try:
        if path.exists():
            readline.read_history_file(path)
    except OSError as error:
        _tell(f"the history of earlier lines cannot be read: {error}")
    try:
        yield
    finally:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
        except OSError as error:
            _tell(f"the history of these lines cannot be stored: {error}")
