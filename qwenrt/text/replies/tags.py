"""Tags in text that arrives in pieces: what is found never depends on where the pieces were cut."""

from __future__ import annotations

import re


class Tags:
    """A few literal strings to look for at once. None of them begins another."""

    def __init__(self, *tags: str) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tags)))
        beginnings = {tag[:length] for tag in tags for length in range(1, len(tag))}
        self._beginnings = tuple(sorted(beginnings, key=len, reverse=True))
        self._first = re.compile("[" + re.escape("".join({tag[0] for tag in tags})) + "]")

    def begun(self, text: str, start: int) -> int:
        """The length of the longest end of ``text[start:]`` that may become a tag."""
        longest = len(self._beginnings[0]) if self._beginnings else 0
        if self._first.search(text, max(start, len(text) - longest)) is None:
            return 0
        for beginning in self._beginnings:
            if text.endswith(beginning, start):
                return len(beginning)
        return 0


class TagScanner:
    """Cuts text into runs without a tag and tags, one at a time, for a reader whose tags change as it reads.

    A run is handed over as it comes, in as many parts as it came in; only the end that may yet become a tag
    waits. Every character is looked at once for each set of tags, so the cost is linear in the text.

    A reader gets the same from every way to cut the text if it treats "ab" as "a" and then "b", and if a set of
    tags that it changes to because of a run (not of a tag) is part of the set it had.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False

    def push(self, piece: str) -> None:
        self._text = self._text[self._at :] + piece
        self._at = 0

    def end(self) -> None:
        """No more text will come: what waits to become a tag is text."""
        self._ended = True

    def next(self, tags: Tags) -> tuple[str, bool] | None:
        """The next run (False) or tag (True); None when more text is needed."""
        match = tags.pattern.search(self._text, self._at)
        if match is not None and match.start() == self._at:
            self._at = match.end()
            return match.group(), True
        if match is not None:
            stop = match.start()
        else:
            stop = len(self._text) - (0 if self._ended else tags.begun(self._text, self._at))
        run, self._at = self._text[self._at : stop], stop
        return (run, False) if run else None

    def rest(self) -> str:
        """All that is left, for a reader that looks for no more tags."""
        run, self._text, self._at = self._text[self._at :], "", 0
        return run


class Trimmed:
    """Text between tags without the blank space next to them, in pieces.

    Before a tag all white space goes. After a tag blank lines go and the first line keeps its indentation. Where
    text stands on both sides of a tag, one newline stands for it. All other characters stay, in their order.

    at_tag: nothing visible has come since the last tag.
    """

    def __init__(self, at_tag: bool) -> None:
        self.at_tag = at_tag
        self._begun = False
        self._space: list[str] = []  # not yet known to stand between visible characters

    def push(self, text: str) -> str:
        """More text; returns what is now certain to stay."""
        visible = text.rstrip()
        if not visible:
            self._space.append(text)
            return ""
        if self.at_tag:
            body = visible.lstrip()
            space = "".join(self._space) + visible[: len(visible) - len(body)]
            out = ("\n" if self._begun else "") + space[space.rfind("\n") + 1 :] + body
        else:
            out = "".join(self._space) + visible
        self._space = [text[len(visible) :]]
        self._begun, self.at_tag = True, False
        return out

    def tag(self) -> None:
        """A tag stands here."""
        self._space = []
        self.at_tag = True

    def finish(self) -> str:
        """The end of the text. White space there stays, unless it follows a tag."""
        space = "" if self.at_tag else "".join(self._space)
        self._space = []
        return space
