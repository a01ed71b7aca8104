"""A GGUF file as a model directory: config, vocabulary and template as files, and a note of where the weights are.

All that reads a model then reads it as any other. The directory is small, made once for each version of a file, and
moved into its place when it is complete.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qwenrt.config import read_json
from qwenrt.errors import CheckpointError
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.gguf.config import as_json, config_of, generation_of, model_type_of, num_layers
from qwenrt.loader.checkpoint.gguf.metadata import Metadata
from qwenrt.loader.checkpoint.gguf.names import renamed
from qwenrt.loader.checkpoint.gguf.reader import GgufFile, read_gguf
from qwenrt.loader.checkpoint.gguf.tokenizer import tokenizer_of
from qwenrt.loader.checkpoint.header import Shard, TensorEntry

NOTE = "gguf.json"  # in the directory: which files hold its weights
FORMAT = 2  # of what is written; another one is made anew
MAX_PARTS = 999
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)
logger = logging.getLogger("qwenrt")


def gguf_in(directory: Path) -> Path | None:
    """The one model in GGUF that a directory holds, the first of its parts; None where it has none, or safetensors.
    Raises CheckpointError where there are several."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return None  # whoever reads the directory says why
    if any(name.lower().endswith(".safetensors") for name in names):
        return None
    files = [n for n in names if n.lower().endswith(".gguf") and not n.lower().startswith("mmproj")]
    models = [name for name in files if (part := _PART.fullmatch(name)) is None or int(part[2]) == 1]
    if len(models) > 1:
        raise CheckpointError(
            f"cannot load the model in {directory}",
            f"it holds {len(models)} GGUF models: {', '.join(models[:8])}{', ...' if models[8:] else ''}",
            "Give the path of one of these files.",
        )
    return directory / models[0] if models else None


def as_directory(path: Path, cache: Path) -> Path:
    """The model directory of a GGUF file, or of the set of parts that it belongs to, under ``cache``; where that cannot
    be written, a temporary one that lasts as long as the process. Raises CheckpointError and ConfigError."""
    paths = parts_of(path.absolute())
    target = cache / "gguf" / _key(paths) / (_stem(paths[0]) or "model")
    if is_there(target / NOTE, CheckpointError):
        return target
    files = _files(paths)
    content = _content(files)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as working:
            made = _written(Path(working) / target.name, content)
            try:
                made.rename(target)
            except OSError:
                if not is_there(target / NOTE, CheckpointError):  # else another process was faster
                    raise
        return target
    except OSError as error:
        logger.warning("the vocabulary of %s is not kept in %s: %s", path.name, cache, error)
        scratch = tempfile.mkdtemp(prefix="qwenrt-gguf-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        return _written(Path(scratch) / target.name, content)


def weights_of(directory: Path) -> tuple[tuple[Shard, ...], dict[str, TensorEntry]] | None:
    """The files that a directory of `as_directory` notes, checked again, and their tensors under HuggingFace's names;
    None of any other directory."""
    paths = files_noted(directory)
    if paths is None:
        return None
    files = _files(paths)
    return tuple(file.shard for file in files), _tensors(files)


def files_noted(directory: Path) -> list[Path] | None:
    """The GGUF files that a directory of `as_directory` was made from; None of any other directory."""
    note = directory / NOTE
    if not is_there(note, CheckpointError):
        return None
    named = read_json(note, CheckpointError).get("files")
    listed = named if isinstance(named, list) else []
    if not 1 <= len(listed) <= MAX_PARTS or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(
            f"reading {note}", "it names no files", "Delete the directory; it is made again."
        )
    return [Path(name) for name in listed]


def part_of(name: str) -> tuple[str, int, int] | None:
    """Of a file's name that is one of a set's: the set's, its number from 1, and how many there are; None of others."""
    match = _PART.fullmatch(name)
    return None if match is None else (match[1], int(match[2]), int(match[3]))


def parts_of(path: Path) -> list[Path]:
    """All parts of the set that a file belongs to; the file alone where its name is not that of a part."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count <= MAX_PARTS:
        return [path]
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{path.suffix}") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not is_there(part, CheckpointError)]
    if missing:
        raise CheckpointError(
            f"cannot load {path.name}",
            f"{len(missing)} of its {count} parts are missing: {', '.join(missing[:5])}",
            "Fetch all parts into one directory.",
        )
    return parts


def _files(paths: list[Path]) -> list[GgufFile]:
    files = [read_gguf(path) for path in paths]
    for number, file in enumerate(files):
        metadata = Metadata(file.shard.path, file.metadata)
        count, own = metadata.integer("split.count", 1), metadata.integer("split.no", 0)
        if (count, own) not in ((len(files), number), (0, 0)):
            found = f"it says that it is part {own + 1} of {count}, and its name says {number + 1} of {len(files)}"
            remedy = "Give files of one set their own names again, as NAME-00001-of-00003.gguf."
            raise CheckpointError(f"cannot load {file.shard.path.name}", found, remedy)
    return files


def _tensors(files: list[GgufFile]) -> dict[str, TensorEntry]:
    first = Metadata(files[0].shard.path, files[0].metadata)
    entries = tuple(entry for file in files for entry in file.shard.tensors)
    total = first.integer("split.tensors.count", len(entries)) or len(entries)
    if total != len(entries):
        found = f"its parts hold {len(entries)} tensors, and it says {total}"
        raise CheckpointError(
            f"cannot load {first.path.name}", found, "The parts are of two models: fetch them again."
        )
    return renamed(entries, model_type_of(first), num_layers(first))


def _content(files: list[GgufFile]) -> Mapping[str, str]:
    """File name -> text, the note last."""
    metadata = Metadata(files[0].shard.path, files[0].metadata)
    model_type = model_type_of(metadata)
    tensors = _tensors(files)
    config = config_of(metadata, tensors)
    tokenizer = tokenizer_of(metadata, model_type)
    generation = generation_of(metadata, model_type, tokenizer.end_ids, tokenizer.chats)
    return {
        "config.json": as_json(config),
        "generation_config.json": as_json(generation),
        **tokenizer.files,
        NOTE: as_json({"files": [str(file.shard.path) for file in files]}),
    }


def _written(directory: Path, content: Mapping[str, str]) -> Path:
    directory.mkdir()
    for name, text in content.items():
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return directory


def _key(paths: list[Path]) -> str:
    """Of where the files are and what they were like: a file that changed has another directory. A config.json beside
    them has a say as well."""
    looks: list[object] = [FORMAT]
    for path in (*paths, paths[0].with_name("config.json")):
        try:
            info = path.stat()
        except OSError:
            continue  # reading it says why
        looks.append([str(path), info.st_size, info.st_mtime_ns])
    return hashlib.sha256(json.dumps(looks).encode()).hexdigest()[:24]


def _stem(path: Path) -> str:
    """The model's name as the file's says it, in characters that any directory may have."""
    match = _PART.fullmatch(path.name)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", match[1] if match else path.stem)[:100].strip(".-")
