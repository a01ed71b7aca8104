"""What is known of a model on this machine from its small files and the sizes of the others. Needs no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwenrt.config import Environment, ModelConfig, read_model_config
from qwenrt.errors import CheckpointError, QwenrtError
from qwenrt.loader.checkpoint.checkpoint import TORCH_DTYPES, weight_files
from qwenrt.loader.checkpoint.gguf.directory import as_directory, files_noted
from qwenrt.loader.checkpoint.header import read_shard
from qwenrt.loader.hub.downloads import parts_of
from qwenrt.loader.hub.gguf_files import models
from qwenrt.loader.hub.names import did_you_mean, short, understand
from qwenrt.loader.hub.resolve import DEMO
from qwenrt.loader.hub.stores import Copy, copies, what_lacks


@dataclass(frozen=True)
class Facts:
    """A model on this machine. ``name``: what to type for it. ``copy``: None for the built-in model and for a directory
    that was given. ``config``: None where it is none of the models that are computed here, and ``problem`` says why.
    ``lacks``: what is missing, "" where it is complete. ``nbytes``: on disk, all revisions. ``used``: when its weights
    were last read or written, as the file system notes it, in seconds since the epoch."""

    name: str
    copy: Copy | None
    directory: Path
    config: ModelConfig | None
    problem: str
    lacks: str
    nbytes: int
    used: float | None

    @property
    def whose(self) -> str:
        """In which place it is, in a word."""
        return self.copy.store.whose if self.copy is not None else "built in"


def on_this_machine(env: Environment) -> list[Facts]:
    """The built-in model, then everything in every store."""
    found = [facts(DEMO, "demo")]
    for copy in copies(env):
        found += [facts(place, name, copy) for name, place in models_of(copy, env)]
    return found


def models_of(copy: Copy, env: Environment) -> list[tuple[str, Path]]:
    """What can be loaded of a copy: names and directories. One, or each model of a repository of GGUF files."""
    directory = copy.directory()
    if directory is None:
        return []
    name, names = short(copy.repo), [file for file, size in files(directory) if size is not None]
    found = {} if any(file.endswith(".safetensors") for file in names) else models(names)
    return [(f"{name}:{tag}", _of_gguf(directory / some[0], env)) for tag, some in found.items()] or [
        (name, directory)
    ]


def _of_gguf(file: Path, env: Environment) -> Path:
    try:
        return as_directory(file, env.cache_dir)
    except QwenrtError:  # of another family, or parts are missing: what is said of the directory will do
        return file.parent


def meant(name: str, env: Environment) -> tuple[str, list[Copy], str, str]:
    """What a name means: the shortest name for it, its copies on this machine in the order of the stores, and a
    sentence with the names nearest to it, "" where it is a released one; and which of its GGUF files, "" for none.

    Raises CheckpointError for what is no name.
    """
    here = list(copies(env))
    repos = [copy.repo for copy in here]
    named = understand(name, repos)
    repo = named.repo
    found = [copy for copy in here if copy.repo.lower() == repo.lower()]
    return short(repo), found, did_you_mean(name, repos) if short(repo) == repo else "", named.gguf


def facts(directory: Path, name: str, copy: Copy | None = None, *, headers: bool = False) -> Facts:
    """What is known of the model in ``directory``. ``headers``: sizes are compared with the headers of the weights too,
    which counts as a use of them."""
    config, problem = None, ""
    try:
        config = read_model_config(directory)
    except QwenrtError as error:
        problem = f"{error.asked}: {error.found}"
    lacks = what_lacks(directory, headers=headers)
    every = [directory] if copy is None else [copy.home]
    if copy is not None and ":" in name:  # of several GGUF files
        noted = files_noted(directory) or []
        size, used = sum(os.stat(file).st_size for file in noted), _last_used_of(noted)
        return Facts(name, copy, directory, config, problem, lacks, size, used)
    if copy is not None and copy.store.own:
        every.append(parts_of(copy.store.root, copy.repo))
    return Facts(name, copy, directory, config, problem, lacks, bytes_in(every), _last_used(directory))


def precision(model: Facts) -> str:
    """How the weights are kept: "bfloat16", "gptq int4"; "" where that cannot be told."""
    if model.config is None:
        return ""
    if model.config.quant is not None:
        return model.config.quant.name
    if model.config.dtype is not None:
        return model.config.dtype
    try:
        sizes: dict[str, int] = {}
        for entry in read_shard(weight_files(model.directory)[0]).tensors:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        most = max(sizes, key=sizes.__getitem__)
    except (CheckpointError, ValueError, IndexError):
        return ""
    return TORCH_DTYPES.get(most, most)


def files(directory: Path) -> list[tuple[str, int | None]]:
    """Every file of a model by its name, with its size in bytes; None for a link that leads nowhere."""
    found = []
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place, name)
            try:
                size: int | None = path.stat().st_size
            except OSError:
                size = None
            found.append((path.relative_to(directory).as_posix(), size))
    return sorted(found)


def bytes_in(places: Iterable[Path]) -> int:
    """The bytes of all files below some directories; links are not followed, and a file with two names counts once."""
    return sum(info.st_size for info in {(one.st_dev, one.st_ino): one for one in _stats(places)}.values())


def bytes_freed(places: Iterable[Path]) -> int:
    """The bytes that deleting some directories frees: not those of files that have a name elsewhere too."""
    seen: dict[tuple[int, int], list[os.stat_result]] = {}
    for info in _stats(places):
        seen.setdefault((info.st_dev, info.st_ino), []).append(info)
    return sum(infos[0].st_size for infos in seen.values() if infos[0].st_nlink <= len(infos))


def _stats(places: Iterable[Path]) -> Iterator[os.stat_result]:
    for top in places:
        for place, _, names in os.walk(top):
            for name in names:
                try:
                    info = os.lstat(os.path.join(place, name))
                except OSError:
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield info


def _last_used(directory: Path) -> float | None:
    """The latest access to a file of weights, of which no reader of small files is one."""
    return _last_used_of(
        [
            directory / name
            for name, size in files(directory)
            if name.endswith(".safetensors") and size is not None
        ]
    )


def _last_used_of(weights: Iterable[Path]) -> float | None:
    times = [max(info.st_atime, info.st_mtime) for info in (path.stat() for path in weights)]
    return max(times, default=None)
