"""The pieces of a conversation, in whatever order a client sends them, as messages that a chat template can write.

A prompt must grow at its end only (its beginning is what the cache holds), so what becomes of a piece depends on what
stands around it in its own turn, never on what follows later.
"""

from __future__ import annotations

from typing import Any, Literal

_BETWEEN = "\n\n"


class Turns:
    """Collects the pieces in their order; `messages` gives OpenAI's shape, in which every chat format reads them.

    head: the system text. Where it is empty, system texts before everything else are the head; all later ones are told
    where they stand: no template has a place for them that is not the head.

    The pieces between two turns of the assistant are one turn: first the results of its calls, then one message of the
    user. What the client itself adds beside results (`aside`, `system`) goes to the end of the last result, since a
    message of the user would begin a new question, before which templates drop the thoughts of this one.

    calls: ids of the calls in the assistant's latest turn, which results may answer.
    """

    def __init__(self, head: str = "") -> None:
        self.calls: set[str] = set()
        self._head = [head] if head else []
        self._head_is_open = not head
        self._messages: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._texts: list[tuple[Literal["user", "aside"], str]] = []
        self._assistant: dict[str, Any] | None = None

    def user(self, text: str) -> None:
        """What the user says."""
        self._not_assistant()
        self._texts.append(("user", text))

    def aside(self, text: str) -> None:
        """What the client tells the model beside the conversation."""
        self._not_assistant()
        self._texts.append(("aside", text))

    def system(self, text: str) -> None:
        """What a system or developer message says."""
        if self._head_is_open:
            self._head.append(text)
        else:
            self.aside(text)

    def result(self, call_id: str, text: str) -> None:
        """What a call of the latest turn gave."""
        self._not_assistant()
        self._results.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def thought(self, text: str) -> None:
        """A thought of the assistant."""
        turn = self._as_assistant()
        turn["thought"] = f"{turn['thought']}\n{text}" if turn["thought"] else text

    def said(self, text: str, begins_message: bool = False) -> None:
        """What the assistant said. ``begins_message``: it is of another message than what was said before it."""
        turn = self._as_assistant()
        said = turn["said"]
        between = _BETWEEN if begins_message and said and text and not said.endswith("\n") else ""
        turn["said"] = f"{said}{'' if text.startswith(chr(10)) else between}{text}"

    def call(self, call_id: str, name: str, arguments: str) -> None:
        """A call of the assistant; ``arguments`` as JSON text."""
        turn = self._as_assistant()
        function = {"name": name, "arguments": arguments}
        turn["calls"].append({"id": call_id, "type": "function", "function": function})
        self.calls.add(call_id)

    def messages(self) -> list[dict[str, Any]]:
        """All of it."""
        self._end_others()
        self._end_assistant()
        head = _BETWEEN.join(text for text in self._head if text)
        return [*([{"role": "system", "content": head}] if head else []), *self._messages]

    def _as_assistant(self) -> dict[str, Any]:
        self._head_is_open = False
        self._end_others()
        if self._assistant is None:
            self._assistant = {"thought": "", "said": "", "calls": []}
            self.calls = set()
        return self._assistant

    def _not_assistant(self) -> None:
        self._head_is_open = False
        self._end_assistant()

    def _end_assistant(self) -> None:
        turn, self._assistant = self._assistant, None
        if turn is None:
            return
        message: dict[str, Any] = {"role": "assistant", "content": turn["said"]}
        if turn["thought"]:
            message["reasoning_content"] = turn["thought"]
        if turn["calls"]:
            message.update(content=turn["said"] or None, tool_calls=turn["calls"])
        self._messages.append(message)

    def _end_others(self) -> None:
        results, texts = self._results, self._texts
        self._results, self._texts = [], []
        self._messages += results
        if not texts:
            return
        joined = _BETWEEN.join(text for _, text in texts if text)
        if results and (not joined or all(kind == "aside" for kind, _ in texts)):
            results[-1]["content"] = _BETWEEN.join(filter(None, (results[-1]["content"], joined)))
        else:
            self._messages.append({"role": "user", "content": joined})
