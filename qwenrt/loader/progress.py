"""One progress bar on stderr, silent unless that is a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any


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
            kwargs["disable"] = None if show is None else not show  # None is tqdm's "unless a terminal"
            super().__init__(*args, **kwargs)

    return Bar
