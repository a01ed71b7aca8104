"""The secret by which the server knows its own thoughts again when a client sends them back."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path

from qwenrt.errors import ConfigError
from qwenrt.files import read

logger = logging.getLogger("qwenrt.server")

NAME = "thought-key"
_BYTES = 32


def thought_key(directory: Path | None) -> bytes:
    """The key in this directory, made where there is none or a damaged one: with the prefixes that are kept there, it
    makes the prompt of a conversation the same after a restart. Without a directory, or where it cannot be written, a
    new one each time."""
    if directory is None:
        return secrets.token_bytes(_BYTES)
    path = directory / NAME
    with suppress(ConfigError):
        key = read(path, _BYTES, ConfigError)
        if len(key) == _BYTES:
            return key
    key = secrets.token_bytes(_BYTES)
    try:
        path.unlink(missing_ok=True)
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(key)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s): thoughts are signed anew after a restart", path, error.strerror
        )
    return key
