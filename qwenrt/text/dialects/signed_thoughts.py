"""Thoughts that a client keeps for the server and sends back: taken when they return unchanged, else dropped.

There is no cipher: a thought is the client's own text. The key only tells what this server wrote from what it did not;
as long as it stays, so does the next prompt.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

_MARK = "qwenrt1."  # of what is packed, so that another server's is passed over without decoding it
_SIZE = hashlib.sha256().digest_size


class SignedThoughts:
    """Signs thoughts with a secret ``key`` and knows them again. The same thought always has the same signature."""

    def __init__(self, key: bytes) -> None:
        if not key:
            raise ValueError("a key for signing thoughts has at least one byte")
        self._key = key

    def signature(self, thought: str) -> str:
        """The signature of a thought, which says nothing about it."""
        return base64.b64encode(self._mac(thought.encode())).decode()

    def is_ours(self, thought: str, signature: str) -> bool:
        """Whether this signature was made here, of this very thought."""
        return hmac.compare_digest(self.signature(thought).encode(), signature.encode())

    def packed(self, thought: str) -> str:
        """The thought and its signature in one text, which nobody is meant to read."""
        text = thought.encode()
        return _MARK + base64.b64encode(self._mac(text) + text).decode()

    def unpacked(self, packed: str) -> str | None:
        """The thought that was packed here; None for anything else."""
        if not packed.startswith(_MARK):
            return None
        try:
            content = base64.b64decode(packed[len(_MARK) :].encode(), validate=True)
        except (binascii.Error, ValueError):
            return None
        mac, text = content[:_SIZE], content[_SIZE:]
        return text.decode() if hmac.compare_digest(self._mac(text), mac) else None

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._key, text, "sha256")
