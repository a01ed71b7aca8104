"""What a request's head says, judged without knowing what it asks for: its path, host, origin, id and keys."""

from __future__ import annotations

import base64
import binascii
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence

from qwenrt.server.settings import ServeSettings, as_address, is_loopback

Headers = Sequence[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
_ENCODED_TRICK = re.compile(r"%(2e|2f|5c|00|25)", re.IGNORECASE)  # what is still encoded was encoded twice
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_MOST_KEYS = 4  # that one request may present: each is hashed
_MOST_HEADERS = 64  # that a preflight may ask for
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def values(headers: Headers, name: bytes) -> list[bytes]:
    """All values of a header; ``name`` in lower case, as those of ASGI are."""
    return [value for key, value in headers if key == name]


def request_id(headers: Headers) -> str:
    """The id that a request brings, where it is one that may stand in a log and a header; else a new one."""
    given = values(headers, b"x-request-id")
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    return uuid.uuid4().hex


def plain_path(path: str) -> bool:
    """Whether a decoded path means what it says: no empty or dotted parts, nothing encoded twice, no control or
    replacement characters, no backslash."""
    if not path.startswith("/") or not path.isprintable() or "\\" in path or "\ufffd" in path:
        return False
    parts = path[1:].split("/")
    if any(part in (".", "..") for part in parts) or "" in parts[:-1]:
        return False
    return not _ENCODED_TRICK.search(path)


def presented_keys(headers: Headers) -> list[bytes]:
    """What a request presents as keys: after Bearer, as name:password after Basic, in x-api-key."""
    found = values(headers, b"x-api-key")
    for value in values(headers, b"authorization"):
        scheme, _, rest = value.partition(b" ")
        if scheme.lower() == b"bearer":
            found.append(rest.strip())
        elif scheme.lower() == b"basic":
            try:
                found.append(base64.b64decode(rest.strip(), validate=True))
            except (binascii.Error, ValueError):
                continue
    return found[:_MOST_KEYS]


class Hosts:
    """The names that the server is known by. A page of another site whose name was pointed at this machine (DNS
    rebinding) says its own name, and is refused by it."""

    def __init__(self, settings: ServeSettings) -> None:
        self._names = {settings.host, *settings.allow_hosts}
        self._any_address = not settings.loopback  # whoever says an address looked up no name

    def known(self, headers: Headers) -> bool:
        """Whether a request is for one of them. Programs that say no host are no browsers."""
        given = values(headers, b"host")
        if not given:
            return True
        name = host_name(given[0]) if len(given) == 1 else ""
        if name in self._names or is_loopback(name):
            return True
        return self._any_address and as_address(name) is not None


def host_name(value: bytes) -> str:
    """The name or address in a Host header, without brackets, port and final dot; "" where there is none."""
    text = value.decode("latin-1").strip().lower()
    match = re.fullmatch(r"\[([0-9a-f:.]+)\](?::[0-9]*)?|([^:\[\]]*)(?::[0-9]*)?", text)
    return (match[1] or match[2] or "").rstrip(".") if match else ""


class Origins:
    """Whose web pages may use the server: its own, and those it was told of."""

    def __init__(self, settings: ServeSettings) -> None:
        self._allowed = frozenset(settings.allow_origins)

    def refused(self, method: str, headers: Headers) -> bool:
        """Whether a request comes from the page of another site. Programs that are no browsers say no origin."""
        given = values(headers, b"origin")
        if not given:
            site = values(headers, b"sec-fetch-site")
            return method not in _SAFE_METHODS and any(s not in (b"same-origin", b"none") for s in site)
        return len(given) > 1 or not (self.allowed(headers) or self._own(given[0], headers))

    def allowed(self, headers: Headers) -> bytes | None:
        """The origin of a request, where it is one that was allowed by name."""
        given = values(headers, b"origin")
        if len(given) == 1 and given[0].decode("latin-1").lower() in self._allowed:
            return given[0]
        return None

    @staticmethod
    def _own(origin: bytes, headers: Headers) -> bool:
        """Whether a page was served under the host that the request is for (which `Hosts` has judged)."""
        scheme, separator, place = origin.lower().partition(b"://")
        port = {b"http": b":80", b"https": b":443"}.get(scheme)
        hosts = values(headers, b"host")
        if not separator or port is None or len(hosts) != 1:
            return False
        return place.removesuffix(port) == hosts[0].strip().lower().removesuffix(port)

    def headers(self, request: Headers) -> list[tuple[bytes, bytes]]:
        """What a response says about who may read it."""
        origin = self.allowed(request)
        policy = b"same-origin" if origin is None else b"cross-origin"
        head = [(b"cross-origin-resource-policy", policy)]
        if self._allowed:
            head.append((b"vary", b"Origin"))
        if origin is not None:
            head.append((b"access-control-allow-origin", origin))
            head.append((b"access-control-expose-headers", _EXPOSED))
        return head

    def preflight(self, request: Headers) -> list[tuple[bytes, bytes]] | None:
        """The headers that answer a browser's question before the real request; None where it is no such question."""
        if not values(request, b"access-control-request-method") or self.allowed(request) is None:
            return None
        wanted = b",".join(values(request, b"access-control-request-headers")).split(b",")[:_MOST_HEADERS]
        names = [name.strip() for name in wanted if _TOKEN.fullmatch(name.strip())]
        answer = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
            (b"access-control-max-age", b"600"),
        ]
        if names:
            answer.append((b"access-control-allow-headers", b", ".join(names)))
        if values(request, b"access-control-request-private-network") == [b"true"]:
            answer.append((b"access-control-allow-private-network", b"true"))
        return answer


_EXPOSED = b"x-request-id, retry-after, x-qwenrt-max-tokens, x-qwenrt-ignored, x-qwenrt-call-error"


def coded(headers: Headers) -> bool:
    """Whether a request's body is compressed or otherwise encoded: none that is would be of a size that is known."""
    return any(v.strip().lower() not in (b"", b"identity") for v in values(headers, b"content-encoding"))


def declared_length(headers: Headers) -> int | None:
    """The length that a body says it has; None where it says none, 0 where there is no body."""
    if values(headers, b"transfer-encoding"):
        return None
    given = values(headers, b"content-length")
    return int(given[0]) if given and given[0].isdigit() and len(given[0]) < 19 else 0 if not given else None


def with_defaults(
    headers: Iterable[tuple[bytes, bytes]], defaults: Mapping[bytes, bytes]
) -> list[tuple[bytes, bytes]]:
    """``headers`` and those of ``defaults`` that are not among them."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    return given + [(name, value) for name, value in defaults.items() if name not in names]
