"""What the scripted model says in the page's tests: it does what the last message says."""

from __future__ import annotations

import re

TURN = "<|im_start|>"
ANSWER = f"{TURN}assistant\n"
THOUGHT = "The person asks for something. I do it."
LONG = " ".join(f"Sentence {i} of a long answer." for i in range(1, 400))


def talker(prompt: str) -> str:
    """`Say: TEXT` is answered with TEXT, `Long` with LONG, anything else is repeated; what was begun is continued."""
    before, _, begun = prompt.rpartition(ANSWER)
    asked = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", before, re.DOTALL)[-1]
    said = _answer(asked)
    if not begun:
        return f"<think>\n{THOUGHT}\n</think>\n\n{said}"
    written = begun.rpartition("</think>\n\n")[2]
    return said.removeprefix(written) if said.startswith(written) else f" (not gone on with: {written!r})"


def _answer(asked: str) -> str:
    if asked.startswith("Say: "):
        return asked.removeprefix("Say: ")
    return LONG if asked.startswith("Long") else f"You said: {asked}"
