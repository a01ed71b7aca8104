"""Names of a request's fields that are nearly a known one. Unknown fields are passed over, as clients send what other
servers know; but who writes max_token has set no limit, so that is said once in the log."""

from __future__ import annotations

import logging
import threading
import typing
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import msgspec

from qwenrt.errors import shown

log = logging.getLogger("qwenrt.server")
LARGEST = 1 << 20  # bytes of a body that is looked at
LONGEST_NAME = 64  # characters
MOST_TOLD = 256  # names
_NEAR = 0.85  # of get_close_matches: max_token is, top_p is not top_k

_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])
_told: set[str] = set()
_lock = threading.Lock()


def look_for_misspelt(body: bytes, struct: Any) -> None:
    """Tell the log of each name in ``body``, JSON that was read as ``struct``, that is nearly one of its fields
    or of the Structs in them. Each once in this process, and no more than MOST_TOLD."""
    known = _fields(struct)
    if known is None or len(body) > LARGEST or len(_told) >= MOST_TOLD:
        return
    for name, value in _raw.decode(body).items():
        if name not in known:
            _tell(name, known)
        elif (inner := known[name]) is not None and bytes(value).startswith(b"{"):
            look_for_misspelt(bytes(value), inner)


def _tell(name: str, known: dict[str, Any]) -> None:
    if len(name) > LONGEST_NAME or name in _told:
        return
    near = get_close_matches(name, known, 1, _NEAR)
    if not near:
        return
    with _lock:
        if name in _told or len(_told) >= MOST_TOLD:
            return
        _told.add(name)
    log.warning("a request has the field %s, which means nothing here: is %s meant?", shown(name), near[0])


@lru_cache(maxsize=256)
def _fields(kind: Any) -> dict[str, Any] | None:
    """Name in JSON -> the Struct that the field may hold, or None; None for what is no Struct."""
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return None
    return {field.encode_name: _struct_of(field.type) for field in msgspec.structs.fields(kind)}


def _struct_of(kind: Any) -> Any:
    """The Struct among the alternatives of a field's type."""
    for one in typing.get_args(kind) or (kind,):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None
