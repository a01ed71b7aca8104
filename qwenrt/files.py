"""Reading untrusted files: only regular files of a bounded size, opened without waiting.

What a model's directory holds may be a FIFO, a terminal or a device, where reading would wait or go on for ever; a link
into a directory that this user may not read; or a file that disappears meanwhile. All reading of checkpoints, download
caches, saved conversations and training data goes through here. What is wrong becomes an error of the caller's ``kind``
that says what was found.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from qwenrt.errors import QwenrtError

# A FIFO opens at once, a terminal does not become this process's own, and nothing is inherited by a child.
_FLAGS = os.O_RDONLY | sum(getattr(os, n, 0) for n in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
_PIECE = 1 << 24  # bytes read at once
_FORMS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISCHR, "a terminal or another character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)
_IN_ITS_PLACE = "Put the file itself in its place."
_NOT_FOUND = "Check the path."


def expanded(path: str | os.PathLike[str], kind: type[QwenrtError], *, asked: str | None = None) -> Path:
    """A path that may begin with ~ or ~user. Raises ``kind`` where there is no such home directory. ``asked``: what was
    wanted, else "finding <path>"."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise kind(asked or f"finding {path}", "there is no such home directory", _NOT_FOUND) from error


def is_there(path: Path, kind: type[QwenrtError]) -> bool:
    """Whether there is anything of this name, a link that leads nowhere included: `opened` says what is wrong with
    it. Raises ``kind`` where that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _error(path, kind, f"looking for {path}", error, _NOT_FOUND) from error
    return True


def opened(
    path: Path, kind: type[QwenrtError], *, asked: str | None = None, missing: str = _NOT_FOUND
) -> BinaryIO:
    """The regular file ``path``, to be read and closed.

    Raises ``kind``: absent (``missing`` is the remedy), not permitted, no regular file, a link that leads nowhere or
    in a circle, unreadable. ``asked``: what was wanted, else "reading <path>".
    """
    asked = asked or f"reading {path}"
    try:
        _check_regular(path, os.stat(path).st_mode, kind, asked)  # to open some devices is to do something
        fd = os.open(path, _FLAGS)
    except QwenrtError:  # some kinds are ValueErrors as well
        raise
    except (OSError, ValueError) as error:
        raise _error(path, kind, asked, error, missing) from error
    try:
        _check_regular(path, os.fstat(fd).st_mode, kind, asked)  # what was opened may be another by now
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read(
    path: Path,
    limit: int,
    kind: type[QwenrtError],
    *,
    asked: str | None = None,
    missing: str = _NOT_FOUND,
    what: str = "configuration file",
) -> bytes:
    """The bytes of a file that has at most ``limit`` of them. Raises ``kind`` as `opened` does, and for a larger file,
    which is no ``what``."""
    asked = asked or f"reading {path}"
    pieces: list[bytes] = []
    room = limit + 1
    with opened(path, kind, asked=asked, missing=missing) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            while size <= limit and room > 0 and (piece := file.read(min(room, _PIECE))):
                pieces.append(piece)
                room -= len(piece)
        except OSError as error:
            raise _error(path, kind, asked, error, missing) from error
    if size > limit or room <= 0:
        raise kind(asked, f"more than {limit} bytes", f"This is not a {what}.")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_downloaded(
    path: Path, limit: int, kind: type[QwenrtError], *, missing: str = _NOT_FOUND, what: str
) -> bytes:
    """`read` for a file of a model; what a download may have left in its place is refused by its name."""
    raw = read(path, limit, kind, missing=missing, what=what)
    unlike = not_the_file(raw)
    if unlike:
        raise kind(f"reading {path}", *unlike)
    return raw


def not_the_file(head: bytes) -> tuple[str, str] | None:
    """(found, remedy) where the first bytes of a file show that something else was saved in its place."""
    if not head[:4096].strip() and not head.strip():
        return "an empty file", "The download did not finish: fetch the file again."
    if head.startswith(b"version https://git-lfs"):
        return (
            "a git-lfs pointer, not the file itself",
            "Run `git lfs install && git lfs pull` in the repository, or use `qwenrt pull`.",
        )
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML page, not the file itself",
            "A proxy or login page was saved in its place: fetch the file again.",
        )
    return None


def _check_regular(path: Path, mode: int, kind: type[QwenrtError], asked: str) -> None:
    if not stat.S_ISREG(mode):
        form = next((name for test, name in _FORMS if test(mode)), "something else")
        raise kind(asked, f"it is {form}, not a regular file{_by_link(path)}", _IN_ITS_PLACE)


def _error(
    path: Path, kind: type[QwenrtError], asked: str, error: OSError | ValueError, missing: str
) -> QwenrtError:
    """Our error for a failure of the system."""
    number = getattr(error, "errno", None)
    linked = _by_link(path)
    if number == errno.ENOENT and linked:
        found, remedy = (
            "it is a link that leads nowhere",
            "Fetch the file it should lead to, or copy it here.",
        )
    elif number in (errno.ENOENT, errno.ENOTDIR):
        found, remedy = "no such file", missing
    elif number in (errno.EACCES, errno.EPERM):
        found, remedy = (
            "it is a link to a place that this user may not read" if linked else "this user may not read it",
            "Change its permissions, or copy the file to where it may be read.",
        )
    elif number == errno.ELOOP:
        found, remedy = "it is a link that leads in a circle", _IN_ITS_PLACE
    else:
        said = getattr(error, "strerror", None) or str(error)
        found, remedy = f"it cannot be read ({said})", "Check the path and the disk it is on."
    return kind(asked, found + linked, remedy)


def _by_link(path: Path) -> str:
    try:
        return f" ({path.name} -> {os.readlink(path)})"
    except (OSError, ValueError):
        return ""
