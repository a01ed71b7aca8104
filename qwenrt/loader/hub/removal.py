"""Delete a model from a store: only what lies inside it, and only while nobody uses it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from qwenrt.config import Environment
from qwenrt.errors import CheckpointError
from qwenrt.loader.hub.about import bytes_freed, bytes_in
from qwenrt.loader.hub.downloads import parts_of
from qwenrt.loader.hub.stores import Copy

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PROC = Path("/proc")


@dataclass(frozen=True)
class Removal:
    """What goes with a copy: ``paths`` are its directory, unfinished files, locks, packed weights and links to it.
    ``nbytes``: their size; ``freed``: less what stays because it has a name in another store too."""

    copy: Copy
    paths: tuple[Path, ...]
    nbytes: int
    freed: int


def plan(copy: Copy, env: Environment) -> Removal:
    """What deleting a copy would delete. Raises CheckpointError where that is a link, or lies outside its store."""
    asked = f"deleting {copy.repo} from {copy.store.label}"
    root = Path(os.path.realpath(copy.store.root))
    if copy.home.is_symlink() or not Path(os.path.realpath(copy.home)).is_relative_to(root):
        raise CheckpointError(
            asked,
            f"{copy.home} is a link or a place outside {root}, and links are not followed",
            f"Remove the link yourself if you want: it leads to {os.path.realpath(copy.home)}.",
        )
    places = [copy.home]
    if copy.store.hub == "huggingface":
        places.append(copy.store.root / ".locks" / copy.home.name)
    if copy.store.own:
        places.append(parts_of(copy.store.root, copy.repo))
    places = [place for place in places if place.is_dir() and not place.is_symlink()]
    alone = [*_links_to(copy.home), *_notes(copy), *_packed(copy, env)]
    packed = sum(path.lstat().st_size for path in alone)
    return Removal(copy, (*places, *alone), bytes_in(places) + packed, bytes_freed(places) + packed)


def check_unused(removal: Removal) -> None:
    """Raise CheckpointError where a process has one of the files open or mapped, or a download holds its lock.

    Processes are told by /proc, those of other users and other systems not at all; locks everywhere.
    """
    copy = removal.copy
    asked = f"deleting {copy.repo} from {copy.store.label}"
    busy = users(removal.paths)
    if busy:
        some = ", ".join(f"{name} (process {pid})" for pid, name in busy[:3])
        raise CheckpointError(asked, f"it is in use by {some}", "End that first, then try again.")
    locked = next(
        (path for place in removal.paths for path in sorted(place.rglob("*.lock")) if _held(path)), None
    )
    if locked is not None:
        raise CheckpointError(
            asked,
            f"a download of it is running ({locked.name} is locked)",
            "Wait until it is done, or end it.",
        )


def carry_out(removal: Removal) -> None:
    """Delete everything; what refers to other files first, so that what is left of an interruption is no model."""
    try:
        for path in removal.paths:
            if path.is_symlink() or path.is_file():
                path.unlink(missing_ok=True)
                continue
            if (path / "snapshots").is_dir():
                shutil.rmtree(path / "snapshots")
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(
            f"deleting {removal.copy.repo} from {removal.copy.store.label}",
            f"{error.filename or removal.copy.home}: {error.strerror or error}",
            "Check who may write there; what was deleted until then is gone.",
        ) from error


def users(paths: tuple[Path, ...]) -> list[tuple[int, str]]:
    """The other processes that have a file below ``paths`` open or mapped: number and name."""
    tops = tuple(os.path.realpath(path) + os.sep for path in paths if path.is_dir())
    found = []
    for entry in sorted(_names(_PROC)):
        if entry.isdecimal() and int(entry) != os.getpid() and _uses(_PROC / entry, tops):
            found.append((int(entry), _first_line(_PROC / entry / "comm") or "a program"))
    return found


def _uses(process: Path, tops: tuple[str, ...]) -> bool:
    for number in _names(process / "fd"):
        try:
            if os.readlink(process / "fd" / number).startswith(tops):
                return True
        except OSError:  # closed meanwhile, or another user's
            continue
    return any(f" {top}" in line for line in _lines(process / "maps") for top in tops)


def _held(lock: Path) -> bool:
    """Whether another process holds a lock file."""
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    held.release()
    return False


def _links_to(home: Path) -> list[Path]:
    """Links beside a directory that lead to it: ModelScope's older clients make one with the dots of the name."""
    beside = [home.parent / name for name in _names(home.parent)]
    return [path for path in beside if path.is_symlink() and os.path.realpath(path) == os.path.realpath(home)]


def _notes(copy: Copy) -> list[Path]:
    """The notes that files of qwenrt's own were compared with their hashes."""
    if not (copy.store.own and copy.store.hub == "huggingface"):
        return []
    noted = (copy.store.root / "verified" / name for name in _names(copy.home / "blobs"))
    return [path for path in noted if path.is_file() and not path.is_symlink()]


def _packed(copy: Copy, env: Environment) -> list[Path]:
    """Packed weights of its revisions, whose files begin with the commit."""
    packed = env.packed_cache or env.cache_dir / "packed"
    commits = tuple(f"{name}-" for name in copy.snapshots if _COMMIT.fullmatch(name))
    return [packed / name for name in _names(packed) if commits and name.startswith(commits)]


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    """The lines of a file of /proc, which has no size to be bounded by."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str:
    return next(iter(_lines(path)), "")
