"""API keys: hashed when they are read, compared in constant time, from a file that nobody else may read.

A key file has one key a line. Empty lines and those that begin with # say nothing; `priority=N` after a key is the
highest priority that requests with it may have, `admin` lets it load and unload adapters.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwenrt.errors import ConfigError, shown
from qwenrt.files import expanded, opened

HIGHEST_PRIORITY = 9
_LONGEST_KEY = 4096  # bytes; nobody's key is longer, and hashing what is would be work for strangers
_LARGEST_FILE = 1 << 20  # bytes
_FOR_A_FILE = (
    "Write one key a line, without spaces; `# ...` is a comment, `KEY priority=3` limits a key, `KEY admin` may load "
    "adapters."
)


@dataclass(frozen=True)
class Key:
    """One key, as its SHA-256 digest. ``caller`` names who holds it where the key itself may not be said: in salts,
    turns and logs. ``priority``: the highest that its requests may have. ``admin``: whether it may load and unload
    adapters."""

    digest: bytes
    priority: int = HIGHEST_PRIORITY
    admin: bool = False

    @property
    def caller(self) -> str:
        """16 hexadecimal digits, the same for the same key in every run."""
        return hashlib.blake2b(self.digest, digest_size=8, person=b"qwenrt caller").hexdigest()

    def __repr__(self) -> str:
        return f"<key of {self.caller}>"

    @classmethod
    def of(cls, text: str, priority: int = HIGHEST_PRIORITY, admin: bool = False) -> Key:
        """The key that a text is. Raises ConfigError, which does not show it."""
        if (
            not isinstance(text, str)
            or not text.isascii()
            or not text.isprintable()
            or " " in text
            or not text
        ):
            found = "it is empty" if text == "" else "it has spaces or characters that no header can carry"
            raise ConfigError("an API key", found, "Use letters, digits and punctuation of ASCII.")
        if len(text) > _LONGEST_KEY:
            raise ConfigError("an API key", f"{len(text)} characters", f"Use at most {_LONGEST_KEY}.")
        return cls(digest_of(text.encode()), priority, admin)


def digest_of(presented: bytes) -> bytes:
    """The digest of what somebody presents as a key; of something that is no key where it is too long for one."""
    return hashlib.sha256(presented if len(presented) <= _LONGEST_KEY else b"").digest()


def read_key_file(path: Path) -> tuple[Key, ...]:
    """The keys in a file, at least one. Raises ConfigError, which shows no line of it."""
    asked = f"the API keys in {path}"
    with opened(path, ConfigError, asked=asked) as file:
        status = os.fstat(file.fileno())
        if os.name == "posix" and status.st_mode & _forbidden(status.st_uid):
            found = f"others than its owner may use the file (mode {stat.S_IMODE(status.st_mode):03o})"
            raise ConfigError(asked, found, f"Run `chmod 600 {path}`.")
        raw = file.read(_LARGEST_FILE + 1)
    if len(raw) > _LARGEST_FILE:
        raise ConfigError(asked, f"more than {_LARGEST_FILE} bytes", "This is not a file of keys.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(asked, "bytes that are not UTF-8", _FOR_A_FILE) from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    keys = tuple(_key(asked, number, line) for number, line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(asked, "no key in it", _FOR_A_FILE)
    return keys


def _forbidden(owner: int) -> int:
    """Bits that a key file's mode may not have. A file of somebody else's that we may read is there for us: Kubernetes
    and systemd hand secrets out as root's, readable by a group that is the service's own."""
    ours = stat.S_IRGRP if owner == os.geteuid() else 0
    return stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP | ours


def _key(asked: str, number: int, line: str) -> Key:
    text, *words = line.split()
    said: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        known = value in list("0123456789") if name == "priority" else word == "admin"
        if not known or name in said:
            raise ConfigError(asked, f"line {number} has more than a key", _FOR_A_FILE)
        said[name] = int(value or 1)
    try:
        return Key.of(text, said.get("priority", HIGHEST_PRIORITY), "admin" in said)
    except ConfigError as error:
        raise ConfigError(asked, f"line {number}: {error.found}", _FOR_A_FILE) from None


class Source(Protocol):
    """Where keys come from; `ServeSettings` is one."""

    @property
    def api_keys(self) -> tuple[Key, ...]: ...
    @property
    def api_key_file(self) -> Path | None: ...


class Keyring:
    """The keys that open the server: those in its settings, and those in a file, which `reload` reads again.

    Raises ConfigError where the file cannot be used. A keyring without keys lets everybody in.
    """

    def __init__(self, source: Source) -> None:
        self._given, self._file = source.api_keys, source.api_key_file
        self._keys: tuple[Key, ...] = ()
        self.reload()

    def reload(self) -> int:
        """Read the file again -> how many keys there are now. On ConfigError those from before stay."""
        self._keys = self._given + (read_key_file(self._file) if self._file is not None else ())
        return len(self._keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<{len(self)} keys>"

    def find(self, presented: Sequence[bytes]) -> Key | None:
        """The key that one of a few texts is. The time taken tells nothing of any key: only digests are compared, each
        with every key, whatever matched before."""
        found: Key | None = None
        for text in presented:
            digest = digest_of(text)
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest):
                    found = key
        return found


def as_keys(values: object) -> tuple[Key, ...]:
    """Keys as callers pass them, texts or what they became. Raises ConfigError."""
    if isinstance(values, (str, bytes, Key)):
        values = [values]
    if not isinstance(values, Iterable):
        raise ConfigError("api_keys", f"got {type(values).__name__}", "Pass a list of texts.")
    return tuple(value if isinstance(value, Key) else Key.of(value) for value in values)


def as_path(name: str, value: object) -> Path | None:
    """A file's path as callers pass it. Raises ConfigError."""
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise ConfigError(f"{name}={shown(value)}", "not a path", "Pass the path of a file.")
    return expanded(value, ConfigError, asked=f"{name}={shown(value)}")
