"""Token ids to text as they arrive: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from qwenrt.errors import RequestError

if TYPE_CHECKING:
    from qwenrt.text.tokenizer.tokenizer import Tokenizer


class StopMatcher:
    """Passes text through and cuts it where the first stop string begins.

    "First" is by position in the whole text, so the result does not depend on how the text was cut into
    pieces: joined, the output is ``text[: min(text.find(s) for s in stop if s in text)]``. Text is held back
    while it may be the beginning of a stop string. Time is linear in the text, whatever the stop strings.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError("stop strings", f"got {stop!r:.80}", "Pass a list of non-empty strings.")
        self._automaton = _automaton(tuple(stop)) if stop else None
        self._state = 0
        self._held = ""
        self._match: tuple[int, str] | None = (
            None  # the earliest so far: distance from the end of _held, string
        )
        self.stopped = False
        self.stop_string: str | None = None

    def push(self, text: str) -> str:
        """More text; returns what is now certain to lie before any stop string."""
        if self.stopped or not text:
            return ""
        if self._automaton is None:
            return text
        for index, char in enumerate(text):
            if self._step(char):
                return self._cut(text[: index + 1])
        self._held += text
        depth = self._automaton.depth[self._state]
        safe = len(self._held) - max(depth, self._match[0] if self._match else 0)
        out, self._held = self._held[:safe], self._held[safe:]
        return out

    def finish(self) -> str:
        """The end of the text: returns what was held back and turned out not to be a stop string."""
        if self.stopped:
            return ""
        if self._match is not None:
            return self._cut("")
        out, self._held = self._held, ""
        return out

    def _step(self, char: str) -> bool:
        """Read one character; True once no match can begin earlier than the one found."""
        automaton = self._automaton
        assert automaton is not None
        self._state = state = automaton.next(self._state, char)
        if self._match is not None:
            self._match = (self._match[0] + 1, self._match[1])
        longest = automaton.longest[state]
        if longest is not None and (self._match is None or len(longest) > self._match[0]):
            self._match = (len(longest), longest)
        # The state is the longest suffix that begins a stop string: the earliest match still possible.
        return self._match is not None and automaton.depth[state] <= self._match[0]

    def _cut(self, last: str) -> str:
        assert self._match is not None
        distance, self.stop_string = self._match
        self.stopped = True
        held, self._held = self._held + last, ""
        return held[: len(held) - distance]


class Detokenizer:
    """Token ids in, text out. Joined, the pieces are what decoding all the ids at once would give.

    That is ``tokenizer.decode(ids, skip_special_tokens)`` cut where the first of the ``stop`` strings begins.
    A piece never ends inside a character; bytes that are not UTF-8 become U+FFFD as in bytes.decode. The first
    ``min_tokens`` tokens are not searched for stop strings.

    stopped, stop_string: whether a stop string was found, and which. text: everything given out so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop)
        self._unsearched = min_tokens
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    @property
    def stop_string(self) -> str | None:
        return self._matcher.stop_string

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def add(self, token_id: int) -> str:
        """One more token; returns the text that is now safe to show, often "". Unknown ids raise RequestError."""
        if self.stopped:
            return ""
        token = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
        text = self._decoder.decode(token)
        if self._unsearched > 0:
            self._unsearched -= 1
            return self._emit(text)
        return self._emit(self._matcher.push(text))

    def finish(self) -> str:
        """The last token was added: returns all that is left. Half characters become U+FFFD."""
        if self.stopped:
            return ""
        rest = self._matcher.push(self._decoder.decode(b"", final=True))
        return self._emit(rest + self._matcher.finish())

    def _emit(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text


class _Automaton:
    """Aho-Corasick: reads a text once and knows at each character which stop strings begin or end there.

    States are the prefixes of the stop strings (0 the empty one); the current one is the longest suffix of the
    text that is a prefix. depth: its length. longest: the longest stop string that ends here.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.longest: list[str | None] = [None]
        for string in strings:
            self._insert(string)
        queue = list(self.children[0].values())
        for state in queue:  # breadth first: shorter prefixes are finished before longer ones need them
            fallback = self.fail[state]
            if self.longest[state] is None:
                self.longest[state] = self.longest[fallback]
            for char, child in self.children[state].items():
                self.fail[child] = self.next(fallback, char)
                queue.append(child)

    def _insert(self, string: str) -> None:
        state = 0
        for char in string:
            child = self.children[state].get(char)
            if child is None:
                child = len(self.children)
                self.children[state][char] = child
                self.children.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest.append(None)
            state = child
        self.longest[state] = string

    def next(self, state: int, char: str) -> int:
        while state and char not in self.children[state]:
            state = self.fail[state]
        return self.children[state].get(char, 0)


@lru_cache(maxsize=8)
def _automaton(strings: tuple[str, ...]) -> _Automaton:
    """Shared: never written to once it is built, and requests tend to repeat their stop strings. 17 MiB at most."""
    return _Automaton(strings)
