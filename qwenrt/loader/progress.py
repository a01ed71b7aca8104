"""What is told on stderr while a model is fetched and loaded: silent unless that is a terminal, or as asked for."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_log = logging.getLogger("qwenrt")


def tell(text: str, show: bool | None = None) -> None:
    """A line on stderr. ``show`` None means: only on a terminal; where it is not shown it is logged."""
    if is_shown(show):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    else:
        _log.info(text)


class Waiting:
    """Says at once what is waited for, and counts the seconds until it comes; then the line is gone.

    ``explain``: of an exception in which the wait ends, what a line says that stays; "" for nothing.
    """

    def __init__(
        self, doing: str, show: bool | None, explain: Callable[[BaseException], str] = lambda error: ""
    ) -> None:
        self._doing, self._shown, self._explain = doing, is_shown(show), explain
        self._live = self._shown and _is_terminal()
        self._width = 0
        self._done = threading.Event()

    def __enter__(self) -> Waiting:
        self._since = time.monotonic()
        if not self._live:
            tell(f"{self._doing} ...", self._shown)
            return self
        self._write(f"{self._doing} ...")
        self._counting = threading.Thread(target=self._count, daemon=True)
        self._counting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._done.set()
            self._counting.join()
            self._write("")
        said = "" if error is None else self._explain(error)
        if said:
            tell(f"{said} after {self._seconds()} s", self._shown)

    def _count(self) -> None:
        while not self._done.wait(1.0):
            self._write(f"{self._doing} ... {self._seconds()} s")

    def _seconds(self) -> int:
        return round(time.monotonic() - self._since)

    def _write(self, line: str) -> None:
        """Replace the line, without escapes, which not every terminal knows."""
        sys.stderr.write("\r" + " " * self._width + "\r" + line)
        sys.stderr.flush()
        self._width = len(line)


def is_shown(show: bool | None) -> bool:
    """Whether something is told. ``show`` None means: only on a terminal."""
    return _is_terminal() if show is None else show


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


class ByteBar:
    """Counts bytes up to ``total``. ``show`` None means: only on a terminal."""

    def __init__(self, description: str, total: int, show: bool | None = None) -> None:
        self._bar = quiet_tqdm(show)(total=total, desc=description, unit="B", unit_scale=True, leave=False)

    def add(self, nbytes: int) -> None:
        self._bar.update(nbytes)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def quiet_tqdm(show: bool | None) -> Any:
    """The class of bar to hand to a client: shown, silent, or (None) shown on a terminal only."""
    from tqdm import tqdm  # comes with huggingface-hub

    class Bar(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        monitor_interval = 0  # tqdm's watching thread, one for each class of bars, would outlive the load

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface-hub's own bars take a name
            kwargs["leave"] = False  # a bar that is full says nothing more
            kwargs["disable"] = None if show is None else not show  # None is tqdm's "unless a terminal"
            super().__init__(*args, **kwargs)

    return Bar
