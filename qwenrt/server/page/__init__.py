"""The page at `/`: one file for a browser, joined from the sources beside this one. Nothing is built or fetched."""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The script's parts, in their order: each uses those before it.
SCRIPTS = (
    "words.js",
    "markdown.js",
    "store.js",
    "server.js",
    "chats.js",
    "thread.js",
    "status.js",
    "list.js",
    "main.js",
)
STYLE, SCRIPT = "/*style*/", "/*script*/"  # their places in index.html


@dataclass(frozen=True)
class Page:
    """The page's bytes, as they are and compressed, its tag and the policy that browsers hold it to."""

    body: bytes
    compressed: bytes
    etag: str
    policy: str


@cache
def page() -> Page:
    """The page of this version."""
    style = _source("style.css")
    script = "\n".join(map(_source, SCRIPTS))
    body = _source("index.html").replace(STYLE, style).replace(SCRIPT, script).encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Page(body, gzip.compress(body, 9, mtime=0), etag, _policy(style, script))


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: this one script and this one style run, nothing else is loaded from anywhere, and only
    this server is spoken to. No text can become HTML either, whatever a script does with it (trusted types)."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(script)}",
            f"style-src {_hash(style)}",
            "connect-src 'self'",
            "img-src data:",  # the icon in the page itself
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
