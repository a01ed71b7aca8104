"""What becomes of texts on the page: Markdown as it should be, hostile Markdown, long texts and long chats."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from tests.browser.conftest import Talk
from tests.server.asking import Gate

SOURCE = (Path(qwenrt.__file__).parent / "server" / "page" / "markdown.js").read_text(encoding="utf-8")
# Shows texts with the page's own reader, within the page and its policy.
READER = "const copyButton = () => document.createElement('button');" + SOURCE
SHOWN = f"""texts => {{ {READER}
    return texts.map(text => {{
        const root = document.createElement("div");
        new MarkdownView(root).push(text);
        return root.innerHTML;
    }});
}}"""
GROWN = f"""([text, size]) => {{ {READER}
    const whole = document.createElement('div'), grown = document.createElement('div'), view = new MarkdownView(grown);
    new MarkdownView(whole).push(text);
    for (let at = 0; at < text.length; at += size) view.push(text.slice(at, at + size));
    return [whole.innerHTML, grown.innerHTML];
}}"""
EXAMPLES = {
    "# One\n## Two #": "<h3>One</h3><h4>Two</h4>",
    "*a* **b** ***c*** ~~d~~ `e*f*` snake_case_word": "<p><em>a</em> <strong>b</strong> <em><strong>c</strong></em> "
    "<del>d</del> <code>e*f*</code> snake_case_word</p>",
    "**你好。**后面": "<p><strong>你好。</strong>后面</p>",
    "- a\n  - b\n- c\n\n3. d\n4. e": "<ul><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ul>"
    '<ol start="3"><li><p>d</p></li><li><p>e</p></li></ol>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a_1$ and $x_1*y*$ and \\(a*b*\\)": '<p>a_1$ and <span class="math">$x_1*y*$</span> and '
    '<span class="math">\\(a*b*\\)</span></p>',
    "[x](javascript:alert(1)) [y](data:text/html,z) <b>c</b>": "<p>[x](javascript:alert(1)) "
    "[y](data:text/html,z) &lt;b&gt;c&lt;/b&gt;</p>",
    "![pic](https://a.example/b)": '<p><a href="https://a.example/b" title="https://a.example/b" target="_blank" '
    'rel="noopener noreferrer nofollow">pic</a></p>',
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "one\ntwo\n\n---": "<p>one<br>two</p><hr>",
}
ALLOWED = {
    *(
        "P",
        "H3",
        "H4",
        "H5",
        "H6",
        "HR",
        "BR",
        "BLOCKQUOTE",
        "UL",
        "OL",
        "LI",
        "DIV",
        "TABLE",
        "THEAD",
        "TBODY",
        "TR",
    ),
    *("TH", "TD", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "PRE", "CODE", "EM", "STRONG", "DEL", "A"),
}
PIECES = [
    *(
        "<script>hit()</script>",
        "<img src=x onerror=hit()>",
        "<svg onload=hit()>",
        "<iframe src='https://evil.example'></iframe>",
    ),
    *(
        "[a](javascript:hit())",
        "[a](JaVaScRiPt:hit())",
        "[a](java\tscript:hit())",
        "[a](data:text/html,<script>hit()</script>)",
    ),
    *(
        "![a](https://evil.example/x.png)",
        "[a](https://evil.example)",
        "<https://evil.example>",
        "[a](<javascript:hit()>)",
    ),
    *(
        "[a](//evil.example)",
        "[a](vbscript:hit())",
        "[a]( \x01javascript:hit())",
        "[a](https://u:p@evil.example)",
        "&#106;avascript:",
    ),
    *(
        "<style>*{background:url(https://evil.example)}</style>",
        "<a href=javascript:hit()>x</a>",
        "[![a](b)](javascript:hit())",
    ),
    *(
        "# ",
        "## ",
        "- ",
        "1. ",
        "> ",
        "|a|b|\n|-|:-:|\n|",
        "|",
        "```",
        "```js\n",
        "~~~",
        "`",
        "``",
        "*",
        "**",
        "_",
        "~~",
        "$",
        "$$",
    ),
    *(
        "\\(",
        "\\[",
        "\\]",
        "\\",
        "[",
        "]",
        "](",
        "(",
        ")",
        "<",
        ">",
        "!",
        "\n",
        "\n\n",
        "  \n",
        "    ",
        "\t",
        " ",
        "x",
        "字",
        "🙂",
    ),
    *(
        "\u202e",
        "\u2028",
        "\x00",
        "\ud800",
        "<!--",
        "-->",
        "]]>",
        "http://",
        "https://evil.example/?a=",
        "mailto:a@b.c",
        '"',
        "'",
    ),
]


def shown(page: Any, texts: list[str]) -> list[str]:
    found: list[str] = page.evaluate(SHOWN, texts)
    return found


def test_markdown_is_shown_as_it_is_meant(talk: Talk) -> None:
    assert dict(zip(EXAMPLES, shown(talk.page, list(EXAMPLES)))) == EXAMPLES
    [table] = shown(talk.page, ["|a|b|\n|-|-:|\n|1|2\\|3|\nrest"])
    assert (
        "<th>a</th>" in table.replace(' style=""', "")
        and 'style="text-align: right;">2|3</td>' in table
        and table.endswith("<p>rest</p>")
    )
    [code] = shown(talk.page, ["```py\nif a:\n    b\n```\nc"])
    assert "<span>py</span>" in code and "if a:\n    b\n</code>" in code and code.endswith("<p>c</p>")


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_text_that_grows_becomes_what_it_is_as_a_whole(talk: Talk, size: int) -> None:
    for text in [
        *EXAMPLES,
        "|a|b|\n|-|-|\n|1|2|\n|3|4|\n\nx",
        "```\na\n\nb\n```\nc\n- d\n- e\n\nf",
        "a | b\n--- | ---\n1 | 2",
    ]:
        whole, grown = talk.page.evaluate(GROWN, [text, size])
        assert grown == whole, text


def test_hostile_texts_are_only_texts(talk: Talk) -> None:
    pick = random.Random(5)
    talk.page.evaluate("() => { window.hits = 0; window.hit = () => { window.hits++; }; }")
    talk.requests.clear()
    check = f"""texts => {{ {READER}
        const names = new Set(), attributes = new Set(), schemes = new Set(), room = document.getElementById("thread");
        for (const text of texts) {{
            const root = document.createElement("div");
            room.append(root);
            const view = new MarkdownView(root);
            for (let at = 0; at < text.length; at += 17) view.push(text.slice(at, at + 17));
            for (const node of root.querySelectorAll("*")) {{
                names.add(node.nodeName);
                for (const {{ name }} of node.attributes) attributes.add(`${{node.nodeName}} ${{name}}`);
                if (node.nodeName === "A") schemes.add(node.protocol);
            }}
            root.remove();
        }}
        return [[...names], [...attributes], [...schemes]];
    }}"""
    names: set[str] = set()
    attributes: set[str] = set()
    schemes: set[str] = set()
    for _ in range(20):
        texts = ["".join(pick.choices(PIECES, k=pick.randrange(1, 25))) for _ in range(500)]
        found = talk.page.evaluate(check, [text.encode("utf-8", "replace").decode() for text in texts])
        for known, more in zip((names, attributes, schemes), found):
            known.update(more)
    assert names <= ALLOWED and {"A", "TABLE", "PRE", "STRONG", "LI"} <= names
    assert schemes <= {"http:", "https:", "mailto:"}
    assert {one.split()[1] for one in attributes} <= {
        "href",
        "title",
        "target",
        "rel",
        "class",
        "start",
        "style",
        "tabindex",
    }
    assert {one for one in attributes if one.endswith((" href", " src"))} == {"A href"}
    assert talk.page.evaluate("window.hits") == 0 and talk.requests == []


def test_a_hostile_answer_is_only_text(talk: Talk) -> None:
    talk.page.evaluate("() => { window.hits = 0; window.hit = () => { window.hits++; }; }")
    talk.requests.clear()
    text = " ".join(piece for piece in PIECES[:20] if "\n" not in piece)
    talk.ask(f"Say: {text}")
    talk.reload()
    assert "<script>hit()</script>" in talk.answers[0] and "onerror=hit()" in talk.questions[0]
    assert talk.page.evaluate("window.hits") in (0, None)
    assert all(address.startswith((talk.url, "data:")) for address in talk.requests)
    assert talk.page.locator("#thread img, #thread script, #thread iframe, #thread style").count() == 0


FRAMES = """() => {
    window.slow = [];
    const observer = new PerformanceObserver(list => {
        for (const one of list.getEntries()) window.slow.push(one.duration);
    });
    observer.observe({ type: "long-animation-frame", buffered: false });
}"""


@pytest.mark.parametrize("kind", ["paragraphs", "one paragraph", "code", "list", "table"])
def test_an_answer_of_100_kb_is_appended_to(talk: Talk, kind: str) -> None:
    """Not a deadline: what is made anew at each piece stays small, in nodes, however long the text has become."""
    text = {
        "paragraphs": "Some words of a paragraph that is not long.\n\n" * 2300,
        "one paragraph": "Some words of a paragraph. " * 3800,
        "code": "```\n" + "for i in range(10): print(i)\n" * 3500,
        "list": "- an item of a list\n" * 5000,
        "table": "| a | b |\n|---|---|\n" + "| one | two |\n" * 7000,
    }[kind]
    assert len(text) > 95_000
    made = talk.page.evaluate(
        f"""text => {{ {READER}
            const root = document.createElement("div"), view = new MarkdownView(root), made = [];
            let count = 0;
            const create = document.createElement.bind(document);
            document.createElement = (...args) => {{ count++; return create(...args); }};
            for (let at = 0; at < text.length; at += 500) {{
                count = 0;
                view.push(text.slice(at, at + 500));
                made.push(count);
            }}
            document.createElement = create;
            return [made.at(-2), made[10], root.textContent.length];
        }}""",
        text,
    )
    assert made[0] <= max(60, 3 * made[1] + 60) and made[2] > 40_000


def test_200_messages_and_a_long_answer(talk: Talk, gate: Gate) -> None:
    gate.before = lambda step: None
    talk.ask("Say: seed")
    talk.page.evaluate(
        """async () => {
            const open = indexedDB.open("qwenrt");
            await new Promise(resolve => { open.onsuccess = resolve; });
            const transaction = open.result.transaction(["chats", "messages"], "readwrite");
            const chats = transaction.objectStore("chats"), messages = transaction.objectStore("messages");
            const all = chats.getAll();
            await new Promise(resolve => { all.onsuccess = resolve; });
            const [chat] = all.result;
            let parent = chat.leaf;
            for (let i = 0; i < 200; i++) {
                const id = crypto.randomUUID(), role = i % 2 ? "assistant" : "user", long = i === 199;
                const text = long ? "A line of an answer.\\n\\n".repeat(4600) : `Message ${i} with **some** words.`;
                const rest = { thought: "", files: [], state: "done", usage: null, thinkMs: 0 };
                messages.put({ id, chat: chat.id, parent, role, text, created: Date.now() + i, ...rest });
                parent = id;
            }
            chats.put({ ...chat, leaf: parent });
            await new Promise(resolve => { transaction.oncomplete = resolve; });
        }"""
    )
    talk.reload()
    talk.until("Message 198 with **some** words.")
    talk.wait("[...document.querySelectorAll('.assistant > .text')].every(node => node.childElementCount)")
    assert talk.page.locator(".message").count() == 202
    talk.page.evaluate(FRAMES)
    talk.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, body="{}"))
    talk.send("Say: one more")
    talk.until("The server says")
    assert talk.page.evaluate("document.querySelector('#scroll').scrollTop > 0")
    assert talk.page.locator(".message").count() == 204
    print(f"200 messages and 100 kB: frames over 50 ms {talk.page.evaluate('window.slow')}")
