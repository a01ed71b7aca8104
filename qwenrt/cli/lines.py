"""Input of questions: from a terminal, or from a pipe with one question per line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenrt.cli.chat_commands import Typed
from qwenrt.cli.terminal import Terminal

PROMPT = "User> "
CONTINUED = "... > "
FENCE = '"""'


class Undecodable(Exception):
    """The input was not text."""


class Lines:
    """Reads messages, with a prompt and line editing on a terminal, without either from a pipe.

    ``typed_lines``: a file in which the line editor keeps what was typed, None for nowhere.
    """

    def __init__(self, terminal: Terminal, typed_lines: Path | None = None) -> None:
        self.terminal = terminal
        edits = terminal.interactive and terminal.console.escapes
        self._ask = _editor(typed_lines, terminal.console.styles) if edits else None

    @property
    def by_key(self) -> bool:
        """Whether keys are read one by one, as the line editor does."""
        return self._ask is not None

    def message(self) -> Typed:
        r"""The next message: one line, lines that end in "\" joined, or everything between two \"\"\".

        A line that begins with a space is meant as it is, and so is what stands between quotation marks.
        Raises EOFError at the end of input, KeyboardInterrupt on Ctrl-C at an empty prompt, Undecodable.
        Ctrl-C or the end of input inside a longer message: the first drops it, the second ends it.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(FENCE):
            return self._longer(line.lstrip()[len(FENCE) :], _until_fence)
        if line.endswith("\\"):
            return self._longer(line, _until_no_backslash)
        return Typed(line.strip(), literal=line[:1].isspace())

    def _longer(self, line: str, split: Callable[[str], tuple[str, bool]]) -> Typed:
        parts = []
        try:
            while True:
                text, done = split(line)
                parts.append(text)
                if done:
                    break
                line = self._line(CONTINUED)
        except EOFError:
            pass
        except KeyboardInterrupt:
            self.terminal.remark(f"{'' if self.by_key else chr(10)}[INFO] This message was dropped.")
            return self.message()
        return Typed("\n".join(parts).strip(), literal=True)

    def _line(self, prompt: str) -> str:
        try:
            if self._ask is not None:
                line = self._ask(prompt)
            elif self.terminal.interactive:
                line = input(prompt)
            else:
                line = _read_bytes()
            line.encode("utf-8")  # a lone surrogate stands for a byte that could not be decoded
        except UnicodeError as error:
            raise Undecodable from error
        return line


def _until_fence(line: str) -> tuple[str, bool]:
    closed = line.rstrip().endswith(FENCE)
    return (line.rstrip()[: -len(FENCE)], True) if closed else (line, False)


def _until_no_backslash(line: str) -> tuple[str, bool]:
    return (line[:-1], False) if line.endswith("\\") else (line, True)


def _read_bytes() -> str:
    """One line from a pipe."""
    source = getattr(sys.stdin, "buffer", sys.stdin)
    raw = source.readline()
    if not raw:
        raise EOFError
    return _decode(raw).rstrip("\r\n")


def read_all() -> str:
    """All of stdin. Raises Undecodable."""
    try:
        text = _decode(getattr(sys.stdin, "buffer", sys.stdin).read())
        text.encode("utf-8")
    except UnicodeError as error:
        raise Undecodable from error
    return text.replace("\r\n", "\n")


def _decode(raw: str | bytes) -> str:
    """UTF-8, or else what the locale says. A byte order mark, as PowerShell writes it, is dropped."""
    if isinstance(raw, bytes):
        try:
            return raw.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError:
            raw = raw.decode(sys.stdin.encoding or "utf-8")
    return raw.removeprefix("\ufeff")


def _editor(typed_lines: Path | None, styles: bool) -> Callable[[str], str] | None:
    """prompt_toolkit's line editor, with history and pasted blocks; None where it is not installed."""
    if (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        return None
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output.color_depth import ColorDepth
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its editing keys)
        return None

    class TypedLines(FileHistory):  # type: ignore[misc,unused-ignore]
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):  # a full disk costs the history, not the conversation
                super().store_string(string)

    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    def interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    keys = KeyBindings()
    keys.add("escape", "enter")(newline)
    keys.add("c-c")(interrupt)
    session: Any = PromptSession(
        key_bindings=keys,
        reserve_space_for_menu=0,
        history=InMemoryHistory() if typed_lines is None else TypedLines(str(typed_lines)),
        enable_suspend=True,
        color_depth=None if styles else ColorDepth.DEPTH_1_BIT,
    )

    def ask(prompt: str) -> str:
        return str(session.prompt(prompt))

    return ask
