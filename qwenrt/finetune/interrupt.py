"""Ctrl-C and SIGTERM during training: the current step is finished, so that nothing learned is lost."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed, or the process was asked to end."""

    pressed = False


@contextmanager
def held_interrupt() -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C or SIGTERM is only noted: an update that stops half way would leave weights of
    two steps. The second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python delivers no signals, this does nothing.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def press(signum: int, frame: FrameType | None) -> None:
        if interrupt.pressed:
            raise KeyboardInterrupt
        interrupt.pressed = True
        if sys.stderr is not None:
            name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
            sys.stderr.write(
                f"\n{name}: this step is finished and kept; {name} again stops at once and loses it.\n"
            )

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT] or signal.default_int_handler)
        signal.signal(signal.SIGTERM, before[signal.SIGTERM] or signal.SIG_DFL)
