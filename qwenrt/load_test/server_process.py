"""A server of our own, in a process of its own, so that what clients cost and what the server costs stay apart."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qwenrt.errors import BackendError

_STOP_S = 20.0
_TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class ServerProcess:
    """`qwenrt serve` with some arguments. ``url`` is where it listens, ``pid`` its process."""

    def __init__(self, arguments: Sequence[str], told: Path) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._told = told
        command = [sys.executable, "-m", "qwenrt", "serve", *arguments, "--port", str(port)]
        with told.open("wb") as log:
            # In a session of its own: Ctrl-C is for the client, which then stops it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.pid = self._process.pid

    def wait(self, tell: Callable[[float], None]) -> None:
        """Until it is ready; ``tell`` is called with the seconds so far. Raises BackendError where it ends before."""
        began = time.monotonic()
        while not self._ready():
            if self._process.poll() is not None:
                raise BackendError("qwenrt serve", self.last_words() or f"it exited with {self.exit_code}")
            tell(time.monotonic() - began)
            time.sleep(0.2)

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """The end of what it wrote."""
        lines = self._told.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join(lines[-3:]).removeprefix("qwenrt: error: ")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ready(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # not listening yet, or 503
            return False


@contextlib.contextmanager
def server_process(arguments: Sequence[str], tell: Callable[[float], None]) -> Iterator[ServerProcess]:
    """A server that is ready, and stopped at the end. Raises BackendError with its own words where it cannot start."""
    with tempfile.TemporaryDirectory(prefix="qwenrt-bench-") as directory:
        process = ServerProcess(arguments, Path(directory) / "server.log")
        try:
            process.wait(tell)
            yield process
        finally:
            process.stop()


def cpu_seconds(pid: int) -> float | None:
    """Processor time that a process of this machine has used, all its threads; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICK


def peak_rss_bytes(pid: int) -> int | None:
    """The most memory that a process of this machine has held at once; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    held = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return int(held) * 1024 if held is not None else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
