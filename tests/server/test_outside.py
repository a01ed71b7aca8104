"""The watch over what the server may not do is itself awake: each of these is tried in its thread, and seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Outward
from tests.server.conftest import Outside
from tests.server.wire import request, serving, until


def connect(path: Path) -> None:
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", 9))  # not even to this machine


def send(path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("192.0.2.1", 53))


def look_up(path: Path) -> None:
    socket.getaddrinfo("example.com", 80)


def start(path: Path) -> None:
    subprocess.run([sys.executable, "--version"], check=False)


def call(path: Path) -> None:
    os.system("true")


def write(path: Path) -> None:
    path.write_text("left behind")


def append(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))


@pytest.mark.parametrize("act", [connect, send, look_up, start, call, write, append])
def test_what_the_server_may_not_do_is_seen_and_stopped(
    act: Callable[[Path], None], outside: Outside, outward: Outward, tmp_path: Path
) -> None:
    stopped: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            try:
                act(tmp_path / "file")
            except PermissionError as error:
                stopped.append(error)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    with serving(app) as server, server.wire(request()) as wire:
        assert wire.response()[0] == 204
        until(lambda: stopped)
    assert len(outside.tried + outward.told()) == 1 and not list(tmp_path.iterdir())
    outside.tried.clear()


def test_a_server_may_write_where_a_test_says(outside: Outside, tmp_path: Path) -> None:
    outside.may_write.append(str(tmp_path))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            write(tmp_path / "prefix")
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    with serving(app) as server, server.wire(request()) as wire:
        assert wire.response()[0] == 204
    assert (tmp_path / "prefix").exists()


def test_tests_may_write_files_and_reach_their_server(tmp_path: Path, outside: Outside) -> None:
    (tmp_path / "file").write_text("mine")
    with socket.socket() as listening, socket.socket() as mine:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        mine.connect(listening.getsockname())
    assert not outside.tried
