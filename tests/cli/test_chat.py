"""bdh chat: over a pipe, in a terminal, and what its commands do with right and wrong input."""

import fcntl
import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.cli.chat import ChatSettings
from bdh.cli.main import main
from bdh.cli.settings import parse_settings
from bdh.generate.advance import Advancer
from bdh.generate.chat import Conversation
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.tokenizer import byte_tokenizer, with_chat_template
from bdh.train.export import export_model
from bdh.train.models import load_model


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    """An exported model of random weights whose tokenizer has a chat template."""
    torch.manual_seed(7)
    tokenizer = with_chat_template(byte_tokenizer(), "default", needs_one=True)
    config = BDHConfig(
        vocab_size=260, n_embd=16, n_layer=2, n_head=2, mlp_internal_dim_multiplier=8, initializer_range=0.3
    )
    folder = tmp_path_factory.mktemp("models") / "chat"
    export_model(BDHForCausalLM(config), tokenizer, folder, "# A model\n")
    return folder


@pytest.fixture(autouse=True)
def state_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def chat(chat_folder, monkeypatch, capsys):
    """Runs the command over lines of input; returns its status, the replies and what else was said."""

    def run(lines, *argv, folder=chat_folder, flags=("--seed", 1, "--max_tokens", 6)):
        content = lines if isinstance(lines, bytes) else "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        status = main(["chat", str(folder), *map(str, flags), *map(str, argv)])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def replies(folder, texts, **settings) -> list[str]:
    model, tokenizer = load_model(str(folder))
    params = SamplingParams(**{"seed": 1, "max_tokens": 6, **settings})
    conversation = Conversation(Engine(model, tokenizer), params)
    return ["".join(conversation.say(text)) for text in texts]


def test_piped_lines_are_messages_and_only_replies_are_printed(chat, chat_folder):
    texts = ["Hi", "what is ü?", "/not a command"]
    status, out, err = chat(["Hi", "what is ü?", "", "//not a command"])
    assert status == 0
    assert out == "".join(f"{reply}\n" for reply in replies(chat_folder, texts))
    assert "mode       a conversation" in err
    assert f"runs       {Advancer(load_model(str(chat_folder))[0]).description}" in err


def test_without_a_template_the_text_goes_on(chat, model_folder, chat_folder):
    _, out, err = chat(["The ", ""], folder=model_folder)
    assert out == "".join(f"{reply}\n" for reply in replies(model_folder, ["The ", ""]))
    assert "mode       plain continuation" in err
    assert "mode       plain continuation" in chat(["The "], "--plain", folder=chat_folder)[2]
    status, out, err = chat([""], folder=model_folder)
    assert (status, out) == (2, "")
    assert "error: the prompt is empty" in err


def test_settings_reach_the_sampling(chat, chat_folder):
    _, out, _ = chat(["Hi"], "--temperature", 0, "--top_k", 3)
    assert out == replies(chat_folder, ["Hi"], temperature=0)[0] + "\n"
    _, changed, err = chat(["/temp 0", "/max_tokens 9", "/top_k 5", "/top_p 0.5", "/seed 4", "Hi"])
    assert changed == replies(chat_folder, ["Hi"], temperature=0, max_tokens=9)[0] + "\n"
    for line in ("temperature is 0.0", "max_tokens is 9", "top_k is 5", "top_p is 0.5", "seed is 4"):
        assert f"\n{line}\n" in err
    assert chat(["/seed 4", "Hi"])[1] == replies(chat_folder, ["Hi"], seed=4)[0] + "\n"
    assert "\nseed is none\n" in chat(["/seed none"])[2]


def test_undo_reset_and_the_system_message(chat, chat_folder):
    first, second = replies(chat_folder, ["Hi", "1"])
    status, out, err = chat(["Hi", "1", "/undo", "1", "/reset", "Hi", "/undo", "/undo", "Hi"])
    assert out.split("\n") == [*f"{first}\n{second}\n{second}\n{first}\n{first}\n".split("\n")]
    assert "taken back: 1 (1 more turn can be taken back)" in err
    assert "error: there is no turn to undo" in err
    assert status == 2
    _, out, err = chat(["Hi", "/system Be brief.", "/reset", "Hi", '/system ""', "/reset", "Hi"])
    shown = out.split("\n")
    assert (shown[0], shown[2]) == (first, first)
    assert shown[1] != first
    assert "the system message is 'Be brief.'" in err
    assert "all is forgotten but the system message" in err
    assert "there is no system message" in err
    assert chat(["Hi"], "--system", "Be brief.")[1] == f"{shown[1]}\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/tmep 1", "/tmep is not a command: did you mean /temp? A message that begins with a slash gets two"),
        ("/xyzzy", "/xyzzy is not a command: /help lists them."),
        ("/temp hot", "temperature is 'hot': must be a number"),
        ("/temp -1", "temperature is -1.0: must be 0 (greedy) or above"),
        ("/temp 1e999", "temperature is inf: must be a finite number"),
        ("/temp nan", "temperature is nan: must be a finite number"),
        ("/top_k 1.5", "top_k is '1.5': must be a whole number"),
        ("/top_p 2", "top_p is 2.0: must be above 0, up to 1"),
        ("/max_tokens 0", "max_tokens is 0: must be at least 1 token"),
        ("/seed x", "seed is 'x': must be a whole number"),
        (f"/seed {2**64}", f"seed is {2**64}: must be from -2**63 to 2**64 - 1"),
        ("/reset now", "/reset takes no value, and was given 'now': nothing was done"),
        ("/save", "/save is given without a file: /save FILE"),
        ("/load nowhere", "there is no snapshot file nowhere"),
        ("/save nowhere/file", "there is no folder nowhere for the snapshot file"),
    ],
)
def test_wrong_commands_get_one_line_and_nothing_is_lost(chat, chat_folder, line, told):
    status, out, err = chat(["Hi", line, "1"])
    (error,) = [each for each in err.splitlines() if each.startswith("error")]
    assert error.startswith(f"error: {told}")
    assert out == "".join(f"{reply}\n" for reply in replies(chat_folder, ["Hi", "1"]))
    assert status == 2


def test_a_line_that_is_no_utf8_is_refused_and_the_next_one_read(chat, chat_folder):
    status, out, err = chat(b"Hi\nab\xffc\n1")
    assert "error: the line is not UTF-8 from character 3 on: it was ignored" in err
    assert out == "".join(f"{reply}\n" for reply in replies(chat_folder, ["Hi", "1"]))
    assert status == 2


def test_help_and_stats_say_where_we_are(chat):
    _, _, err = chat(["Hi", "1", "/help", "/stats", "/quit", "not read"])
    for command in ("help", "temp X", "top_k K", "top_p P", "max_tokens N", "seed S", "system TEXT", "reset",
                    "save FILE", "load FILE", "undo", "stats", "quit"):  # fmt: skip
        assert f"\n  /{command} " in err
    assert "This is a conversation: each line is a message" in err
    # 5 tokens of each message, the end of the first reply, and its last token, which was still to be read
    assert "read       11 tokens in" in err
    assert "written    " in err
    assert "bytes, at position 21" in err
    assert "turns      2, of which the last 2 can be taken back" in err


@pytest.mark.slow
def test_a_conversation_goes_on_in_another_process_as_if_it_had_never_stopped(chat_folder, tmp_path):
    def run(flags, *lines):
        done = subprocess.run(
            [sys.executable, "-m", "bdh", "chat", str(chat_folder), "--max_tokens", "12", *flags],
            input="".join(f"{line}\n" for line in lines).encode(),
            capture_output=True,
            check=True,
            timeout=120,
        )
        return done.stdout

    path, rest = tmp_path / "a talk", ("and?", "/temp 0", "on")
    whole = run(["--seed", "3"], "Hi", f"/save {path}", *rest)
    again = run(["--seed", "9"], f"/load {path}", *rest)
    assert len(again) > 12
    assert whole.endswith(again)


def test_a_saved_conversation_keeps_its_draws(chat, tmp_path):
    path = tmp_path / "talk"
    _, whole, _ = chat(["Hi", f"/save {path}", "and?", "on"])
    _, rest, err = chat([f"/load {path}", "and?", "on"], flags=("--seed", 9, "--max_tokens", 6))
    assert whole.endswith(rest)
    assert len(rest.splitlines()) >= 2
    assert f"{path}: 2 messages, at position 10" in err
    assert "  user: Hi\n" in err
    assert chat(["and?", "on"], "--load", path)[1] == rest


def test_files_that_are_no_conversation_are_neither_overwritten_nor_loaded(chat, chat_folder, model_folder, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    _, out, err = chat(["Hi", f"/save {path}", f"/load {path}", "1"])
    assert path.read_text() == "precious"
    assert f"error: {path} exists and is not a saved conversation: it was left unchanged" in err
    assert f"error: {path} is not a complete snapshot file" in err
    assert out == "".join(f"{reply}\n" for reply in replies(chat_folder, ["Hi", "1"]))
    talk = tmp_path / "talk"
    chat(["Hi", f"/save {talk}", "1", f"/save {talk}"])  # over an earlier one
    status, _, err = chat([], "--load", talk, folder=model_folder)
    assert status == 2
    assert "error: " in err
    assert "a snapshot of another model" in err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--temprature", 1], "did you mean temperature?"),
        (["--temperature", -1, "--max_tokens", 0, "--max_undo_bytes", -1], "3 settings are wrong"),
        (["--load", "nowhere"], "there is no snapshot file nowhere"),
        (["--checkpoint", "best"], "is not a run: leave it out"),
    ],
)
def test_wrong_settings_get_status_2_and_say_why(chat, argv, told):
    status, out, err = chat([], *argv, flags=())
    assert (status, out) == (2, "")
    assert told in err


def test_the_shipped_settings_are_valid():
    path = Path(__file__).parent.parent.parent / "configs" / "talk.yaml"
    settings = parse_settings(
        ChatSettings,
        ["MODEL", "--config", str(path)],
        prog="bdh chat",
        description="",
        positionals=("model",),
        check_available=False,  # there is none
    )
    assert settings.model == "MODEL"


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *argv):
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bdh", "chat", *map(str, argv)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def type_ctrl_c_at_prompt(self) -> None:
        self.wait_for("> ")
        # Between the prompt and the wait for keys Python's readline overlooks a signal, until the next key.
        time.sleep(0.5)
        self.type("\x03")

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What is shown up to and with a text; the next call looks behind it."""
        while text not in self.shown:
            self._read(f"{text!r}", seconds)
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_characters(self, count: int) -> None:
        while len(self.shown) < count:
            self._read(f"{count} characters", 60)

    def _read(self, awaited: str, seconds: float) -> None:
        is_there, _, _ = select.select([self._ours], [], [], seconds)
        assert is_there, f"{awaited} did not come: {self.shown[-500:]!r}"
        try:
            new = os.read(self._ours, 4096)
        except OSError:  # the other end is closed
            new = b""
        assert new, f"it ended before {awaited}: {self.shown[-500:]!r}"
        self.shown += new.decode(errors="replace")

    def status(self) -> int:
        return self._process.wait(60)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    opened = []

    def make(*argv) -> Terminal:
        opened.append(Terminal(*argv))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.mark.slow
def test_ctrl_c_stops_a_reply_and_not_the_program(model_folder, terminal, tmp_path):
    screen = terminal(model_folder, "--seed", 1, "--max_tokens", 10**7)  # of bytes, which never ends by itself
    screen.wait_for("Ctrl-D ends")
    screen.wait_for("> ")
    screen.type("Hi\n")
    screen.wait_for("Hi\r\n")
    screen.wait_for_characters(40)  # the reply has begun
    screen.type("\x03")
    screen.wait_for("stopped: what was written stays in the conversation")
    screen.wait_for("> ")
    screen.type("/stats\n")
    screen.wait_for("turns      1, of which the last 1 can be taken back")
    screen.wait_for("> ")
    screen.type("/max_tokens 5\n")
    screen.wait_for("max_tokens is 5")
    screen.type("go on\n")
    screen.wait_for("> ")
    screen.type("/stats\n")
    screen.wait_for("turns      2,")
    screen.type_ctrl_c_at_prompt()
    screen.wait_for("Ctrl-C again, Ctrl-D or /quit ends the conversation")
    screen.wait_for("> ")
    screen.type("/seed\n")  # something else in between: the next one is the first again
    screen.wait_for("seed is 1")
    screen.type_ctrl_c_at_prompt()
    screen.wait_for("Ctrl-C again")
    screen.type_ctrl_c_at_prompt()
    assert screen.status() == 0
    history = (tmp_path / "state" / "bdh" / "chat_history").read_text()
    assert all(line in history for line in ("Hi", "/stats", "go on"))
    assert (tmp_path / "state" / "bdh" / "chat_history").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_ctrl_d_ends_and_earlier_lines_come_back_with_the_arrow(chat_folder, terminal):
    flags = ("--max_tokens", 3, "--seed", 1)
    screen = terminal(chat_folder, *flags)
    screen.wait_for("> ")
    screen.type("a line of before\n")
    screen.wait_for("> ")
    screen.type("\x04")
    assert screen.status() == 0
    again = terminal(chat_folder, *flags)
    again.wait_for("> ")
    again.type("\x1b[A\n")
    again.wait_for("a line of before")
    again.wait_for("> ")
    again.type("\x04")
    assert again.status() == 0
