"""What the page says and does when the server does not serve: a sentence, and a way on."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

import qwenrt
from tests.browser.conftest import Talk
from tests.browser.talker import LONG
from tests.server.asking import Gate, serve
from tests.server.wire import Serving

KEY = "sk-of-the-page"


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(context: Any, llm: qwenrt.LLM) -> None:
    with serve(llm, api_keys=(KEY,)) as served:
        talk = Talk(context.new_page(), served.url, ready="dialog#key[open]")
        talk.until("Whoever runs the server can tell you one.")
        talk.page.fill("#key-value", "sk-wrong")
        talk.page.keyboard.press("Enter")
        talk.until("The server does not know this key.")
        talk.click("Cancel")
        talk.until("This server needs a key.")
        talk.click("Enter the key")
        talk.page.fill("#key-value", KEY)
        talk.click("Use this key")
        talk.page.wait_for_selector("#about:not([hidden])")
        assert talk.ask("Say: open") == "open"
        talk.reload()
        assert talk.answers == ["open"]
        kept = talk.page.evaluate("[JSON.stringify(localStorage), sessionStorage.getItem('key')]")
        assert KEY not in kept[0] and kept[1] == KEY
        talk.page.evaluate("sessionStorage.setItem('key', 'sk-changed')")
        talk.send("Say: again")
        talk.until("The server does not know this key.")
        talk.page.fill("#key-value", KEY)
        talk.click("Use this key")
        talk.until("again")
        talk.done()
        assert talk.answers == ["open", "again"] and not talk.errors


def test_a_server_that_is_gone_and_comes_back(context: Any, llm: qwenrt.LLM) -> None:
    with serve(llm) as served:
        port = served.port
        talk = Talk(context.new_page(), served.url)
        talk.send("Long")
        talk.until("Sentence 3 of")
    talk.until("Stopped.")  # a server that ends in order says so
    talk.done()
    talk.send("Say: you are back")
    talk.until("The server does not answer.")
    with serve(llm, port=port):
        talk.click("Try now")
        talk.until("you are back")
        talk.done()
        assert talk.answers[-1] == "you are back"


def test_a_connection_that_breaks_is_taken_up_again(context: Any, llm: qwenrt.LLM) -> None:
    """At once, when the server may not have read the question, and twice within the answer."""
    with serve(llm) as served:
        talk = Talk(context.new_page(), served.url)
        talk.send("Say: " + LONG[:3000])
        for mark in ("", "Sentence 5 of", "Sentence 30 of"):
            talk.wait(f"document.querySelector('.assistant > .text').innerText.includes('{mark}')")
            for connection in list(served.server.server_state.connections):
                # as a phone that changes its network; the browser itself may be closing one that it no longer needs
                with suppress(OSError):
                    connection.transport.get_extra_info("socket").shutdown(2)
        talk.done()
        assert talk.answers == [LONG[:3000].rstrip()] and not talk.errors
        assert sum("/v1/stream?conv_id=" in url for url in talk.requests) >= 2


@pytest.mark.parametrize(
    ("status", "words"), [(404, "The server says: no such route"), (502, "is being stopped")]
)
def test_a_server_that_does_not_say_what_it_is(
    context: Any, served: Serving, status: int, words: str
) -> None:
    """As behind a proxy that lets through some of its routes."""
    page, body = context.new_page(), '{"error": {"message": "no such route"}}'
    answer = {"status": status, "content_type": "application/json", "body": body}
    page.route("**/server_info", lambda route: route.fulfill(**answer), times=1)
    talk = Talk(page, served.url, ready="#banner:not([hidden])")
    talk.until(words)
    talk.click("Try now")
    page.wait_for_selector("#about:not([hidden])")
    assert not talk.errors


def test_a_full_queue_is_waited_for(talk: Talk) -> None:
    refused = []

    def refuse(route: Any) -> None:
        if refused:
            route.continue_()
            return
        refused.append(route)
        body = '{"error": {"message": "64 requests wait.", "code": "rate_limit_exceeded"}}'
        route.fulfill(status=429, headers={"Retry-After": "2", "Content-Type": "application/json"}, body=body)

    talk.page.route("**/v1/chat/completions", refuse)
    talk.send("Say: my turn")
    talk.until("Many are asking. Trying again in")
    talk.page.focus(".assistant .note button")
    talk.until("Trying again in 1 s.")
    assert talk.page.evaluate("document.activeElement.textContent") == "Try now"  # the same button, still
    talk.done()
    assert refused and talk.answers == ["my turn"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (503, "service_unavailable", "The server is being stopped. Trying again in"),
        (503, "queue_timeout", "It waited too long for its turn."),
        (400, "invalid_value", "The server says: it is wrong"),
        (500, "internal_error", "The server says: it is wrong"),
    ],
)
def test_every_refusal_has_a_sentence_and_a_way_on(talk: Talk, status: int, code: str, words: str) -> None:
    answer = {"status": status, "content_type": "application/json"}
    body = f'{{"error": {{"message": "it is wrong", "code": "{code}"}}}}'
    talk.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer, body=body), times=1)
    talk.send("Say: at last")
    talk.until(words)
    talk.page.get_by_role("button", name="Try now" if "stopped" in words else "Try again").click()
    talk.until("at last")
    talk.done()
    assert talk.answers == ["at last"]


def test_a_full_context_is_told_with_numbers_and_made_room_in(talk: Talk, gate: Gate) -> None:
    gate.before = lambda step: None
    for i in range(3):
        talk.ask(f"Say: {i} " + "apple pear plum " * 120)
    talk.send("Say: more " + "apple pear plum " * 240)
    talk.until("tokens and the model reads 8,192.")
    talk.click("Leave out the oldest messages")
    talk.until("What is above is no longer sent to the model")
    talk.wait("document.querySelector('.message:last-child > .text')?.innerText.startsWith('more apple')")
    talk.done()
    talk.click("New chat")
    talk.send("Say: " + "apple pear plum " * 4000)
    talk.until("This message alone has")
