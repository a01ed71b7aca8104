"""The watch over what leaves this machine is awake: in the tests' own process, and in those that they start."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable

import pytest

from tests.conftest import Outward

ELSEWHERE = "192.0.2.1"  # an address that is nobody's


def packet() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", (ELSEWHERE, 53))


TRIES: list[tuple[Callable[[], object], str]] = [
    (lambda: socket.create_connection((ELSEWHERE, 443), 5), "getaddrinfo"),
    (lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM).connect(("2001:db8::1", 443)), "connect"),
    (lambda: urllib.request.urlopen("http://example.com/", timeout=5), "getaddrinfo"),
    (lambda: socket.gethostbyname("example.com"), "gethostbyname"),
    (packet, "sendto"),
]


@pytest.mark.parametrize(("reach", "event"), TRIES)
def test_what_leaves_this_machine_is_refused_and_told(
    reach: Callable[[], object], event: str, outward: Outward
) -> None:
    with pytest.raises(OSError, match="no test may reach another machine"):
        reach()
    [told] = outward.told()
    assert told.startswith(f"socket.{event} ")


def test_so_is_what_a_program_of_a_test_tries(outward: Outward) -> None:
    code = (
        "import socket\ntry: socket.create_connection(('example.com', 80))\nexcept OSError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n" and outward.told() == ["socket.getaddrinfo 'example.com'"]


def test_this_machine_may_be_reached(outward: Outward) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, listening.getsockname()[1]), 5).close()
    assert not outward.told()
