"""What clients really send to /v1/responses, over two turns: bodies recorded from them, with the reply as each gives it back."""

import json
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parent.parent / "fixtures" / "responses_bodies.json"
BODIES = json.loads(FIXTURE.read_text(encoding="utf-8"))
REPLY = "A first reply."  # what the recorded first turns were answered


@pytest.fixture(scope="module")
def first(served):
    """A stored response, for what the recorded ones call resp_1 and msg_1."""
    return served.http.post("/v1/responses", json={"model": "tiny", "input": "What is red?"}).json()


def text_of(item, first) -> tuple[str, str]:
    """Role and text of an item, written down apart from the server's own schema."""
    if item.get("type") == "item_reference":
        return "assistant", first["output"][0]["content"][0]["text"].lstrip()
    content = item["content"]
    return item["role"], content if isinstance(content, str) else "".join(part["text"] for part in content)


def prompt_of(body, first) -> str:
    given = body["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    said = [("system", body["instructions"])] if body.get("instructions") else []
    said += [text_of(item, first) for item in items]
    forms = {"system": "{}\n\n", "user": "User: {}\n", "assistant": "Assistant: {}\n"}
    return "".join(forms[role].format(text) for role, text in said) + "Assistant: "


@pytest.mark.parametrize("entry", BODIES, ids=lambda entry: entry["client"].split(",")[0])
def test_what_clients_send_is_answered_and_read_whole(served, first, entry):
    body = json.loads(
        json.dumps(entry["body"]).replace("resp_1", first["id"]).replace("msg_1", first["output"][0]["id"])
    )
    answer = served.http.post(entry["path"], json=body)
    assert answer.status_code == 200, answer.text
    told = (
        answer.json() if not body.get("stream") else json.loads(answer.text.strip().rpartition("data: ")[2])["response"]
    )
    assert told["status"] in ("completed", "incomplete")
    if "previous_response_id" in body:
        assert told["usage"]["input_tokens_details"]["cached_tokens"] > 0
    else:
        assert told["usage"]["input_tokens"] == len(prompt_of(body, first).encode())


def test_the_clients_were_recorded_over_two_turns():
    second = {
        e["client"] for e in BODIES if "msg_1" in json.dumps(e) or "resp_1" in json.dumps(e) or REPLY in json.dumps(e)
    }
    assert second == {entry["client"] for entry in BODIES}
    assert len(second) == 7
