"""What the server says of itself is true: schemathesis asks for everything that it describes, rightly and wrongly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bdh.serve.app import up_to
from bdh.serve.config import LimitSettings


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing(start_server, bytes_pair, tmp_path):
    server = start_server(*bytes_pair, chat_template="plain", limits=LimitSettings(max_tokens=16, chat_tokens=16))
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{server.url}/openapi.json",
        "--checks",
        "all",
    ]
    # How long an answer takes is not what is tested: the machine may be busy.
    settings = [
        "--max-response-time",
        "120",
        "--max-examples",
        "25",
        "--seed",
        "0",
        "--request-timeout",
        "120",
        "--no-color",
    ]
    found = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout[-6000:]
    assert int(re.search(r"(\d+) generated", found.stdout).group(1)) > 500
    server.idle()


@pytest.mark.parametrize("last", [0, 1, 9, 10, 17, 99, 100, 255, 259, 1000, 50257])
def test_the_pattern_of_numbers_up_to_one(last):
    pattern = re.compile(f"^({up_to(last)})$")
    several = {
        0,
        1,
        5,
        9,
        10,
        11,
        99,
        100,
        101,
        199,
        254,
        255,
        256,
        999,
        1000,
        last - 1,
        last,
        last + 1,
        10 * last,
        50300,
    }
    for number in several - {-1}:
        assert bool(pattern.match(str(number))) == (number <= last), number
    for other in ("", "00", "01", "a", "1 ", "-1"):
        assert not pattern.match(other)


def test_keys_are_described_where_they_are_needed(server, guarded):
    described = guarded.http.get("/openapi.json").json()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert described["paths"]["/v1/completions"]["post"]["security"]
    assert "security" not in described["paths"]["/health"]["get"]
    assert "securitySchemes" not in server.http.get("/openapi.json").json()["components"]
