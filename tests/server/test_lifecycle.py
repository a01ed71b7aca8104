"""The end of a server, by signals and otherwise, in processes of their own; ports that cannot be had."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qwenrt.errors import ConfigError
from qwenrt.server.lifecycle import Hooks, _accept_calmly, bind
from qwenrt.server.settings import ServeSettings
from tests.server.wire import PATIENCE, STARTS, Wire, request, serving, until

ROOT = Path(__file__).parents[2]

# A server whose /stream goes on until it is aborted, and which writes down what happens to it.
PROGRAM = """
import asyncio, sys, threading
from qwenrt.server.health import Health, Signs
from qwenrt.server.lifecycle import Hooks, bind, run
from qwenrt.server.settings import ServeSettings

health = Health(lambda: Signs(True), 60)
aborted = None

async def app(scope, receive, send):
    global aborted
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": kind + ".complete"})
            if kind == "lifespan.shutdown":
                return
    aborted = aborted or asyncio.Event()
    if scope["path"] == "/ready":
        await answer(send, health.ready().status, b"ready?")
    elif scope["path"] == "/stubborn":
        await asyncio.sleep(1000)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        end = asyncio.ensure_future(aborted.wait())
        for _ in range(60 if scope["path"] == "/short" else 10**6):
            await asyncio.wait([end], timeout=0.01)
            if end.done():
                await send({"type": "http.response.body", "body": b"abort", "more_body": True})
                break
        await send({"type": "http.response.body", "body": b"ended"})

async def answer(send, status, body):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": body})

def say(*words):
    print(*words, flush=True)

settings = ServeSettings(port=0, drain=float(sys.argv[1]))
sockets = bind(settings)
hooks = Hooks(
    started=lambda: (health.loaded(), say("port", sockets[0].getsockname()[1])),
    closing=health.close,
    drain=lambda: say("drain"),
    abort=lambda: (say("abort"), aborted.set()),
    reload=lambda: (say("reload"), 1)[1],
)
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), int(sys.argv[4])))
run(app, settings, hooks, sockets=sockets, parser=sys.argv[2])
say("threads", [t.name for t in threading.enumerate() if t is not threading.main_thread()])
"""


class Process:
    def __init__(self, drain: float, parser: str, *more: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(drain), parser, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        self.said: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def started(self) -> None:
        """Wait until it says its port."""
        until(lambda: self.said or self.popen.poll() is not None, STARTS)
        self.port = int(self.said[0].split()[1])

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.said.append(line.strip())

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def ready(self) -> int:
        with Wire(self.port) as wire:
            wire.send(request(path="/ready"))
            return wire.response()[0]

    def ended(self) -> list[str]:
        """What it said, once it has ended with 0 and no thread was left."""
        assert self.popen.wait(STARTS) == 0
        self.reader.join(PATIENCE)
        assert self.said[-1] == "threads []"
        return self.said[1:-1]


@contextmanager
def process(drain: float, parser: str, *more: str) -> Iterator[Process]:
    running = Process(drain, parser, *more)
    try:
        running.started()
        yield running
    finally:
        running.popen.kill()
        running.popen.communicate()


PARSERS = pytest.mark.parametrize("parser", ["h11", "httptools"])


@PARSERS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(parser: str, number: int) -> None:
    with process(1000, parser) as server, Wire(server.port):  # and one connection that asks nothing
        assert server.ready() == 200
        server.signal(number)
        assert server.ended() == ["drain"]


@PARSERS
def test_what_runs_may_end_while_nothing_is_ready(parser: str) -> None:
    with process(1000, parser) as server, Wire(server.port) as wire:
        wire.send(request(path="/short"))
        wire.read_until(b"begun")
        server.signal(signal.SIGTERM)
        until(lambda: "drain" in server.said)
        assert server.ready() == 503  # whoever asks is told
        assert b"ended" in wire.rest() and b"abort" not in wire.came
        assert server.ended() == ["drain"]


@PARSERS
def test_what_does_not_end_is_aborted_and_says_so(parser: str) -> None:
    with process(0.2, parser) as server, Wire(server.port) as wire:
        wire.send(request(path="/stream"))
        wire.read_until(b"begun")
        server.signal(signal.SIGTERM)
        came = wire.rest()
        assert b"abort" in came and b"ended" in came
        assert server.ended() == ["drain", "abort"]


@PARSERS
def test_a_second_signal_ends_it_at_once(parser: str) -> None:
    with process(1000, parser) as server, Wire(server.port) as wire:
        wire.send(request(path="/stream"))
        wire.read_until(b"begun")
        server.signal(signal.SIGTERM)
        until(lambda: "drain" in server.said)
        server.signal(signal.SIGTERM)
        assert server.ended() == ["drain"]


def test_keys_are_read_again_while_requests_run() -> None:
    with process(1000, "auto") as server, Wire(server.port) as wire:
        wire.send(request(path="/short"))
        wire.read_until(b"begun")
        server.signal(signal.SIGHUP)
        until(lambda: "reload" in server.said)
        assert server.ready() == 200
        wire.read_until(b"ended")
        server.signal(signal.SIGTERM)
        assert server.ended() == ["reload", "drain"]


def test_a_client_that_breaks_off_is_no_end() -> None:
    with process(1000, "auto") as server:
        for _ in range(5):
            with Wire(server.port) as wire:  # SIGPIPE, were it not ignored
                wire.send(request(path="/short"))
                wire.read_until(b"begun")
        assert server.ready() == 200
        server.signal(signal.SIGTERM)
        server.ended()


def test_a_server_without_another_file_descriptor_waits_for_one() -> None:
    with process(1000, "auto", "40", "40") as server:
        wires = [Wire(server.port) for _ in range(60)]  # the system accepts them, the server cannot
        wires[0].send(request(path="/ready"))
        assert wires[0].response()[0] == 200
        for wire in wires:
            wire.close()

        def ready() -> bool:
            with suppress(ConnectionError, AssertionError):  # uvloop closes those that it cannot have
                return server.ready() == 200
            return False

        until(ready)
        server.signal(signal.SIGTERM)
        server.ended()
        assert server.popen.stderr is not None
        said = server.popen.stderr.read()
        assert "Traceback" not in said and len(said.splitlines()) < 30  # asyncio alone writes thousands


def test_what_would_be_tried_again_after_the_end_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio listens again a second after a descriptor was missing, even to a socket that was closed meanwhile."""

    async def run(closes: bool) -> None:
        loop: Any = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            _accept_calmly([listening])
            if closes:
                listening.close()
            loop.call_soon(loop._add_reader, -1, print)
            await asyncio.sleep(0.01)

    for closes in (False, True):
        caplog.clear()
        with closing(asyncio.SelectorEventLoop()) as loop:
            loop.run_until_complete(run(closes))
        assert ("Invalid file descriptor: -1" in caplog.text) != closes


def test_a_server_takes_the_file_descriptors_that_it_may_have() -> None:
    with process(1000, "auto", "40", "400") as server:
        wires = [Wire(server.port) for _ in range(100)]
        for wire in wires:
            wire.send(request(path="/ready"))
            assert wire.response()[0] == 200
        server.signal(signal.SIGTERM)
        server.ended()


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            bind(ServeSettings(port=port))
    assert f"port {port}: another program has this port. Stop it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_of_another_machine_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no such address"):
        bind(ServeSettings(host="192.0.2.1", port=0, i_know_this_is_open=True))


def test_localhost_is_both_of_its_addresses_where_there_are_two() -> None:
    sockets = bind(ServeSettings(host="localhost", port=0))
    ports = {sock.getsockname()[1] for sock in sockets}
    assert len(ports) == 1 and sockets[0].getsockname()[0] == "127.0.0.1"
    for sock in sockets:
        sock.close()


def test_a_port_is_free_again_when_its_server_has_ended() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("nobody asks")

    with serving(app, ServeSettings(port=0, drain=0)) as server:
        port = server.port
    for sock in bind(ServeSettings(port=port)):
        sock.close()


def test_the_server_is_looked_at_about_once_a_second() -> None:
    looks: list[int] = []

    async def app(scope: object, receive: object, send: object) -> None:
        pass

    with serving(app, hooks=Hooks(look=lambda: looks.append(1))):
        until(lambda: len(looks) >= 2)
