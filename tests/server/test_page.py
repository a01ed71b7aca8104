"""The page's route over a socket: what is served, under which policy, to whom. tests/browser has what the page does."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwenrt
from qwenrt.cli.serve import _greeting
from qwenrt.server import app
from qwenrt.server.page import SCRIPTS, page
from qwenrt.server.settings import ServeSettings
from tests.server.asking import ask, serve
from tests.server.wire import Serving, request

MOST_BYTES, MOST_COMPRESSED, MOST_LINES = 80_000, 28_000, 1700
KEY = "sk-page"
DIRECTORY = Path(qwenrt.__file__).parent / "server" / "page"


@pytest.fixture(scope="module")
def llm() -> Iterator[qwenrt.LLM]:
    with qwenrt.load("demo", progress=False) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: qwenrt.LLM) -> Iterator[Serving]:
    with serve(llm, api_keys=(KEY,)) as running:
        yield running


def source(name: str) -> str:
    return (DIRECTORY / name).read_text(encoding="utf-8")


def policy_of(headers: dict[str, str]) -> dict[str, list[str]]:
    """The directives of a Content-Security-Policy."""
    directives = [one.split() for one in headers["content-security-policy"].split(";")]
    return {name: values for name, *values in directives}


def test_the_page_is_one_file_that_loads_nothing(served: Serving) -> None:
    status, headers, body = ask(served, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    text = body.decode()
    assert len(body) <= MOST_BYTES and text.count("\n") <= MOST_LINES
    assert len(re.findall("<script", text)) == 1 and len(re.findall("<style", text)) == 1
    assert not re.search(r"<\w[^>]*\b(?:src|srcset|action)=|url\(|@import", text)
    addresses = re.findall(r"https?://[\w.]+", text)
    assert set(addresses) <= {"http://www.w3.org"}  # the names of SVG, which nobody opens
    for risky in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "javascript:",
    ):
        assert risky not in text


def test_the_policy_names_the_one_script_and_style_by_their_content(served: Serving) -> None:
    _, headers, body = ask(served, "/")
    raw = headers["content-security-policy"]
    found = {}
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>".encode(), body, re.DOTALL)
        found[tag] = base64.b64encode(hashlib.sha256(content).digest()).decode()
    # the client of these tests lowers headers, so that digests are compared in lower case
    policy = policy_of(headers)
    assert policy["script-src"] == [f"'sha256-{found['script'].lower()}'"]
    assert policy["style-src"] == [f"'sha256-{found['style'].lower()}'"]
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == ["'none'"]
    assert policy["connect-src"] == ["'self'"] and "unsafe" not in raw and "*" not in raw
    assert found["script"] in page().policy and found["style"] in page().policy
    assert headers["x-frame-options"] == "deny" and headers["x-content-type-options"] == "nosniff"


def test_it_needs_no_key_and_tells_nothing_that_does(served: Serving) -> None:
    assert ask(served, "/")[2] == page().body
    assert ask(served, "/server_info")[0] == 401
    status, _, told = ask(served, "/server_info", authorization=f"Bearer {KEY}")
    assert (status, told["built_in"], told["thinking"]) == (200, True, "never")
    assert set(told["sampling"]) == {"temperature", "top_p", "top_k"}


def test_it_is_kept_by_browsers_and_asked_about(served: Serving) -> None:
    _, headers, body = ask(served, "/")
    assert headers["cache-control"] == "no-cache" and headers["vary"] == "accept-encoding"
    status, again, nothing = ask(served, "/", if_none_match=headers["etag"])
    assert (status, nothing) == (304, b"") and again["content-security-policy"]
    assert ask(served, "/", if_none_match='"another"')[0] == 200
    _, packed, compressed = ask(served, "/", accept_encoding="br, gzip")
    assert packed["content-encoding"] == "gzip" and gzip.decompress(compressed) == body
    assert len(compressed) <= MOST_COMPRESSED


def test_head_and_other_methods(served: Serving) -> None:
    with served.wire(request("HEAD", "/", {"connection": "close"})) as wire:
        came = wire.rest()
    assert came.startswith(b"HTTP/1.1 200") and came.endswith(b"\r\n\r\n")
    assert f"content-length: {len(page().body)}".encode() in came
    assert ask(served, "/", b"{}", authorization=f"Bearer {KEY}")[0] == 405
    for path in ("/index.html", "/main.js", "/page", "/style.css"):
        assert ask(served, path, authorization=f"Bearer {KEY}")[0] == 404


def test_it_is_for_this_servers_own_names(served: Serving) -> None:
    assert ask(served, "/", host="evil.example")[0] == 403
    assert ask(served, "/", origin="https://evil.example")[0] == 403
    # a link to it
    assert ask(served, "/", host=f"127.0.0.1:{served.port}", sec_fetch_site="cross-site")[0] == 200


def test_without_it_there_is_a_line_that_says_what_is_served(llm: qwenrt.LLM) -> None:
    with serve(llm, page=False) as running:
        status, headers, body = ask(running, "/")
    assert status == 200 and headers["content-type"].startswith("text/plain") and b"serves demo" in body
    assert "content-security-policy" not in headers


def test_the_greeting_says_where_it_is(llm: qwenrt.LLM) -> None:
    line = "Open http://127.0.0.1:8000/ in a browser"
    assert line in _greeting(llm, ServeSettings(), "http://127.0.0.1:8000", "demo")
    assert line not in _greeting(llm, ServeSettings(page=False), "http://127.0.0.1:8000", "demo")


def test_every_word_is_there_in_both_languages_and_used() -> None:
    table = source("words.js").split("const WORDS = {")[1].split("\n}\n")[0]
    words = re.findall(r"(?:^\t| )(\w+): \[(\".*?\"|\[.*?\])(?:, )?(\".*?\"|\[.*?\])?\]", table, re.MULTILINE)
    assert len(words) > 90 and all(english and chinese for _, english, chinese in words)
    assert (
        len(words)
        == len(re.findall(r"(?:^\t| )\w+: \[", table, re.MULTILINE))
        == len({name for name, *_ in words})
    )
    others = source("index.html") + "".join(source(name) for name in SCRIPTS if name != "words.js")
    known = {name for name, *_ in words}
    assert [word for word in known if not re.search(rf'"{word}"|[{{, ]{word}[:,]|\.{word}\b', others)] == []
    told = set(re.findall(r'data-(?:t|label|placeholder)="(\w+)"|\bsay\("(\w+)"', others))
    assert {one or other for one, other in told} <= known


def test_the_built_in_model_answers_what_the_page_proposes(llm: qwenrt.LLM) -> None:
    [proposed] = re.findall(r"toyIdeas: (\[\[.*\]\]),", source("words.js"))
    right = [["Paris", "capitals", "blue"], ["Qwen", "东京", "首都"]]
    for questions, answers in zip(json.loads(proposed), right, strict=True):
        for question, word in zip(questions, answers, strict=True):
            assert word in llm.chat(question)[0], question


def test_its_sources_are_in_the_package() -> None:
    assert {path.name for path in DIRECTORY.glob("*.js")} == set(SCRIPTS)
    packaged = re.search(
        r'"qwenrt.server.page" = (\[.*\])', (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    assert packaged and set(json.loads(packaged[1])) == {"*.html", "*.css", "*.js"}


def test_it_is_the_same_in_an_application_around_it(llm: qwenrt.LLM) -> None:
    assert app(llm).settings.page
