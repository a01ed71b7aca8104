"""Who is let in, by the real command and over real sockets."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.asking import CHAT, ask, chat, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import STARTS, Serving

ROOT = Path(__file__).parents[2]
KEYS = tuple("sk-" + "k" * (length - 3) for length in (4, 32, 33, 64, 1000, 4096))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_command_opens_no_port_to_other_machines_without_a_key(host: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        command = [sys.executable, "-m", "qwenrt", "serve", "demo", "--host", host, "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STARTS)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("qwenrt: error: ") and "there is no API key" in done.stderr
    )  # not: the port is taken
    assert "--api-key-file" in done.stderr and "--i-know-this-is-open" in done.stderr


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with scripted_llm(lambda prompt: "Yes.", max_model_len=4096) as llm, serve(llm, api_keys=KEYS) as running:
        yield running


def test_right_keys_of_every_length_are_answered_alike(served: Serving) -> None:
    for key in KEYS:
        for headers in ({"authorization": f"Bearer {key}"}, {"x_api_key": key}):
            status, _, told = ask(served, CHAT, chat(), **headers)
            assert status == 200 and told["choices"][0]["message"]["content"] == "Yes."


def test_wrong_keys_of_every_length_are_answered_alike(served: Serving) -> None:
    """Nothing of an answer tells how near a key was."""
    near = [key[:-1] + "x" for key in KEYS] + [key[:-1] for key in KEYS] + [key + "k" for key in KEYS]
    near += ["x" + key[1:] for key in KEYS] + [key.upper() for key in KEYS] + ["x", "x" * 20_000]
    answers = set()
    for key in (one for one in near if one not in KEYS):
        for headers in ({"authorization": f"Bearer {key}"}, {"x_api_key": key}):
            status, told, body = ask(served, CHAT, chat(), x_request_id="same", **headers)
            told.pop("date", None)
            answers.add((status, repr(sorted(told.items())), repr(body)))
    [(status, _, body)] = answers
    assert status == 401 and not re.search("sk-|kkk|long|short", body)
