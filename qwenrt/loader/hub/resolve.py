"""From a model's name to a directory: built in, local, of a GGUF file, from HuggingFace or from ModelScope."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qwenrt.config import Environment, read_model_config
from qwenrt.errors import CheckpointError, QwenrtError, shown
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.gguf.directory import as_directory, gguf_in
from qwenrt.loader.hub import huggingface, modelscope
from qwenrt.loader.hub.gguf_files import chosen
from qwenrt.loader.hub.names import Meant, did_you_mean, short, understand
from qwenrt.loader.hub.pull import GOES_ON, SMALL_FILES, WEIGHT_FILES, NotCached, Pull, Unreachable
from qwenrt.loader.hub.stores import Copy, copies, what_lacks
from qwenrt.loader.progress import tell

_log = logging.getLogger(__name__)

SOURCES = ("auto", "huggingface", "modelscope")
DEMO = Path(__file__).parents[2] / "demo"

_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")


def source_of(model: str | os.PathLike[str]) -> Path:
    """The directory ``model``, or that of a model of this name, as `resolve` finds it."""
    return Path(model) if Path(model).is_dir() else resolve(model)


def resolve(
    name: str | os.PathLike[str],
    source: str = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    env: Environment | None = None,
    progress: bool | None = None,
    *,
    weights: bool = True,
    newest: bool = False,
) -> Path:
    """The directory of a model's files, fetched if it must be.

    ``name``: "demo", a directory, a GGUF file or the directory that has one, a name as "Qwen3-4B" or "qwen3:4b",
    "owner/name" on a hub, or "owner/name:Q4_K_M", a GGUF file of it, in this order. What is complete on this machine is
    used as it is, that of HuggingFace's and ModelScope's own tools too; what is not is fetched, without the files that
    are here. ``source`` "auto" asks HuggingFace, and ModelScope where that cannot be reached. ``offline`` (default: the
    environment's) opens no socket. ``weights`` False needs configuration and tokenizer alone (which a GGUF file has
    within). ``newest`` asks the hub also where an earlier download is complete. Fetched files are kept in
    ``env.cache_dir`` and checked to be complete. Raises CheckpointError.
    """
    env = Environment.read() if env is None else env
    offline = env.offline if offline is None else offline
    if not isinstance(source, str) or source not in SOURCES:
        raise CheckpointError(
            f"source={shown(source)}", "not a known source", f"Use one of {', '.join(SOURCES)}."
        )
    if revision is not None and not (
        isinstance(revision, str) and _REVISION.fullmatch(revision) and ".." not in revision
    ):
        raise CheckpointError(
            f"revision={shown(revision)}", "not a branch, tag or commit", "Leave it out for the newest."
        )
    local = local_directory(name, env)
    if local is not None:
        return local
    wanted = _Wanted.of(os.fspath(name), source, revision, offline, env, progress, weights)
    if wanted.meant.note:
        tell(wanted.meant.note, progress)
    here = wanted.at_hand(newest and not offline)
    return here if here is not None else _from_any_source(wanted.fetched, source, wanted)


@dataclass(frozen=True)
class _Wanted:
    """What resolve was asked for, and the copies of it on this machine; ``incomplete``: of those looked at, the ones
    that are not whole, and what each lacks."""

    meant: Meant
    asked: str
    revision: str | None
    offline: bool
    env: Environment
    show: bool | None
    weights: bool
    copies: tuple[Copy, ...]
    all_here: tuple[Copy, ...]
    incomplete: list[tuple[Copy, Path, str]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        source: str,
        revision: str | None,
        offline: bool,
        env: Environment,
        show: bool | None,
        weights: bool,
    ) -> _Wanted:
        here = list(copies(env, None if source == "auto" else source))
        meant = understand(name, [copy.repo for copy in here])
        own = tuple(copy for copy in here if copy.repo.lower() == meant.repo.lower())
        return cls(meant, name, revision, offline, env, show, weights, own, tuple(here))

    def at_hand(self, newest: bool) -> Path | None:
        """A complete copy on this machine. ``newest``: only of other tools, since the hub is asked for a newer one."""
        for copy in self.copies:
            directory = copy.directory(self.revision)
            if directory is None or (self.meant.gguf and not self._gguf_in(directory)):
                continue
            if self.meant.gguf:
                if newest and copy.store.own:
                    continue
                if copy.store.hub == "huggingface" and copy.store.own and not self.offline:
                    huggingface.verify(self._pull("huggingface"), directory)
                return self._of_gguf(directory)
            lacks = what_lacks(directory, weights=self.weights, tokenizer=not self.offline)
            if lacks:
                self.incomplete.append((copy, directory, lacks))
                if not copy.store.own:
                    tell(f"{copy.store.label} has {self.meant.repo} incomplete: {lacks}", self.show)
            elif not copy.store.own:
                tell(f"using the copy in {copy.store.label}", self.show)
                return directory
            elif not newest:
                if copy.store.hub == "huggingface" and not self.offline:
                    huggingface.verify(self._pull("huggingface"), directory)
                return directory
        return None

    def fetched(self, hub: str) -> Path:
        """The directory, fetched from a hub; an earlier download where the hub cannot be reached."""
        request = self._pull(hub)
        try:
            return self._of_gguf(_fetch(request))
        except Unreachable as error:
            try:
                directory = self._of_gguf(_fetch(replace(request, offline=True)))
            except CheckpointError:
                raise error from None
            _log.warning("%s: %s; using the files in %s", error.asked, error.found, directory)
            return directory

    def _gguf_in(self, directory: Path) -> Path | None:
        """The first file of the GGUF model that is meant, if all of it is here."""
        try:
            names = [name for name in os.listdir(directory) if is_there(directory / name, CheckpointError)]
            return directory / chosen(names, self.meant.gguf, self.meant.repo, "")[0]
        except (OSError, CheckpointError):
            return None

    def _of_gguf(self, directory: Path) -> Path:
        """The directory of the GGUF model that is meant in that of its repository; this one itself for no such."""
        file = self._gguf_in(directory) if self.meant.gguf else None
        return directory if file is None else as_directory(file, self.env.cache_dir)

    def _pull(self, hub: str) -> Pull:
        huggingface_hub = hub == "huggingface"
        env = self.env
        return Pull(
            hub="HuggingFace" if huggingface_hub else "ModelScope",
            repo=self.meant.repo,
            revision=self.revision,
            cache_dir=env.cache_dir / hub,
            endpoint=env.hf_endpoint if huggingface_hub else env.modelscope_endpoint,
            token=env.hf_token if huggingface_hub else None,
            offline=self.offline,
            show=self.show,
            patterns=SMALL_FILES + (("*.gguf",) if self.meant.gguf else WEIGHT_FILES if self.weights else ()),
            gguf=self.meant.gguf,
            nearest=self.nearest,
            beside=tuple(directory for copy, directory, _ in self.incomplete if not copy.store.own),
            accept=_accept,
        )

    @property
    def nearest(self) -> str:
        """The sentence about other names, where this one is not known to exist."""
        return "" if short(self.meant.repo) != self.meant.repo else did_you_mean(self.asked, self.names())

    def names(self, whole: bool = False) -> list[str]:
        """What can be typed for the models on this machine that are computed here. ``whole``: and that lack nothing."""
        found: dict[str, None] = {}
        for copy in self.all_here:
            directory = copy.directory()
            if directory is None or not _is_run_here(directory):
                continue
            if not (whole and what_lacks(directory, weights=True)):
                found[short(copy.repo)] = None
        return [*found]


def _is_run_here(directory: Path) -> bool:
    try:
        read_model_config(directory)
    except QwenrtError:
        return False
    return True


def _accept(directory: Path) -> None:
    """Raise for a model that is none of those that are computed here, before its weights are fetched."""
    if is_there(directory / "config.json", CheckpointError):
        read_model_config(directory)


def _fetch(pull: Pull) -> Path:
    directory = huggingface.fetch(pull) if pull.hub == "HuggingFace" else modelscope.fetch(pull)
    _check(pull, directory)
    return directory


def _from_any_source(pull: Callable[[str], Path], source: str, wanted: _Wanted) -> Path:
    """Ask the sources in turn; one is skipped only if it cannot be reached or, offline, has nothing in the cache."""
    hubs = ("huggingface", "modelscope") if source == "auto" else (source,)
    failures: list[CheckpointError] = []
    for hub in hubs:
        if failures and hub == "modelscope" and not modelscope.installed():
            continue
        try:
            return pull(hub)
        except (Unreachable, NotCached) as error:
            failures.append(error)
        except CheckpointError as error:
            if not failures:
                raise
            before = f"{failures[0].asked}: {failures[0].found}"
            raise CheckpointError(
                error.asked, f"{error.found}; before that, {before}", error.remedy
            ) from error
    first = failures[0]
    if isinstance(first, NotCached):
        raise _not_here(wanted) from first
    also = "; ".join(f"{error.asked}: {error.found}" for error in failures[1:])
    if len(hubs) == 2 and len(failures) == 1:
        also = "ModelScope was not tried: pip install 'qwenrt[modelscope]'"
    remedy = first.remedy
    if len(failures) == 2:
        mirrors = "set HF_ENDPOINT or MODELSCOPE_ENDPOINT to a mirror"
        remedy = f"Check the network and proxy settings, or {mirrors}. {GOES_ON}"
    raise Unreachable(first.asked, first.found + (f"; {also}" if also else ""), remedy) from first


def local_directory(name: str | os.PathLike[str], env: Environment) -> Path | None:
    """The built-in model, an existing directory or that of a GGUF file; None if ``name`` is one on a hub."""
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise CheckpointError(
            f"cannot load the model {shown(name)}", "that is not a name", "Give a directory or a name."
        )
    text = os.fspath(name)
    if text == "demo":
        if is_there(DEMO / "config.json", CheckpointError):
            return DEMO
        raise CheckpointError(
            "the built-in model 'demo'", f"it is not in this installation ({DEMO})", "Reinstall qwenrt."
        )
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            model = gguf_in(path)
            return path.absolute() if model is None else as_directory(model, env.cache_dir)
        is_file = "\0" not in text and is_there(path, CheckpointError)
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a NUL
        raise CheckpointError(
            f"cannot load the model {text[:120]!r}", str(error), "Check the name."
        ) from error
    is_gguf = path.suffix.lower() == ".gguf"
    if is_file and is_gguf:
        return as_directory(path, env.cache_dir)
    if is_file:
        raise CheckpointError(
            f"cannot load {path}",
            "it is a file",
            f"Give the directory that holds it: {path.absolute().parent}.",
        )
    if (
        is_gguf
        or isinstance(name, os.PathLike)
        or text.startswith((".", "~", os.sep))
        or "\\" in text
        or text.count("/") > 1
    ):
        if "://" in text:
            raise CheckpointError(
                f"cannot load {text[:200]!r}",
                "it is an address",
                "Give 'owner/name', as 'Qwen/Qwen3-4B'.",
            )
        raise CheckpointError(
            f"cannot load the model in {path}",
            f"there is no such {'file' if is_gguf else 'directory'}{_suggestion(path)}",
            "Check the path, or give a name on a hub, as 'Qwen/Qwen3-4B'.",
        )
    return None


def _suggestion(path: Path) -> str:
    """What exists: names close to a misspelt one, or how much of the path."""
    parent = next((place for place in path.absolute().parents if place.is_dir()), None)
    if parent is None:
        return ""
    if parent != path.absolute().parent:
        return f" ({parent} is the last part that exists)"
    try:
        close = difflib.get_close_matches(path.name, os.listdir(parent), 1)
    except OSError:
        return ""
    return f" (did you mean {close[0]!r}?)" if close else ""


def _not_here(wanted: _Wanted) -> NotCached:
    """Offline, and no copy is complete: what each lacks, and which models are here."""
    lacks = [f"the copy in {copy.store.label} is not complete: {lack}" for copy, _, lack in wanted.incomplete]
    found = "; ".join(lacks) or "there is no copy of it on this machine"
    here = [name for name in wanted.names(whole=True) if name != short(wanted.meant.repo)]
    some = ", ".join(here[:8]) + (", ..." if len(here) > 8 else "")
    otherwise = "choose one of those" if here else "give the directory of a model that is here"
    return NotCached(
        f"loading {wanted.meant.repo}",
        f"offline, and {found}; there is: {some or 'nothing'}",
        f"Go online once (qwenrt pull), or {otherwise}. {wanted.nearest}".strip(),
    )


def _check(pull: Pull, directory: Path) -> None:
    """Raise CheckpointError unless a fetched directory holds a complete model."""
    if pull.gguf:  # whose config is in the file, which is looked at next
        names = os.listdir(directory)
        try:
            chosen(names, pull.gguf, pull.repo, pull.asked)
        except CheckpointError as error:
            if pull.offline:
                pull.not_cached(error)
            raise
        return
    if not is_there(directory / "config.json", CheckpointError):
        if pull.offline:
            pull.not_cached()
        pull.fail("the repository has no config.json", "It holds no model that qwenrt can read.")
    if not pull.weights:
        return
    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        if pull.offline:
            pull.not_cached(error)
        raise
