"""The thought of an answer and what is said after it: <think>...</think>, in pieces."""

from __future__ import annotations

from typing import Literal

from qwenrt.text.replies.tags import Tags, TagScanner, Trimmed

OPEN, CLOSE = "<think>", "</think>"
_BOTH, _CLOSE = Tags(OPEN, CLOSE), Tags(CLOSE)


class ThoughtSplitter:
    """Splits an answer into reasoning and the rest.

    The rule, the same for a whole text and for any pieces of it: the answer begins at the first visible
    character outside a thought, and from there on everything is answer, tags too. Up to there an opening tag
    begins a thought, and a closing tag ends it or, outside a thought, counts for nothing. So the text is split
    at the last closing tag that nothing but white space and thoughts stand in front of: what was shown need
    never be taken back, and an answer may speak of the tags.

    A thought that is never closed is reasoning to the end; without an opening tag all is answer. Blank space
    next to the tags and at both ends of the text is dropped as `Trimmed` says; two thoughts are joined by a
    newline.

    ``inside``: the prompt opened the thought. An opening tag that the model repeats there is dropped.
    """

    def __init__(self, inside: bool) -> None:
        self._state: Literal["before", "thought", "answer"] = "thought" if inside else "before"
        self._scanner = TagScanner()
        self._reasoning = Trimmed(at_tag=True)
        self._answer = Trimmed(at_tag=True)

    def push(self, piece: str) -> tuple[str, str]:
        """More text; returns the reasoning and the answer that can be shown now."""
        self._scanner.push(piece)
        return self._split()

    def finish(self) -> tuple[str, str]:
        """The end: what was held back because it might have begun a tag."""
        self._scanner.end()
        return self._split()

    def _split(self) -> tuple[str, str]:
        reasoning: list[str] = []
        while self._state != "answer":
            repeated_opening = self._reasoning.at_tag
            found = self._scanner.next(_BOTH if self._state == "before" or repeated_opening else _CLOSE)
            if found is None:
                return "".join(reasoning), ""
            text, is_tag = found
            if is_tag:
                self._state = "thought" if text == OPEN else "before"
                self._reasoning.tag()
                self._answer.tag()
            elif self._state == "thought":
                reasoning.append(self._reasoning.push(text))
            elif text.strip():
                self._state = "answer"
                return "".join(reasoning), self._answer.push(text) + self._answer.push(self._scanner.rest())
            else:
                self._answer.push(text)
        return "".join(reasoning), self._answer.push(self._scanner.rest())
