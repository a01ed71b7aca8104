"""Talking on the page: writing, stopping, answering again, branches, going on, what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Talk
from tests.browser.talker import LONG, THOUGHT
from tests.server.asking import Gate


def test_an_answer_streams_and_says_what_it_took(talk: Talk, gate: Gate) -> None:
    talk.send("Say: Rain and **sun** make a bow.")
    talk.until("Rain and sun")
    talk.done()
    assert talk.answers == ["Rain and sun make a bow."]
    page = talk.page
    assert page.locator(".assistant .text strong").inner_text() == "sun"
    assert "tokens/s" in page.locator(".figures").inner_text()
    assert "of 8,192 tokens used" in page.locator("#context").inner_text()
    assert "scripted-qwen3 · cpu · float32" in page.locator("#about").inner_text()
    assert page.evaluate("document.activeElement.id") == "prompt"
    thought = page.locator(".thought")
    assert thought.locator("summary").inner_text().startswith("Thought for")
    assert not thought.locator(".text").is_visible()
    thought.locator("summary").click()
    assert thought.locator(".text").inner_text() == THOUGHT
    assert page.title() == "Say: Rain and **sun** make a bow. · qwenrt"
    assert all(address.startswith(talk.url) or address.startswith("data:") for address in talk.requests)


def test_what_was_said_is_sent_back_as_it_was_with_its_thought(talk: Talk) -> None:
    talk.ask("Say: *one* `two`")
    with talk.page.expect_request("**/chat/completions") as sent:
        talk.ask("Say: three")
    messages = sent.value.post_data_json["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[1] == {
        "role": "assistant",
        "content": "*one* `two`",
        "reasoning_content": messages[1]["reasoning_content"],
    }
    assert THOUGHT in messages[1]["reasoning_content"]


def test_stop_then_go_on(talk: Talk) -> None:
    talk.send("Long")
    talk.until("Sentence 3 of")
    talk.page.keyboard.press("Escape")
    talk.until("Stopped.")
    talk.done()
    [stopped] = talk.answers
    assert LONG.startswith(stopped) and len(stopped) < len(LONG)
    talk.click("Continue")
    talk.wait(f"document.querySelector('.assistant > .text').innerText.length > {len(stopped) + 30}")
    talk.click("Stop")
    talk.done()
    [further] = talk.answers
    assert LONG.startswith(further) and len(further) > len(stopped) + 30


def test_branches_of_answers_and_of_questions(talk: Talk) -> None:
    talk.ask("Say: first")
    talk.click("Answer again")
    talk.done()
    assert talk.page.locator(".assistant .branches").inner_text().startswith("2/2")
    talk.click("Edit")
    talk.page.fill(".user textarea", "Say: second")
    talk.page.press(".user textarea", "Enter")
    talk.wait("document.querySelector('.user .body')?.innerText === 'Say: second'")
    talk.done()
    assert (talk.questions, talk.answers) == (["Say: second"], ["second"])
    talk.click("The version before")
    talk.wait("document.querySelector('.user .body').innerText === 'Say: first'")
    assert talk.page.locator(".branches").count() == 2
    talk.click("The version before")
    assert "1/2" in talk.page.locator(".assistant .branches").inner_text()
    talk.reload()
    assert talk.questions == ["Say: first"] and talk.page.locator(".branches").count() == 2


def test_settings_are_sent_and_kept(talk: Talk) -> None:
    talk.click("Settings")
    page = talk.page
    page.get_by_label("System prompt").fill("Be brief.")
    for field, value in {
        "Temperature": "0.3",
        "Top-p": "0.9",
        "Top-k": "20",
        "Longest answer (tokens)": "7",
        "Seed": "5",
    }.items():
        page.get_by_label(field, exact=True).fill(value)
    page.get_by_label("Seed").press("Tab")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Thinking").click()
    with page.expect_request("**/chat/completions") as sent:
        talk.ask("Say: one two three four five six seven eight nine ten eleven")
    body = sent.value.post_data_json
    wanted = {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 20,
        "max_tokens": 7,
        "seed": 5,
        "enable_thinking": False,
    }
    assert {name: body.get(name) for name in wanted} == wanted
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    talk.until("The answer reached its length limit.")
    assert page.locator(".thought:visible").count() == 0
    talk.reload()
    talk.click("Settings")
    assert page.get_by_label("Top-k").input_value() == "20"
    assert page.get_by_label("System prompt").input_value() == "Be brief."


@pytest.mark.parametrize("when", ["while it is computed", "while it is written", "twice"])
def test_a_reload_loses_and_doubles_nothing(talk: Talk, gate: Gate, when: str) -> None:
    talk.page.evaluate("document.body.dataset.before = 1")
    with gate.closed():
        talk.send("Say: " + LONG[:1500])
        if when == "while it is computed":
            gate.waiting.wait(10)
            talk.reload()
    if when != "while it is computed":
        talk.until("Sentence 5 of")
        talk.reload()
    if when == "twice":
        talk.until("Sentence 20 of")
        talk.reload()
    assert talk.page.evaluate("document.body.dataset.before") is None
    talk.until("Sentence 45 of")
    talk.done()
    assert talk.answers == [LONG[:1500].rstrip()]


def test_chats_are_listed_found_renamed_and_deleted(talk: Talk) -> None:
    page = talk.page
    for text in ("Say: apples", "Say: pears"):
        talk.ask(text)
        page.keyboard.press("Control+Shift+N")
    assert page.locator("#list .open").all_inner_texts() == ["Say: pears", "Say: apples"]
    page.keyboard.press("Control+k")
    page.keyboard.type("APP")
    talk.wait("document.querySelectorAll('#list li').length === 1")
    page.fill("#search", "")
    page.get_by_role("button", name="Rename: Say: apples").click()
    page.keyboard.type("Fruit")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Fruit", exact=True).click()
    talk.wait("document.title === 'Fruit · qwenrt'")
    assert talk.answers == ["apples"]
    page.get_by_role("button", name="Delete: Fruit").click()
    talk.until("“Fruit” is deleted.")
    assert page.locator("#list .open").all_inner_texts() == ["Say: pears"]
    talk.click("Undo")
    talk.wait("document.querySelectorAll('#list li').length === 2")
    assert talk.answers == ["apples"]


def test_export_and_import(talk: Talk, browser: Any, tmp_path: Path) -> None:
    talk.ask("Say: kept <b>words</b>")
    talk.click("Answer again")
    talk.done()
    talk.click("Settings")
    with talk.page.expect_download() as download:
        talk.click("Export as a file")
    path = tmp_path / "chats.json"
    download.value.save_as(path)
    file = json.loads(path.read_text())
    assert file["format"] == "qwenrt-chats" and len(file["chats"][0]["messages"]) == 3
    context = browser.new_context(locale="en-US")
    other = Talk(context.new_page(), talk.url)
    other.click("Settings")
    for added in ("1 chats and 3 messages are new.", "0 chats and 0 messages are new."):
        other.page.set_input_files("#pick-import", path)
        other.until(added)
    other.page.locator("#list .open").click()
    other.until("kept <b>words</b>")
    assert other.page.locator(".assistant .branches").inner_text().startswith("2/2")
    for bad in (
        "{",
        "[]",
        '{"format": "qwenrt-chats", "chats": [{"id": "../x"}]}',
        '{"format": "qwenrt-chats", "chats": 5}',
    ):
        path.write_text(bad)
        other.page.set_input_files("#pick-import", path)
        other.until("is not a file of exported chats")
    assert not other.errors
    context.close()


def test_two_tabs_make_two_branches(talk: Talk, context: Any) -> None:
    talk.ask("Say: root")
    other = Talk(context.new_page(), talk.page.url)
    other.until("root")
    other.page.fill("#prompt", "Say: from the other")
    talk.page.fill("#prompt", "Say: from the first")
    talk.page.press("#prompt", "Enter")
    other.page.press("#prompt", "Enter")
    for one in (talk, other):
        one.wait("document.querySelectorAll('.message').length === 4")
        one.done()
    talk.reload()
    talk.page.locator("#list .open").first.wait_for()
    kept = talk.page.evaluate(
        """async () => {
            const open = indexedDB.open("qwenrt");
            await new Promise(resolve => { open.onsuccess = resolve; });
            const all = open.result.transaction("messages").objectStore("messages").getAll();
            await new Promise(resolve => { all.onsuccess = resolve; });
            return all.result.map(one => [one.role, one.text, one.state]);
        }"""
    )
    texts = [text for _, text, _ in kept]
    for text in ("Say: from the other", "Say: from the first", "from the other", "from the first"):
        assert texts.count(text) == 1
    assert len(kept) == 6 and {state for *_, state in kept} == {"done"}


def test_a_second_tab_follows_an_answer(talk: Talk, context: Any) -> None:
    talk.send("Say: " + LONG[:1500])
    talk.until("Sentence 3 of")
    other = Talk(context.new_page(), talk.page.url)
    other.until("Sentence 45 of")
    talk.done()
    other.done()
    assert other.answers == talk.answers == [LONG[:1500].rstrip()]
    other.reload()
    assert other.answers == talk.answers


def test_files_are_read_in_the_browser(talk: Talk) -> None:
    files = [{"name": "poem.txt", "mimeType": "text/plain", "buffer": "A ```fence``` 诗".encode()}]
    talk.page.set_input_files("#pick-files", files)
    talk.page.fill("#prompt", "Read it")
    with talk.page.expect_request("**/chat/completions") as sent:
        talk.page.press("#prompt", "Enter")
    assert (
        sent.value.post_data_json["messages"][0]["content"]
        == "Read it\n\npoem.txt:\n````\nA ```fence``` 诗\n````"
    )
    talk.done()
    assert talk.page.locator(".user .chips").inner_text() == "poem.txt"
    talk.page.set_input_files(
        "#pick-files", [{"name": "x.png", "mimeType": "image/png", "buffer": b"\x89PNG\0\xff"}]
    )
    talk.until("x.png is not a text file.")
    talk.page.set_input_files(
        "#pick-files", [{"name": "big.txt", "mimeType": "text/plain", "buffer": b"a" * 300_000}]
    )
    talk.until("big.txt has more than 256 KiB.")


def test_enter_within_an_input_method_chooses_a_word(talk: Talk) -> None:
    session = talk.page.context.new_cdp_session(talk.page)
    talk.page.focus("#prompt")
    session.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
    for kind in ("rawKeyDown", "keyUp"):
        session.send(
            "Input.dispatchKeyEvent",
            {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229},
        )
    assert talk.questions == []
    session.send("Input.insertText", {"text": "你好"})
    assert talk.page.input_value("#prompt") == "你好"
    talk.page.press("#prompt", "Shift+Enter")
    talk.page.keyboard.type("x")
    assert talk.page.input_value("#prompt") == "你好\nx" and talk.questions == []
    talk.page.press("#prompt", "Enter")
    talk.wait("document.querySelectorAll('.message').length === 2")
    talk.done()
    assert talk.questions == ["你好\nx"]


def test_copied_texts_are_raw(talk: Talk) -> None:
    talk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    talk.ask("Say: **b**\n\n```py\na = 1\n\nb = 2\n```")
    talk.click("Copy the code")
    assert talk.page.evaluate("navigator.clipboard.readText()") == "a = 1\n\nb = 2"
    talk.click("Copy")
    assert talk.page.evaluate("navigator.clipboard.readText()") == "**b**\n\n```py\na = 1\n\nb = 2\n```"


def test_language_and_colours(talk: Talk, browser: Any) -> None:
    page = talk.page
    talk.ask("Say: 你好")
    assert page.locator(".assistant > .text").get_attribute("lang") == "zh"
    talk.click("中文")
    talk.until("新对话")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    talk.click("深色")
    assert page.evaluate("document.documentElement.className") == "dark"
    talk.reload()
    assert page.evaluate("[document.documentElement.lang, document.documentElement.className]") == [
        "zh-CN",
        "dark",
    ]
    context = browser.new_context(locale="zh-CN", color_scheme="dark")
    other = Talk(context.new_page(), talk.url)
    other.until("今天想聊点什么？")
    assert other.page.evaluate("document.documentElement.className") == "dark"
    assert not other.errors
    context.close()
