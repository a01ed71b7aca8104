"""One progress bar on stderr, silent where nobody looks."""

from __future__ import annotations

from types import TracebackType


class ByteBar:
    """Counts bytes up to ``total``. ``show`` None means: only on a terminal."""

    def __init__(self, description: str, total: int, show: bool | None = None) -> None:
        from tqdm import tqdm  # comes with huggingface-hub

        disable = None if show is None else not show  # None is tqdm's word for "unless a terminal"
        self._bar = tqdm(
            total=total, desc=description, unit="B", unit_scale=True, disable=disable, leave=False
        )

    def add(self, nbytes: int) -> None:
        self._bar.update(nbytes)

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
