"""The page in a real browser without a window: `make browser`. Skipped where there is no browser or no playwright."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from tests.browser.talker import talker
from tests.server.asking import Gate, serve
from tests.server.scripted import scripted_llm
from tests.server.wire import Serving

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ),
]
STEP = 0.004  # seconds a token
PATIENCE = 120.0  # seconds until a test gives up: a browser beside other work is slow


def browser_program() -> str | None:
    """Where a Chromium is: what QWENRT_BROWSER names, or one of PROGRAMS."""
    return os.environ.get("QWENRT_BROWSER") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: make browser"
    )
    program = browser_program()
    if program is None:
        pytest.skip(
            f"no browser: none of {', '.join(PROGRAMS)} is on the path, and QWENRT_BROWSER names none"
        )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def llm() -> Iterator[qwenrt.LLM]:
    """A scripted model that thinks or not, with a context of 8192 tokens."""
    loaded = scripted_llm(talker, max_model_len=8192)
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def gate(llm: qwenrt.LLM) -> Gate:
    return Gate(llm)


@pytest.fixture(autouse=True)
def pace(gate: Gate) -> None:
    """Each test begins with a model that writes slowly enough to be seen."""
    gate.before = lambda step: time.sleep(STEP)


@pytest.fixture(scope="session")
def served(llm: qwenrt.LLM, gate: Gate) -> Iterator[Serving]:
    with serve(llm) as running:
        yield running


class Talk:
    """A page, and what a person does there. ``requests``: the addresses that it asked for; ``errors``: what went wrong
    in its script."""

    def __init__(self, page: Any, url: str, ready: str = "#about:not([hidden])") -> None:
        self.page, self.url = page, url
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))
        page.on("console", self._console)
        page.goto(url)
        page.wait_for_selector(ready)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            self.errors.append(message.text)

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector("#about:not([hidden])")

    def send(self, text: str) -> None:
        """Send a message, and wait until its answer is asked for."""
        before = self.page.locator(".message").count()
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")
        self.wait(f"document.querySelectorAll('.message').length === {before + 2}")

    def ask(self, text: str) -> str:
        """Send a message and wait for the whole answer."""
        self.send(text)
        self.done()
        return self.answers[-1]

    def done(self) -> None:
        """Wait until nothing is being written."""
        self.wait("document.querySelector('#stop').hidden && !document.querySelector('.running')")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true. Its policy lets no driver wait inside the page, rightly."""
        end = time.monotonic() + PATIENCE
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"it did not come to {condition}"
            self.page.wait_for_timeout(20)

    def until(self, text: str) -> None:
        """Wait until a text is shown."""
        self.page.get_by_text(text).first.wait_for()

    def click(self, name: str, nth: int = -1) -> None:
        """Click a button by the name that it has for everybody."""
        buttons = self.page.get_by_role("button", name=name, exact=True)
        (buttons.last if nth < 0 else buttons.nth(nth)).click()

    @property
    def answers(self) -> list[str]:
        """The texts of all answers that are shown."""
        return list(self.page.locator(".assistant > .text").all_inner_texts())

    @property
    def questions(self) -> list[str]:
        return list(self.page.locator(".user .body").all_inner_texts())


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A browser that has been nowhere yet."""
    made = browser.new_context(viewport={"width": 1200, "height": 800}, locale="en-US", accept_downloads=True)
    made.set_default_timeout(1000 * PATIENCE)
    yield made
    made.close()


@pytest.fixture
def talk(context: Any, served: Serving) -> Iterator[Talk]:
    one = Talk(context.new_page(), served.url)
    yield one
    assert not one.errors


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
