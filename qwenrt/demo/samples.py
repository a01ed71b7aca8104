"""What the demo's world is made of: turns, conversations and questions, and when an answer to one is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenrt.text.chat.react import DEFAULT_SYSTEM, react_instruction


@dataclass(frozen=True)
class Turn:
    """One exchange. ``accept``: the answers that count as right (empty: not graded); with ``exact`` the whole answer
    must be one of them, else one of them must occur in it."""

    user: str
    answer: str
    accept: tuple[str, ...] = ()
    exact: bool = False

    def is_right(self, answer: str) -> bool:
        answer = answer.strip()
        if self.exact:
            return answer in self.accept
        return any(right in answer for right in self.accept) and len(answer) <= 2 * len(self.answer) + 10


@dataclass(frozen=True)
class Sample:
    """A conversation, or (``text``) plain text. With ``tools`` the one turn's answer is a ReAct transcript, of which
    ``call`` is (tool name, arguments, observation, final answer), or None where no tool is needed."""

    category: str
    turns: tuple[Turn, ...] = ()
    system: str = DEFAULT_SYSTEM
    tools: tuple[dict[str, Any], ...] = ()
    call: tuple[str, str, str, str] | None = None
    text: str = ""

    def entry(self) -> dict[str, Any]:
        """As an entry of a fine-tuning file."""
        if self.text:
            return {"text": self.text}
        conversation = []
        for turn in self.turns:
            user = turn.user
            if self.tools:
                user = f"{react_instruction(self.tools)}\n\nQuestion: {user}"
            conversation += [{"from": "user", "value": user}, {"from": "assistant", "value": turn.answer}]
        entry: dict[str, Any] = {"conversations": conversation}
        if self.system != DEFAULT_SYSTEM:
            entry["system"] = self.system
        return entry


@dataclass(frozen=True)
class Question:
    """A question of fact: its answer as a sentence and as a word, in both languages."""

    key: str
    lang: str
    user: str
    full: dict[str, str]
    short: dict[str, str]
