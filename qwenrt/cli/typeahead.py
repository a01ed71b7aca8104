"""What is typed while a model writes is not shown within the answer, and waits for the next prompt."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any


@contextmanager
def unseen_keys(stream: IO[str], *, by_key: bool) -> Iterator[None]:
    """Within the block the terminal behind ``stream`` shows no typed key. Ctrl-C and Ctrl-Z stay signals.

    ``by_key``: keys are kept one by one, for a line editor; else the terminal keeps lines, which it lets be corrected.
    However the block ends, the terminal is as it was, also while the process is stopped (Ctrl-Z) and after SIGTERM or
    SIGHUP. Where there is no terminal, or outside the main thread, this does nothing.
    """
    terminal = _Terminal.of(stream, by_key) if sys.platform != "win32" else None
    if terminal is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number, handler in (
            (signal.SIGTSTP, terminal.end),
            (signal.SIGCONT, terminal.resume),
            (signal.SIGTERM, terminal.end),
            (signal.SIGHUP, terminal.end),
        )
        if signal.getsignal(number) is signal.SIG_DFL  # whoever ignores one (nohup) or has a handler keeps it
    }
    try:
        terminal.hide()
        yield
    finally:
        terminal.show()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Terminal:
    """The settings of a terminal: as they were found, and as they are while keys are not shown."""

    def __init__(self, fd: int, found: list[Any], by_key: bool) -> None:
        import termios

        self._fd, self._found = fd, found
        self._hidden = [*found[:6], list(found[6])]
        self._hidden[3] &= ~(termios.ECHO | termios.ECHONL | (termios.ICANON if by_key else 0))
        if by_key:
            self._hidden[6][termios.VMIN], self._hidden[6][termios.VTIME] = 1, 0

    @classmethod
    def of(cls, stream: IO[str], by_key: bool) -> _Terminal | None:
        import termios

        try:
            fd = stream.fileno()
            return cls(fd, termios.tcgetattr(fd), by_key)
        except (termios.error, OSError, ValueError):  # no terminal, or closed
            return None

    def hide(self) -> None:
        self._set(self._hidden)

    def show(self) -> None:
        self._set(self._found)

    def end(self, number: int, frame: FrameType | None) -> None:
        """On a signal that stops or ends the process: as it was, and then what the signal does by itself."""
        self.show()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self.end)  # it was stopped and goes on

    def resume(self, number: int, frame: FrameType | None) -> None:
        self.hide()

    def _set(self, settings: list[Any]) -> None:
        """In the background nothing is set: that would stop the process, and the terminal is somebody else's."""
        import termios

        with suppress(OSError):  # not our controlling terminal
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
        with suppress(termios.error, OSError):  # the terminal is gone
            termios.tcsetattr(self._fd, termios.TCSADRAIN, settings)
