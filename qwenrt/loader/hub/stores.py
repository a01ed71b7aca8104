"""The models on this machine: in qwenrt's own place, HuggingFace's cache and ModelScope's. Nothing is changed here.

Two layouts serve all of them. HuggingFace's client keeps models--owner--name/snapshots/<commit>/, whose files are links
into blobs/ beside it. ModelScope's keeps models/owner--name/snapshots/<revision>/ with the files themselves; its older
versions kept owner/name in models/, in hub/models/ or in hub/, with each dot of a name written as three underscores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenrt.config import Environment
from qwenrt.errors import CheckpointError
from qwenrt.files import is_there, read
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint, weight_files
from qwenrt.text.tokenizer.tokenizer import TOKENIZER_FILES

_WHOSE = {
    "qwenrt": "qwenrt's own place",
    "huggingface": "HuggingFace's cache",
    "modelscope": "ModelScope's cache",
}
DEFAULT_REVISIONS = ("main", "master")
_OLD_PLACES = ("models", "hub/models", "hub", "")  # of ModelScope's older clients, below its cache
_NO_OWNERS = frozenset(
    ("models", "datasets", "hub", "spaces", "studios", "skills", "packages", "credentials")
)


@dataclass(frozen=True)
class Store:
    """A directory of models. ``whose``: qwenrt, huggingface or modelscope, whose tools made it; ``hub``: where its
    files are from, huggingface or modelscope, which is also its layout."""

    whose: str
    hub: str
    root: Path

    @property
    def own(self) -> bool:
        return self.whose == "qwenrt"

    @property
    def label(self) -> str:
        """Whose it is, in words."""
        return _WHOSE[self.whose]


@dataclass(frozen=True)
class Copy:
    """A repository in a store. ``home``: the directory that holds all of it; ``snapshots``: revision -> the directory
    of its files; ``named``: branch or tag -> revision."""

    repo: str
    store: Store
    home: Path
    snapshots: Mapping[str, Path]
    named: Mapping[str, str]

    def directory(self, revision: str | None = None) -> Path | None:
        """The files of a revision, by default of the main branch, else of the newest that is here; None: not here."""
        if revision is not None:
            return self.snapshots.get(self.named.get(revision, revision))
        for branch in DEFAULT_REVISIONS:
            if (found := self.snapshots.get(self.named.get(branch, branch))) is not None:
                return found
        return max(self.snapshots.values(), key=_changed, default=None)


def stores(env: Environment) -> list[Store]:
    """Where models are looked for, in this order; a directory that two settings name comes once."""
    places = [
        Store("qwenrt", "huggingface", env.cache_dir / "huggingface"),
        Store("qwenrt", "modelscope", env.cache_dir / "modelscope"),
    ]
    if env.hf_cache is not None:
        places.append(Store("huggingface", "huggingface", env.hf_cache))
    if env.modelscope_cache is not None:
        places.append(Store("modelscope", "modelscope", env.modelscope_cache))
    return list({os.path.realpath(store.root): store for store in reversed(places)}.values())[::-1]


def copies(env: Environment, hub: str | None = None) -> Iterator[Copy]:
    """Every repository in every store, or in those of one ``hub``."""
    for store in stores(env):
        if hub in (None, store.hub):
            yield from _hub_copies(store) if store.hub == "huggingface" else _modelscope_copies(store)


def what_lacks(directory: Path, *, weights: bool = True, tokenizer: bool = True, headers: bool = True) -> str:
    """What a directory lacks of a model, in words; "" where it is complete.

    Shards are compared with their index, and, with ``headers``, their sizes with what their headers say. No tensor is
    read, and nothing is changed.
    """
    try:
        if not is_there(directory / "config.json", CheckpointError):
            return "config.json"
        if tokenizer and not any(is_there(directory / name, CheckpointError) for name in TOKENIZER_FILES):
            return f"the tokenizer ({', '.join(TOKENIZER_FILES[:-1])} or {TOKENIZER_FILES[-1]})"
        if weights:
            open_checkpoint(directory) if headers else weight_files(directory)
    except CheckpointError as error:
        return error.found
    return ""


# ---- the two layouts


def _hub_copies(store: Store) -> Iterator[Copy]:
    for home in _directories(store.root):
        kind, _, repo = home.name.partition("--")
        if kind == "models" and repo:
            snapshots = {place.name: place for place in _directories(home / "snapshots")}
            yield Copy(repo.replace("--", "/", 1), store, home, snapshots, _refs(home / "refs"))


def _refs(directory: Path) -> dict[str, str]:
    """The commit of each branch and tag that the client noted."""
    found = {}
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place, name)
            try:
                commit = read(path, 200, CheckpointError, what="note of a commit")
            except CheckpointError:
                continue
            found[path.relative_to(directory).as_posix()] = commit.decode("ascii", "replace").strip()
    return found


def _modelscope_copies(store: Store) -> Iterator[Copy]:
    for home in _directories(store.root / "models"):
        owner, _, name = home.name.partition("--")
        if name and (snapshots := {place.name: place for place in _directories(home / "snapshots")}):
            yield Copy(f"{owner}/{name}", store, home, snapshots, {})
    seen: set[str] = set()
    for place in _OLD_PLACES:
        for folder in _directories(store.root / place):
            if folder.name in _NO_OWNERS or folder.name.startswith(".") or "--" in folder.name:
                continue
            for home in _directories(folder):
                real = os.path.realpath(home)  # its name with dots is a link to the one without
                if real not in seen and os.path.lexists(home / "config.json"):
                    seen.add(real)
                    repo = f"{folder.name}/{home.name.replace('___', '.')}"
                    yield Copy(repo, store, Path(real), {"master": Path(real)}, {})


def _directories(parent: Path) -> list[Path]:
    """The directories in a directory, links to such included; none where it cannot be read."""
    try:
        return sorted(parent / name for name in os.listdir(parent) if os.path.isdir(parent / name))
    except OSError:
        return []


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
