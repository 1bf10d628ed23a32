"""What clients really send, over two turns: bodies recorded from them, with the reply appended as each of them does it."""

import json
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parent.parent / "fixtures" / "client_bodies.json"
BODIES = json.loads(FIXTURE.read_text(encoding="utf-8"))
REPLY = "A first reply."  # what the recorded first turns were answered


def prompt_of(body) -> str:
    """What the model is to read, written down apart from the server's own template."""
    if "prompt" in body:
        return body["prompt"]
    text = ""
    for message in body["messages"]:
        content = message.get("content") or ""
        said = content if isinstance(content, str) else "".join(part["text"] for part in content)
        text += {"system": "{}\n\n", "user": "User: {}\n", "assistant": "Assistant: {}\n"}[message["role"]].format(said)
    return text + "Assistant: "


@pytest.mark.parametrize("entry", BODIES, ids=lambda entry: entry["client"].split(",")[0])
def test_what_clients_send_is_answered_and_read_whole(served, entry):
    body = entry["body"]
    answer = served.http.post(entry["path"], json=body)
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        assert answer.text.rstrip().endswith("data: [DONE]")
        body = {**body, "stream": False, "stream_options": None}
        answer = served.http.post(entry["path"], json=body)
    assert answer.json()["usage"]["prompt_tokens"] == len(prompt_of(body).encode())


def test_ten_clients_were_recorded_over_two_turns():
    """llm sends no field of its own, but all of them bring the first reply back."""
    chats = [entry for entry in BODIES if entry["path"] == "/v1/chat/completions"]
    first = {entry["client"] for entry in chats if REPLY not in json.dumps(entry["body"])}
    second = {
        (entry["client"], bool(entry["body"].get("stream")))
        for entry in chats
        if f"\nAssistant: {REPLY}\nUser: And what is blue?\n" in prompt_of(entry["body"])
    }
    assert len(first) == 10
    assert second == {(client, streams) for client in first for streams in (False, True)}
