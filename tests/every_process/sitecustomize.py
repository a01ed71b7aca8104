"""No test reaches another machine: an audit hook refuses connections, packets and look-ups, and writes them down.

Python imports a module of this name before anything else, and tests/conftest.py puts this directory on PYTHONPATH. So
the hook is in the tests' own process and in every Python that they start, but for those that get another PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from typing import Any

REPORT = "TESTS_OUTWARD"  # the file where what was tried is written down, a line each; without it nothing is refused
_CONNECTING = frozenset(("socket.connect", "socket.sendto", "socket.sendmsg"))
_LOOKUPS = frozenset(
    ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
)
_HERE = ("127.0.0.1", "::1", "0.0.0.0", "::", "localhost", "", None)


def _see(event: str, args: tuple[Any, ...]) -> None:
    if event in _CONNECTING:
        address = args[1]  # a path; None: the socket is connected
        inward = not isinstance(address, tuple) or _is_here(address[0])
    elif event in _LOOKUPS:
        address = args[0]
        inward = _is_here(address[0] if isinstance(address, tuple) else address)
    else:
        return
    if inward or not (report := os.environ.get(REPORT)):
        return
    what = f"{event} {address!r}"
    with open(report, "a") as file:
        file.write(f"{what}\n")
    raise PermissionError(f"no test may reach another machine: {what}")


def _is_here(host: Any) -> bool:
    name = host.decode("latin-1") if isinstance(host, bytes) else host
    return name in _HERE or isinstance(name, int)  # the kernel's own sockets have numbers


if not hasattr(sys, "tests_outward"):  # imported under two names where a test process was started by another
    sys.addaudithook(_see)
    sys.tests_outward = _see  # type: ignore[attr-defined]
