"""Whether everybody can use the page: axe-core's judgement, the keyboard, what is announced, narrow screens."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.client_envs import AXE, CACHE, cache_directory, made_of
from tests.browser.conftest import Talk
from tests.server.wire import Serving

TEXT = """# Head

Some *words* and `code`.

- one
- two

| a | b |
|---|---|
| 1 | 2 |

```py
print(1)
```

> said

[link](https://a.example)"""
NAME = "ariaLabel || document.activeElement.id || document.activeElement.textContent.trim()"


@pytest.fixture(scope="module")
def axe() -> str:
    if not made_of(AXE, cache_directory()):
        pytest.skip(f"axe-core is not there: python scripts/client_envs.py {AXE} ({CACHE} says where to)")
    return (cache_directory() / AXE / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def faults(page: Any, axe: str) -> list[str]:
    """What axe-core calls serious or critical on what is shown."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{one['id']}: {node['html'][:160]} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 320])
def test_axe_finds_nothing_serious(browser: Any, served: Serving, axe: str, colours: str, width: int) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 700}, color_scheme=colours, locale="en-US"
    )
    talk = Talk(context.new_page(), served.url)
    page = talk.page
    found = [("empty", faults(page, axe))]
    talk.ask(f"Say: {TEXT}")
    talk.click("Answer again")
    talk.done()
    page.locator(".thought summary").click()
    found.append(("chat", faults(page, axe)))
    if width == 320:
        talk.click("Show the list of chats")
        found.append(("list", faults(page, axe)))
    talk.click("Settings")
    found.append(("settings", faults(page, axe)))
    assert [(where, those) for where, those in found if those] == []
    context.close()


def test_targets_are_large_enough_and_nothing_is_beside_a_narrow_screen(
    browser: Any, served: Serving
) -> None:
    context = browser.new_context(viewport={"width": 320, "height": 640}, locale="en-US", has_touch=True)
    talk = Talk(context.new_page(), served.url)
    talk.ask(f"Say: {TEXT}")
    small = talk.page.evaluate(
        """() => [...document.querySelectorAll("button, summary, input, textarea")].filter(node => {
            const box = node.getBoundingClientRect();
            return node.checkVisibility() && box.width && (box.width < 24 || box.height < 24);
        }).map(node => node.outerHTML.slice(0, 120))"""
    )
    assert small == []
    assert talk.page.evaluate("document.documentElement.scrollWidth") <= 320
    assert talk.page.evaluate("document.querySelector('#scroll').scrollWidth") <= 320
    context.close()


def test_whole_sentences_are_announced_once(talk: Talk) -> None:
    text = "The first sentence is here. The second one, too! 第三句。And the end"
    seen: list[str] = []
    talk.page.expose_function("seen", lambda text: seen.append(text))
    talk.page.evaluate(
        """() => new MutationObserver(list => {
            for (const change of list) for (const node of change.addedNodes) window.seen(node.textContent);
        }).observe(document.querySelector("[role=log]"), { childList: true, subtree: true })"""
    )
    talk.ask(f"Say: {text}")
    talk.page.wait_for_timeout(100)
    assert seen == ["The first sentence is here.", "The second one, too!", "第三句。", "And the end"]


def test_everything_is_within_reach_of_the_keyboard(talk: Talk) -> None:
    talk.ask("Say: one")
    page, found = talk.page, set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(40):
        page.keyboard.press("Tab")
        found.add(page.evaluate(f"document.activeElement.{NAME}"))
    assert {
        "Copy",
        "Answer again",
        "Edit",
        "Attach text files",
        "Message",
        "Search chats",
        "Dark colours",
    } <= found
    assert any("Settings" in one for one in found)


def test_motion_is_reduced_where_it_is_asked_for(browser: Any, served: Serving) -> None:
    context = browser.new_context(reduced_motion="reduce", locale="en-US")
    talk = Talk(context.new_page(), served.url)
    talk.send("Long")
    talk.until("Sentence 2 of")
    assert talk.page.evaluate("document.getAnimations().length") == 0
    talk.page.keyboard.press("Escape")
    talk.done()
    context.close()


def test_the_first_paint_is_told(talk: Talk, record_property: Any) -> None:
    """Measured and written down, not judged: machines differ."""
    talk.reload()
    paint = talk.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    record_property("first_contentful_paint_ms", paint)
    print(f"first contentful paint: {paint:.0f} ms")
    assert paint > 0
