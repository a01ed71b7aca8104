"""Output of commands: results go to stdout, remarks to stderr, with colours only on a terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from typing import IO, Any

from qwenrt.config import Console

# A model's control characters are shown as symbols: a terminal would obey them (move the cursor, set the title).
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t\r"}
_VISIBLE |= {ord("\r"): "", 0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")

CLEAR_SCREEN = "\x1b[2J\x1b[3J\x1b[H"


def is_tty(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def stand_in_for_closed_streams() -> bool:
    """Where a shell closed stdin (``<&-``) or stderr, Python has None. An empty input or /dev/null takes its place and
    its file number, which the next file to be opened would get otherwise. -> whether stdout is open."""
    is_open = sys.stdout is not None
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)
    if not is_open:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return is_open


def forgive_encoding() -> None:
    """Print a question mark for characters that the console's encoding (GBK, Latin-1) does not have."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


class Terminal:
    """Prints for one command. Styles ("dim", "bold", "red", ...) show on a tty where rich is installed, unless TERM is
    dumb or NO_COLOR is set."""

    def __init__(self) -> None:
        self.looked_at = is_tty(sys.stdout)
        self.interactive = self.looked_at and is_tty(sys.stdin)
        self.console = Console.read()
        self._thinking = False  # the last piece shown was a thought

    def say(self, text: str = "", style: str = "", end: str = "\n") -> None:
        """A result, on stdout."""
        self._write(sys.stdout, text, style, end)

    def row(self, label: str, text: str, style: str = "") -> None:
        """A result with what it is in front."""
        self.say(f"{label:<15} {text}", style)

    def stream(self, piece: str) -> None:
        """A piece of a model's text, on stdout at once."""
        self._thinking = False
        sys.stdout.write(piece.translate(_VISIBLE) if self.looked_at else piece)
        sys.stdout.flush()

    def answer(self, text: str, reasoning: str = "") -> None:
        """A piece of an answer, on stdout at once. A thought is shown dimmed on a terminal, and is no part of the
        result."""
        if reasoning and self.looked_at:
            self._thinking = True
            self._write(sys.stdout, reasoning, "dim", "")
        if text:
            self.stream(f"\n\n{text}" if self._thinking else text)

    def remark(self, text: str, style: str = "dim") -> None:
        """A remark that is no part of the result, on stderr."""
        sys.stdout.flush()
        self._write(sys.stderr, text, style, "\n")

    def fail(self, text: str) -> None:
        """Why the command ends, on stderr."""
        self.remark(f"qwenrt: error: {text}", "red")

    def warn(self, text: str) -> None:
        self.remark(f"[WARNING] {text}", "yellow")

    def error(self, text: str) -> None:
        self.remark(f"[ERROR] {text}", "red")

    def result(self, value: Any) -> None:
        """A JSON document, for the program that reads it. JSON has no NaN and no infinity: they become null."""
        print(json.dumps(_finite(value), ensure_ascii=False, indent=2, default=str))

    def clear(self) -> None:
        """An empty screen, where there is a screen."""
        if self.looked_at and self.console.escapes:
            sys.stdout.write(CLEAR_SCREEN)
            sys.stdout.flush()

    def _write(self, stream: IO[str], text: str, style: str, end: str) -> None:
        looked_at = is_tty(stream)
        if looked_at:
            text = text.translate(_VISIBLE)
        if looked_at and style and self.console.styles:
            try:
                from rich.console import Console as Rich
                from rich.text import Text

                Rich(file=stream, highlight=False).print(Text(text, style), end=end)
                return
            except ImportError:
                pass
        stream.write(text + end)
        stream.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def counted(count: int, thing: str) -> str:
    """2, "thread" -> "2 threads"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def readable_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def billions(count: int) -> str:
    """494032768 -> "0.49 B"."""
    return f"{count / 1e9:.2f} B" if count >= 10**7 else f"{count / 1e6:.2f} M"


def width() -> int:
    """Columns of the terminal that is looked at; as many as needed where nobody looks."""
    return shutil.get_terminal_size().columns if is_tty(sys.stdout) else 10**6


def wrapped(label: str, text: str, columns: int, indent: int = 14) -> str:
    """A label and what is said of it, in lines of at most ``columns``; on narrow terminals below each other."""
    if columns < 60:
        indent = 2
        first = f"{label}\n  " if label else "  "
    else:
        first = f"{label:<{indent}}"
    lines = textwrap.wrap(text, max(columns - indent, 20), break_on_hyphens=False) or [""]
    return first + f"\n{' ' * indent}".join(lines)
