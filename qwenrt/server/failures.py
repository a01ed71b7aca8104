"""What the log says of a request that failed in a way nobody foresaw."""

from __future__ import annotations

import logging
import traceback

from qwenrt.errors import shown

log = logging.getLogger("qwenrt.server")


def log_failure(request_id: str, error: BaseException, all_words: bool) -> None:
    """What failed and where. Its words only where the system's or torch's own, as others may quote a prompt; and never
    as they are, as they may have lines."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    plain = all_words or type(error) in (RuntimeError, MemoryError) or isinstance(error, OSError)
    said = f"{type(error).__name__}: {shown(str(error), 300)}" if plain else type(error).__name__
    log.error("%s failed with %s\n%s", request_id, said, frames)
