"""What `qwenrt chat` keeps for next time, for its user's eyes alone: lines that were typed, and conversations."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from pathlib import Path

from qwenrt.errors import RequestError
from qwenrt.text.chat import conversations
from qwenrt.text.chat.conversations import Conversation

MOST_CONVERSATIONS = 100
MOST_TYPED_BYTES = 1 << 20


class Kept:
    """A directory that only its owner may read: conversations/*.json, and typed_lines. Made when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._current: Path | None = None

    def save(self, conversation: Conversation) -> None:
        """Keep the conversation as it now is, in a file of its own. An empty one is not kept. Raises RequestError."""
        if not conversation.history:
            self.forget()
            return
        if self._current is None:
            self._make("conversations")
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}.json"
            self._current = self.directory / "conversations" / name
            self._drop_oldest()
        conversations.save(
            self._current,
            conversation.history,
            system=conversation.system,
            stopped=conversation.stopped,
            model=conversation.model,
        )

    def forget(self) -> None:
        """The current conversation is not kept any more; what follows is another."""
        if self._current is not None:
            with contextlib.suppress(OSError):
                self._current.unlink()
            self._current = None

    def reopen(self) -> Conversation:
        """The conversation that was held last, which what follows is part of. Raises RequestError."""
        files = self._conversations()
        if not files:
            raise RequestError(
                "chat --continue",
                f"no conversation is kept in {self.directory}",
                "Begin one: qwenrt chat.",
            )
        conversation = conversations.read(files[-1])
        self._current = files[-1]
        return conversation

    def typed_lines(self) -> Path | None:
        """The file of the lines that were typed, there and private; None where it cannot be."""
        path = self.directory / "typed_lines"
        try:
            self._make()
            flags = os.O_RDWR | os.O_CREAT | sum(getattr(os, n, 0) for n in ("O_NOFOLLOW", "O_NONBLOCK"))
            with os.fdopen(os.open(path, flags, 0o600), "rb+") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    return None
                if found.st_mode & 0o077:
                    path.chmod(0o600)
                if found.st_size > MOST_TYPED_BYTES:  # its newer half, from the beginning of an entry
                    file.seek(-MOST_TYPED_BYTES // 2, os.SEEK_END)
                    newer = file.read().partition(b"\n\n")[2]
                    file.seek(0)
                    file.write(newer)
                    file.truncate()
        except (OSError, RequestError):
            return None
        return path

    def _make(self, name: str = "") -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"keeping this conversation in {self.directory}",
                error.strerror or str(error),
                "Use --no-history, or set QWENRT_HISTORY to a directory that can be written.",
            ) from error

    def _conversations(self) -> list[Path]:
        """The files of conversations, the one last written at the end."""
        times: list[tuple[float, Path]] = []
        for path in (self.directory / "conversations").glob("*.json"):
            with contextlib.suppress(OSError):
                times.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(times)]

    def _drop_oldest(self) -> None:
        for path in self._conversations()[: -(MOST_CONVERSATIONS - 1)]:
            with contextlib.suppress(OSError):
                path.unlink()
