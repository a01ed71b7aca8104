"""What the guard lets pass and what not: over sockets, with both of uvicorn's protocol classes, and in the process."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.server.gates import Hosts, Origins, host_name, plain_path, request_id
from qwenrt.server.guard import Guard
from qwenrt.server.keys import Keyring
from qwenrt.server.settings import ServeSettings
from qwenrt.text.dialects.problem import Problem
from tests.server.wire import Serving, request, serving, until

KEY = "sk-a-key-of-this-test"


class Inner:
    """The app behind the guard: tells what it saw."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self.seen.append({"path": scope["path"], "method": scope["method"], **scope["state"]})
        if scope["path"] == "/fails":
            raise RuntimeError("secret prompt\r\nINFO forged line")
        if scope["path"] == "/problem":
            raise Problem("queue_full", "busy", retry_after=7)
        if scope["path"] == "/breaks":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun", "more_body": True})
            raise RuntimeError("in the middle")
        more = scope["path"] != "/unread"
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            self.read += len(message["body"])
            more = message["more_body"]
        headers = [(b"content-length", b"2"), (b"cache-control", b"max-age=5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})


def render(problem: Problem, path: str, request_id: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    body = json.dumps(
        {"error": {"type": problem.kind, "message": problem.message}, "path": path[:3]}
    ).encode()
    headers = [(b"content-type", b"application/json")]
    if problem.retry_after is not None:
        headers.append((b"retry-after", str(problem.retry_after).encode()))
    return problem.status, headers, body


def guarded(inner: Inner | None = None, keys: tuple[str, ...] = (), **chosen: Any) -> Guard:
    told = ServeSettings(**{"port": 0, "drain": 0, **chosen})
    ring = Keyring(ServeSettings(api_keys=keys))
    return Guard(inner or Inner(), told, ring, render)


@pytest.fixture(params=["h11", "httptools"])
def door(request: pytest.FixtureRequest) -> Iterator[tuple[Serving, Inner]]:
    inner = Inner()
    guard = guarded(inner, (KEY, "sk-other"), max_body=1 << 20, allow_origins=("https://chat.example.com",))
    with serving(guard, ServeSettings(port=0, drain=0), parser=request.param) as server:
        yield server, inner


def ask(server: Serving, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
    with server.wire(request(*args, **kwargs)) as wire:
        return wire.response()


WITH_KEY = {"authorization": f"Bearer {KEY}"}


def test_every_route_but_three_is_behind_the_key(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    for method, path in (
        ("GET", "/health"),
        ("GET", "/ready"),
        ("GET", "/"),
        ("HEAD", "/"),
        ("HEAD", "/health"),
    ):
        with server.wire(request(method, path)) as wire:
            assert wire.read_until(b"\r\n").split()[1] == b"200"
    closed = (
        *(
            ("POST", "/"),
            ("POST", "/health"),
            ("GET", "/health/"),
            ("GET", "/metrics"),
            ("GET", "/v1/models"),
        ),
        *(
            ("POST", "/v1/chat/completions"),
            ("GET", "/openapi.json"),
            ("DELETE", "/v1/stream"),
            ("OPTIONS", "/v1"),
        ),
        *(("GET", "/healthz"), ("GET", "/api/tags"), ("PUT", "/ready")),
    )
    before = len(inner.seen)
    for method, path in closed:
        status, headers, body = ask(server, method, path)
        assert status == 401, (method, path)
        assert (
            headers["www-authenticate"].startswith("bearer")
            and json.loads(body)["error"]["type"] == "unauthorized"
        )
    assert len(inner.seen) == before


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer   {KEY} "}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": "wrong", "authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": "Basic c2stYS1rZXktb2YtdGhpcy10ZXN0"}, 200),
        ({"authorization": "Basic !!!"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"authorization": f"Bearer {KEY.upper()}"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "\xff\xfe"}, 401),
        ({"cookie": f"key={KEY}"}, 401),
    ],
)
def test_keys_are_taken_where_clients_put_them(
    door: tuple[Serving, Inner], headers: dict[str, str], status: int
) -> None:
    assert ask(door[0], "GET", "/v1/models", headers)[0] == status


def test_callers_are_told_apart_without_their_keys(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    for key in (KEY, "sk-other", KEY):
        assert ask(server, "GET", "/v1/models", {"x-api-key": key})[0] == 200
    first, other, again = (seen["caller"] for seen in inner.seen)
    assert first == again != other and len(first) == 16 and KEY not in first
    assert inner.seen[0]["max_priority"] == 9


def test_without_keys_everybody_is_the_same_caller() -> None:
    inner = Inner()
    with serving(guarded(inner)) as server:
        assert ask(server, "POST", "/v1/x", {"x-api-key": "whatever"}, body=b"{}")[0] == 200
    assert inner.seen[0]["caller"] == ""


def test_brute_force_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    ring = Keyring(ServeSettings(api_keys=(KEY,)))
    guard = Guard(Inner(), ServeSettings(port=0, drain=0), ring, render, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, "qwenrt.server"), serving(guard) as server, server.wire() as wire:
        for n in range(50):
            wire.send(request(path="/v1/models", headers={"x-api-key": f"guess-{n}"}))
            assert wire.response()[0] == 401
        now[0] += 2
        wire.send(request(path="/v1/models"))
        assert wire.response()[0] == 401
    lines = [record.getMessage() for record in caplog.records if "valid key" in record.getMessage()]
    assert len(lines) == 2 and lines[1].startswith("50 requests") and "guess" not in caplog.text


def test_a_key_of_a_megabyte_ends_at_the_header(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    with server.wire() as wire:
        with contextlib.suppress(ConnectionError):
            wire.send(request(path="/v1/models", headers={"x-api-key": "k" * (1 << 20)}))
        assert b" 431 " in wire.rest()[:20] or not inner.seen
    assert ask(server, path="/v1/models", headers={"x-api-key": "k" * 20_000})[0] == 401
    assert not inner.seen


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/models", "//v1/../admin", "/v1/../admin", "/v1/./models", "/v1//models", "/..", "/v1/.."),
        *("/%2e%2e/admin", "/v1/%2E%2E/admin", "/v1/%2e/models", "/v1/%252e%252e/x", "/v1/models%00", "/%00"),
        *("/v1/%5c..%5cx", "/v1\\models", "/v1/a%0d%0ab", "/v1/%ff%fe", "/v1/x%252f"),
    ],
)
def test_path_tricks_are_not_found(door: tuple[Serving, Inner], path: str) -> None:
    server, inner = door
    with server.wire(request("GET", path, WITH_KEY)) as wire:
        status, _, _ = wire.response()
    assert status in (404, 400), status  # 400 where the parser already refuses it
    assert not inner.seen
    assert ask(server, path="/v1/models/Qwen%2FQwen-1_8B", headers=WITH_KEY)[0] == 200
    assert inner.seen[-1]["path"] == "/v1/models/Qwen/Qwen-1_8B"


@given(st.text(max_size=20))
def test_plain_paths_have_no_tricks(text: str) -> None:
    path = "/" + text
    if plain_path(path):
        parts = path.split("/")
        assert ".." not in parts and "." not in parts and "" not in parts[1:-1]
        assert "\\" not in path and "\0" not in path and path.isprintable()


@pytest.mark.parametrize(
    ("host", "known"),
    [
        *(
            (h, True)
            for h in ("localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "localhost.")
        ),
        *(
            (h, False)
            for h in ("evil.example.com", "127.0.0.1.evil.com", "localhost.evil.com", "192.168.1.5")
        ),
        *(
            (h, False)
            for h in ("", "a b", "localhost@evil.com", "[::1].evil.com", "localhost:80:80", "0x7f000001")
        ),
    ],
)
def test_names_of_other_hosts_are_refused(door: tuple[Serving, Inner], host: str, known: bool) -> None:
    server, inner = door
    status, _, body = ask(server, "GET", "/v1/models", {**WITH_KEY, "host": host})
    assert (status == 200) is known and status in (200, 403, 400)
    if status == 403:
        assert "--allow-host" in json.loads(body)["error"]["message"] and not inner.seen


def test_hosts_of_a_server_for_other_machines() -> None:
    hosts = Hosts(
        ServeSettings(host="0.0.0.0", api_keys=("k",), allow_hosts=("llm.example.com", "[fd00::7]"))
    )
    for name in (
        "192.168.1.5:8000",
        "[fd00::1]",
        "llm.example.com:443",
        "LLM.example.com.",
        "localhost",
        "0.0.0.0",
    ):
        assert hosts.known([(b"host", name.encode())]), name
    for name in ("evil.com", "a.llm.example.com", "llm.example.com.evil.com"):
        assert not hosts.known([(b"host", name.encode())]), name
    assert hosts.known([]) and not hosts.known([(b"host", b"localhost"), (b"host", b"localhost")])


@given(st.text(max_size=30))
def test_any_host_is_a_name_or_nothing(text: str) -> None:
    name = host_name(text.encode("utf-8", "replace"))
    assert ("[" not in name and ":" not in name) or name.count(":") > 1


def test_pages_of_other_sites_are_refused(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    own = f"localhost:{server.port}"
    refused: tuple[dict[str, str], ...] = (
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"origin": f"http://{own}.evil.com"},
        {"origin": "https://chat.example.com.evil.com"},
        {"origin": "http://chat.example.com"},
        {"origin": "file://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    )
    for headers in refused:
        # a form of another site may send this without a preflight
        plain = {**WITH_KEY, "host": own, "content-type": "text/plain", **headers}
        status, answer, _ = ask(server, "POST", "/v1/chat/completions", plain, b"{}")
        assert status == 403 and "access-control-allow-origin" not in answer, headers
    assert not inner.seen
    for headers in (
        {"origin": f"http://{own}"},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {},
    ):
        assert ask(server, "POST", "/v1/x", {**WITH_KEY, "host": own, **headers}, b"{}")[0] == 200
    status, answer, _ = ask(
        server, "POST", "/v1/x", {**WITH_KEY, "origin": "https://chat.example.com"}, b"{}"
    )
    assert (status, answer["access-control-allow-origin"]) == (200, "https://chat.example.com")
    assert answer["vary"] == "origin" and "access-control-allow-credentials" not in answer


def test_preflights_are_answered_for_allowed_origins_alone(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    wants = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type,x-stainless-os,bad header,a(b)",
    }
    status, headers, body = ask(server, "OPTIONS", "/v1/x", {**wants, "origin": "https://chat.example.com"})
    assert (status, body) == (204, b"")
    assert headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-os"
    assert (
        headers["access-control-allow-origin"] == "https://chat.example.com"
        and "post" in str(headers).lower()
    )
    assert "*" not in "".join(headers.values())
    status, headers, _ = ask(server, "OPTIONS", "/v1/x", {**wants, "origin": "https://evil.example.com"})
    assert status == 403 and not any(name.startswith("access-control") for name in headers)
    assert not inner.seen


def test_request_ids_are_taken_or_made(door: tuple[Serving, Inner], caplog: pytest.LogCaptureFixture) -> None:
    server, inner = door
    with caplog.at_level(logging.INFO, "qwenrt.server.access"):
        _, headers, _ = ask(server, path="/v1/a", headers={**WITH_KEY, "x-request-id": "Abc-1_2.3"})
        until(lambda: "Abc-1_2.3" in caplog.text)
    assert headers["x-request-id"] == "abc-1_2.3" and inner.seen[0]["request_id"] == "Abc-1_2.3"
    for bad in ("", "a b", "x" * 129, "a;b", "\xe9"):
        _, headers, _ = ask(server, path="/v1/a", headers={**WITH_KEY, "x-request-id": bad})
        assert len(headers["x-request-id"]) == 32
    assert ask(server, path="/v1/a")[1]["x-request-id"]  # of a refusal too


@given(st.binary(max_size=200))
def test_any_request_id_is_harmless(value: bytes) -> None:
    text = request_id([(b"x-request-id", value)])
    assert 1 <= len(text) <= 128 and all(c.isalnum() or c in "_.-" for c in text) and text.isascii()


def test_no_line_of_the_log_is_forged(door: tuple[Serving, Inner], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qwenrt.server"):
        ask(door[0], path="/v1/%0d%0aINFO%20forged", headers=WITH_KEY)
        assert ask(door[0], path="/fails", headers=WITH_KEY)[0] == 500
        until(lambda: "/fails" in caplog.text)
    assert not any(line.startswith("INFO forged") for line in caplog.text.splitlines())


@pytest.mark.parametrize("all_words", [False, True])
def test_what_an_error_quotes_is_not_in_the_log_unless_prompts_may_be(
    all_words: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            raise KeyError("user said".upper())

    guard = guarded(log_prompts=all_words)
    guard.app = app
    with caplog.at_level(logging.INFO), serving(guard) as server:
        status, _, body = ask(server, "POST", "/v1/x", {"x-request-id": "abc"}, b"{}")
    assert status == 500 and b"USER SAID" not in body
    assert "abc failed with KeyError" in caplog.text and "test_guard.py" in caplog.text
    assert ("USER SAID" in caplog.text) is all_words


_NAMES = st.sampled_from(
    [
        *(
            "host",
            "origin",
            "authorization",
            "x-api-key",
            "x-request-id",
            "content-length",
            "transfer-encoding",
        ),
        *("content-encoding", "sec-fetch-site", "access-control-request-method", "expect", "x"),
    ]
)
_VALUES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"localhost", b"Bearer " + KEY.encode(), b"chunked", b"POST", b"gzip", b"https://chat.example.com"]
    ),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "DELETE", "X" * 50]),
    st.one_of(st.sampled_from(["/", "/health", "/v1/x", "/problem"]), st.text(max_size=20)),
    st.lists(st.tuples(_NAMES.map(str.encode), _VALUES), max_size=8),
    st.lists(st.binary(max_size=50), max_size=4),
)
def test_any_head_has_one_whole_answer(
    method: str, path: str, headers: list[tuple[bytes, bytes]], pieces: list[bytes]
) -> None:
    sent: list[Any] = []
    coming = [{"type": "http.request", "body": p, "more_body": True} for p in pieces]
    coming += [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Any:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    guard = guarded(keys=(KEY,), max_body=1024, allow_origins=("https://chat.example.com",))
    asyncio.run(guard(scope, receive, send))
    kinds = [(m["type"], m.get("more_body", False)) for m in sent]
    assert kinds[0][0] == "http.response.start" and kinds[-1] == ("http.response.body", False)
    assert kinds.count(("http.response.body", False)) == 1
    assert sent[0]["status"] in (200, 204, 400, 401, 403, 404, 413, 415, 429, 431)
    names = [name for name, _ in sent[0]["headers"]]
    assert len(names) == len(set(names)) and b"x-request-id" in names


def test_every_answer_has_the_headers_that_browsers_heed(door: tuple[Serving, Inner]) -> None:
    for path, headers in (("/v1/x", WITH_KEY), ("/v1/x", {}), ("/a/../b", WITH_KEY), ("/fails", WITH_KEY)):
        _, answer, _ = ask(door[0], path=path, headers=headers)
        assert answer["x-content-type-options"] == "nosniff" and answer["referrer-policy"] == "no-referrer"
        assert answer["cross-origin-resource-policy"] == "same-origin" and answer["x-frame-options"] == "deny"
        assert answer["cache-control"] in ("no-store", "max-age=5")  # the app's own word counts
        assert "server" not in answer


def test_bodies_are_counted_not_believed(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    status, headers, body = ask(server, "POST", "/v1/x", WITH_KEY, b"x" * (1 << 20))
    assert status == 200
    declared = {**WITH_KEY, "content-length": str((1 << 20) + 1)}
    with server.wire(request("POST", "/v1/x", declared)) as wire:  # before a byte of it has come
        assert wire.read_until(b"\r\n").split()[1] == b"413"
    before = inner.read
    chunked = request("POST", "/v1/x", {**WITH_KEY, "transfer-encoding": "chunked"})
    with server.wire(chunked) as wire:
        for _ in range(20):
            wire.send(b"10000\r\n" + b"y" * 65536 + b"\r\n")
        wire.send(b"0\r\n\r\n")
        status, headers, body = wire.response()
        assert status == 413 and headers["connection"] == "close" and wire.ended()
        assert json.loads(body)["error"]["type"] == "too_large"
    assert inner.read - before <= 1 << 20
    # who sends all before it reads
    with server.wire(request("POST", "/v1/x", WITH_KEY, b"z" * (3 << 19))) as wire:
        assert wire.response()[0] == 413
    with server.wire(request("POST", "/v1/x", {**declared, "expect": "100-continue"})) as wire:
        assert wire.response()[0] == 413 and wire.ended()
    assert ask(server, path="/v1/x", headers=WITH_KEY)[0] == 200


def test_an_endless_body_is_cut(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    for headers in (WITH_KEY, {}):
        with server.wire(request("POST", "/v1/x", {**headers, "transfer-encoding": "chunked"})) as wire:
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 100 << 20:
                    wire.send(b"10000\r\n" + b"y" * 65536 + b"\r\n")
                    sent += 65536
            assert sent < 100 << 20
    until(lambda: server.tasks == 0)
    assert inner.read <= 2 << 20


def test_compressed_bodies_are_refused(door: tuple[Serving, Inner]) -> None:
    server, inner = door
    bomb = gzip.compress(b"\0" * 10_000_000)
    for coding in ("gzip", "br", "identity, gzip", "GZIP", "deflate"):
        assert ask(server, "POST", "/v1/x", {**WITH_KEY, "content-encoding": coding}, bomb)[0] == 415
    assert not inner.seen
    assert ask(server, "POST", "/v1/x", {**WITH_KEY, "content-encoding": "identity"}, b"{}")[0] == 200


def test_what_fails_behind_the_guard_is_an_answer(door: tuple[Serving, Inner]) -> None:
    server, _ = door
    status, headers, body = ask(server, path="/problem", headers=WITH_KEY)
    assert (status, headers["retry-after"]) == (429, "7")
    status, _, body = ask(server, path="/fails", headers=WITH_KEY)
    assert status == 500 and b"secret prompt" not in body
    with server.wire(request(path="/breaks", headers=WITH_KEY)) as wire:
        assert wire.rest().count(b"HTTP/1.1") == 1  # no second answer inside the first
    assert ask(server, path="/v1/x", headers=WITH_KEY)[0] == 200


def test_a_wrong_key_takes_as_long_as_a_missing_one_and_the_app_is_not_asked(
    door: tuple[Serving, Inner],
) -> None:
    server, inner = door
    body = b'{"model": "x"}'
    answers = [ask(server, "POST", "/v1/x", {"x-api-key": k}, body) for k in ("", KEY[:5], "z" * 200)]
    assert {answer[0] for answer in answers} == {401} and not inner.seen
    with server.wire(request("POST", "/v1/x", {}, b"u" * 500_000)) as wire:  # an agent's body, read past
        assert wire.response()[0] == 401 and wire.ended()


def test_in_the_process_as_over_a_socket() -> None:
    async def ask() -> list[int]:
        transport = httpx.ASGITransport(guarded(keys=(KEY,)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answers = [
                await client.get("/v1/x", headers=h) for h in ({}, WITH_KEY, {**WITH_KEY, "host": "evil"})
            ]
            return [answer.status_code for answer in answers]

    assert asyncio.run(ask()) == [401, 200, 403]


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    scope = {"type": "websocket", "path": "/", "headers": []}
    asyncio.run(guarded()(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_origins_know_their_own_page() -> None:
    origins = Origins(ServeSettings())
    for origin, host, own in (
        ("http://localhost:8000", "localhost:8000", True),
        ("http://localhost", "localhost:80", True),
        ("https://llm.example.com", "llm.example.com", True),  # behind a proxy that ends TLS
        ("http://localhost:8000", "localhost:8001", False),
        ("ftp://localhost", "localhost", False),
        ("localhost", "localhost", False),
    ):
        headers = [(b"origin", origin.encode()), (b"host", host.encode())]
        assert origins.refused("POST", headers) is not own, (origin, host)


def test_the_guard_costs_microseconds() -> None:
    """Not a deadline, a magnitude: 200 requests in a second that takes half of it on a busy core."""
    guard = guarded(keys=(KEY,))
    scope_headers = [(b"host", b"localhost"), (b"authorization", WITH_KEY["authorization"].encode())]

    async def once() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            pass

        await guard(
            {"type": "http", "method": "GET", "path": "/v1/x", "headers": scope_headers}, receive, send
        )

    async def many() -> float:
        began = time.process_time()
        for _ in range(200):
            await once()
        return (time.process_time() - began) / 200

    assert asyncio.run(many()) < 0.005
