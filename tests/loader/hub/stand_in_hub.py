"""A stand-in for HuggingFace and ModelScope on loopback: the endpoints their clients call, and faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests."""


@dataclass
class Hub:
    """Serves ``files`` of one repository. Faults are set by a test and read by the handler."""

    repo: str
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", "master", COMMIT)
    gated: bool = False
    statuses: list[int] = field(default_factory=list)  # answers to the next file requests, before any success
    api_statuses: list[int] = field(default_factory=list)  # the same for listings
    # file -> bytes sent before the connection drops, once
    cut_after: dict[str, int] = field(default_factory=dict)
    altered: dict[str, bytes] = field(default_factory=dict)  # file -> what is sent in place of its contents
    # file -> bytes sent before a long silence, once
    stall_after: dict[str, int] = field(default_factory=dict)
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)  # ends the silence
    delay: float = 0.0  # seconds before the contents of a large file
    signed: bool = False  # large files lie behind addresses that hold for the period they were given in
    period: int = 0
    excess: int = 0  # bytes sent of a large file beyond its size, by a server that announces no length
    portal: bool = False  # every answer is a login page
    circular: bool = False  # every answer sends the client to where it just was
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    sent: dict[str, int] = field(default_factory=dict)  # file -> bytes of its contents that went out
    url: str = ""

    def gets(self, name: str) -> list[tuple[str, str, str]]:
        return [r for r in self.requests if r[0] == "GET" and name in r[1]]

    def start(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def etag(data: bytes, large: bool) -> str:
    """HuggingFace's: sha256 of a large file, git's blob hash of a small one."""
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route(body=False)

    def do_GET(self) -> None:
        self._route(body=True)

    def _route(self, body: bool) -> None:
        hub, parts = self.hub, urlsplit(self.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
        if hub.portal:
            return self._answer(
                200, b"<html>Please log in to this network</html>", {"Content-Type": "text/html"}
            )
        if hub.circular:
            return self._answer(302, b"", {"Location": self.path})
        if path.startswith("/api/v1/"):
            return self._modelscope(path.removeprefix("/api/v1"), query)
        if path.startswith("/api/models/"):
            return self._huggingface_api(path.removeprefix("/api/models/"))
        owner_name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        headers = self._huggingface_fault(owner_name, revision, name)
        if headers is not None:
            return self._error(int(headers.pop("status")), headers)
        large = name.endswith((".safetensors", ".gguf"))
        if large and hub.signed and query.get("period") != str(hub.period):
            if query:
                return self._error(403, {})  # the address ran out
            size, tag = str(len(hub.files[name])), f'"{etag(hub.files[name], large)}"'
            place = f"http://localhost:{self.server.server_port}{path}?period={hub.period}"  # type: ignore[attr-defined]
            return self._answer(
                302,
                b"",
                {"Location": place, "X-Linked-ETag": tag, "X-Linked-Size": size, "X-Repo-Commit": COMMIT},
            )
        tag = f'"{etag(hub.files[name], large)}"'
        self._file(
            name, {"ETag": tag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(hub.files[name]))}, body
        )

    def _huggingface_fault(self, repo: str, revision: str, name: str) -> dict[str, str] | None:
        hub = self.hub
        if repo != hub.repo:
            return {"status": "401", "X-Error-Code": "RepoNotFound"}
        if hub.gated and "Authorization" not in self.headers:
            return {"status": "401", "X-Error-Code": "GatedRepo"}
        if revision not in hub.revisions:
            return {"status": "404", "X-Error-Code": "RevisionNotFound"}
        if name and name not in hub.files:
            return {"status": "404", "X-Error-Code": "EntryNotFound"}
        statuses = hub.statuses if name else hub.api_statuses
        return {"status": str(statuses.pop(0)), "Retry-After": "0"} if statuses else None

    def _huggingface_api(self, rest: str) -> None:
        hub = self.hub
        repo, kind, revision = rest.rpartition("/")[0].rpartition("/")
        words = rest.split("/")
        repo, kind, revision = (
            "/".join(words[:2]),
            words[2] if len(words) > 2 else "",
            "/".join(words[3:]) or "main",
        )
        headers = self._huggingface_fault(repo, revision, "")
        if headers is not None:
            return self._error(int(headers.pop("status")), headers)
        if kind == "tree":
            listing = []
            for name, data in hub.files.items():
                entry: dict[str, object] = {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": etag(data, False),
                }
                if name.endswith((".safetensors", ".gguf")):
                    entry["lfs"] = {"oid": etag(data, True), "size": len(data), "pointerSize": 134}
                listing.append(entry)
            return self._json(listing)
        self._json({
            "id": hub.repo, "modelId": hub.repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
            "likes": 0, "siblings": [{"rfilename": name} for name in hub.files],
        })  # fmt: skip

    def _modelscope(self, path: str, query: dict[str, str]) -> None:
        hub = self.hub
        if not path.startswith(f"/models/{hub.repo}"):
            return self._error(404, {})
        if hub.gated:
            return self._error(403, {})
        if query.get("Revision", "master") not in hub.revisions:
            return self._error(404, {})
        if path.endswith("/repo/files"):
            if hub.api_statuses:
                return self._error(hub.api_statuses.pop(0), {"Retry-After": "0"})
            files = [
                {
                    "Path": n,
                    "Name": n,
                    "Type": "blob",
                    "Size": len(d),
                    "Sha256": hashlib.sha256(d).hexdigest(),
                }
                for n, d in hub.files.items()
            ]
            return self._json({"Code": 200, "Success": True, "Data": {"Files": files}})
        name = query.get("FilePath", "")
        if path.endswith("/repo") and name in hub.files:
            if hub.statuses:
                return self._error(hub.statuses.pop(0), {"Retry-After": "0"})
            return self._file(name, {}, True)
        self._error(404, {})

    def _file(self, name: str, headers: dict[str, str], body: bool) -> None:
        """The contents, or the part a Range header asks for; a cut connection or altered contents if so set."""
        hub = self.hub
        data = hub.altered.get(name, hub.files[name])
        start, status = 0, 200
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            end = min(int(last), len(data) - 1) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data = data[start : end + 1]
        excess = self.hub.excess if body and name.endswith(".safetensors") else 0
        length = {} if excess else {"Content-Length": str(len(data))}
        self.send_response(status)
        for key, value in {**headers, **length, "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if excess:
            data += bytes(excess)
            self.close_connection = True
        if name in hub.cut_after:
            data = data[: hub.cut_after.pop(name)]
            self.close_connection = True
        if name.endswith((".safetensors", ".gguf")):
            threading.Event().wait(hub.delay)
        stall = hub.stall_after.pop(name, None)
        data = data[:stall]
        hub.sent[name] = hub.sent.get(name, 0) + len(data)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)
            self.wfile.flush()
        if stall is not None:
            hub.stalled.set()
            self.close_connection = True
            hub.released.wait(200)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, headers: dict[str, str]) -> None:
        self._answer(status, json.dumps({"error": f"status {status}"}).encode(), headers)

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)
