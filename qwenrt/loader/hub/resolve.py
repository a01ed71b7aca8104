"""From a model's name to a directory: built in, local, of a GGUF file, from HuggingFace or from ModelScope."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qwenrt.config import Environment
from qwenrt.errors import CheckpointError, shown
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.gguf.directory import as_directory, gguf_in
from qwenrt.loader.hub import huggingface, modelscope
from qwenrt.loader.hub.pull import SMALL_FILES, WEIGHT_FILES, NotCached, Pull, Unreachable

_log = logging.getLogger(__name__)

SOURCES = ("auto", "huggingface", "modelscope")
DEMO = Path(__file__).parents[2] / "demo"

# Later generations are many: a name of this form is that of a repository.
_LATER = re.compile(r"(?:qwen(?:1\.5|2|2\.5|3)|qwq)-[a-z0-9][a-z0-9._-]{0,60}[a-z0-9]", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
# Both hubs keep the family under the same owner and names.
ALIASES = {
    name.lower(): f"Qwen/{name}"
    for size in ("Qwen-1_8B", "Qwen-7B", "Qwen-14B", "Qwen-72B")
    for name in (size, f"{size}-Chat", f"{size}-Chat-Int4", f"{size}-Chat-Int8")
}


def resolve(
    name: str | os.PathLike[str],
    source: str = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    env: Environment | None = None,
    progress: bool | None = None,
    *,
    weights: bool = True,
) -> Path:
    """The directory of a model's files, fetched if it must be.

    ``name``: "demo", a GGUF file, a directory (that of a GGUF file too, or of the parts of one), an alias as
    "Qwen-7B-Chat", or "owner/name" on a hub, in this order. ``source``
    "auto" asks HuggingFace, and ModelScope where that cannot be reached. ``offline`` (default: the environment's)
    opens no socket. ``weights`` False fetches only configuration and tokenizer. Fetched files are kept in
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
    local = _local(name, env.cache_dir)
    if local is not None:
        return local
    repo = _repo_id(os.fspath(name))
    patterns = SMALL_FILES + WEIGHT_FILES if weights else SMALL_FILES

    def pull(hub: str) -> Path:
        huggingface_hub = hub == "huggingface"
        request = Pull(
            hub="HuggingFace" if huggingface_hub else "ModelScope",
            repo=repo,
            revision=revision,
            cache_dir=env.cache_dir / hub,
            endpoint=env.hf_endpoint if huggingface_hub else env.modelscope_endpoint,
            token=env.hf_token if huggingface_hub else None,
            offline=offline,
            show=progress,
            patterns=patterns,
        )
        try:
            return _fetch(request, weights)
        except Unreachable as error:
            try:
                directory = _fetch(replace(request, offline=True), weights)
            except CheckpointError:
                raise error from None
            _log.warning("%s: %s; using the files in %s", error.asked, error.found, directory)
            return directory

    return _from_any_source(pull, source, env)


def _fetch(pull: Pull, weights: bool) -> Path:
    directory = huggingface.fetch(pull) if pull.hub == "HuggingFace" else modelscope.fetch(pull)
    _check(pull, directory, weights)
    return directory


def _from_any_source(pull: Callable[[str], Path], source: str, env: Environment) -> Path:
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
        there = _cached(env)
        found = f"offline, and it is not complete in {env.cache_dir}; there is: {there or 'nothing'}"
        otherwise = "choose one of those" if there else "give the directory of a model that is here"
        raise NotCached(first.asked, found, f"Go online once (qwenrt pull), or {otherwise}.") from first
    also = "; ".join(f"{error.asked}: {error.found}" for error in failures[1:])
    if len(hubs) == 2 and len(failures) == 1:
        also = "ModelScope was not tried: pip install 'qwenrt[modelscope]'"
    raise Unreachable(first.asked, first.found + (f"; {also}" if also else ""), first.remedy) from first


def _local(name: str | os.PathLike[str], cache_dir: Path) -> Path | None:
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
            return path.absolute() if model is None else as_directory(model, cache_dir)
        is_file = "\0" not in text and is_there(path, CheckpointError)
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a NUL
        raise CheckpointError(
            f"cannot load the model {text[:120]!r}", str(error), "Check the name."
        ) from error
    is_gguf = path.suffix.lower() == ".gguf"
    if is_file and is_gguf:
        return as_directory(path, cache_dir)
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
                "Give 'owner/name', as 'Qwen/Qwen-7B-Chat'.",
            )
        raise CheckpointError(
            f"cannot load the model in {path}",
            f"there is no such {'file' if is_gguf else 'directory'}{_suggestion(path)}",
            "Check the path, or give a name on a hub, as 'Qwen/Qwen-7B-Chat'.",
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


def _repo_id(name: str) -> str:
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    alternative = name.lower().replace("1.8b", "1_8b")
    if alternative in ALIASES:
        return ALIASES[alternative]
    if (
        _REPO.fullmatch(name)
        and ".." not in name
        and "--" not in name
        and not name.endswith((".git", "-", "."))
    ):
        return name
    if _LATER.fullmatch(name):
        return f"Qwen/{name}"
    known = [repo.partition("/")[2] for repo in ALIASES.values()]
    close = difflib.get_close_matches(name, known, 3)
    raise CheckpointError(
        f"cannot load the model {name[:120]!r}",
        "it is no directory, no known name, and not of the form 'owner/name'",
        f"Did you mean {' or '.join(close)}?" if close else f"Known names: demo, {', '.join(known)}.",
    )


def _check(pull: Pull, directory: Path, weights: bool) -> None:
    """Raise CheckpointError unless a fetched directory holds a complete model."""
    if not is_there(directory / "config.json", CheckpointError):
        if pull.offline:
            pull.not_cached()
        pull.fail("the repository has no config.json", "It holds no model that qwenrt can read.")
    if not weights:
        return
    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        if pull.offline:
            pull.not_cached(error)
        raise


def _cached(env: Environment) -> str:
    """Names of the models whose files are in the cache, complete or not."""
    places = (env.cache_dir / "huggingface").glob("models--*/snapshots/*/config.json")
    found = {path.parents[2].name.removeprefix("models--").replace("--", "/") for path in places}
    places = (env.cache_dir / "modelscope" / "models").glob("*/snapshots/*/config.json")
    found |= {path.parents[2].name.replace("--", "/") + " (ModelScope)" for path in places}
    return ", ".join(sorted(found))
