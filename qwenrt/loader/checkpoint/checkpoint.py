"""A model directory's weights: its files found, checked as a whole, and memory-mapped tensor by tensor."""

from __future__ import annotations

import logging
import mmap
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenrt.config import read_json
from qwenrt.errors import CheckpointError, memory_ran_out
from qwenrt.files import is_there, opened
from qwenrt.loader.checkpoint.gguf.directory import files_noted, weights_of
from qwenrt.loader.checkpoint.header import AS_WRITTEN, Shard, TensorEntry, read_shard
from qwenrt.loader.checkpoint.mapping import map_file
from qwenrt.ops.ggml_types import CODED

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("qwenrt")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARDS = 4096
_NO_INDEX = "Put the model's own index in its place; without any, numbered files are found by their names."
_CHUNK = 2**20  # bytes of two tensors compared at once
_NUMBERED = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Directories that download clients fill with links into a store of files beside them.
_STORES = {"snapshots": "blobs"}


@dataclass(frozen=True)
class Checkpoint:
    """The checked files of one model: every tensor by name, none of its data read yet."""

    directory: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Find the safetensors files of a model directory, or the GGUF files that it was made from, and check them as one.

    Reads headers only. Raises CheckpointError when files are missing, extra, named outside the directory, not what
    they seem, or when headers and sizes disagree; and for pickled weights, which are refused. Where an index tells of
    the tensors other than the headers do, it is a warning.
    """
    directory = Path(directory)
    noted = weights_of(directory)
    if noted is not None:
        return Checkpoint(directory, *noted)
    names, index = _find_files(directory)
    for name in names:
        check_link(directory, name)
    if index is not None:
        _check_extra(directory, names)
    shards = tuple(read_shard(directory / name) for name in names)
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        for entry in shard.tensors:
            first = tensors.get(entry.name)
            if first is not None and same_bytes(first, entry):
                logger.warning(
                    "%r is in %s and, the same, in %s", entry.name[:80], first.shard.name, entry.shard.name
                )
            elif first is not None:
                raise CheckpointError(
                    f"cannot read the checkpoint in {directory}",
                    f"tensor {entry.name[:80]!r} is in {first.shard.name} and, different, in {entry.shard.name}",
                    "The files belong to two versions of the model: keep one set and delete the other.",
                )
            tensors[entry.name] = entry
    checkpoint = Checkpoint(directory, shards, tensors)
    if index is not None:
        _compare_index(checkpoint, index)
    return checkpoint


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, told by their names alone; none is opened. Raises CheckpointError where
    some are missing, links that lead nowhere included."""
    paths = files_noted(directory) or [directory / name for name in _find_files(directory)[0]]
    for path in paths:
        try:
            path.stat()
        except OSError:
            opened(path, CheckpointError).close()  # says what is wrong with it
    return paths


def _find_files(directory: Path) -> tuple[list[str], _Index | None]:
    """The names of the safetensors files, all of which are there, and the index that says so, if there is one."""
    index = _read_index(directory)
    if index is not None and _is_left_over(directory, index):
        index = None
    names = index.files if index is not None else _files_without_index(directory)
    _check_present(directory, names)
    return names, index


def same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors are equal bit for bit, dtype and shape included."""
    if (one.dtype, one.shape, one.transposed) != (other.dtype, other.shape, other.transposed):
        return False
    try:
        with opened(one.shard, CheckpointError) as first, opened(other.shard, CheckpointError) as second:
            first.seek(one.begin)
            second.seek(other.begin)
            for start in range(0, one.nbytes, _CHUNK):
                count = min(_CHUNK, one.nbytes - start)
                if first.read(count) != second.read(count):
                    return False
    except OSError as error:
        raise CheckpointError(
            f"comparing {one.name} with {other.name}",
            f"{error.strerror or error} ({one.shard.parent})",
            "Check the files and their permissions.",
        ) from error
    return True


class TensorReader:
    """Tensors of a checkpoint by name, as views of its memory-mapped files (private: writes never reach the file)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shards = {shard.path: shard for shard in checkpoint.shards}
        self._maps: dict[Path, mmap.mmap] = {}
        self._places: dict[tuple[int, int], str] = {}  # (address, bytes) of what is mapped -> its name

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor ``name``; its memory is the file's until something is copied. Of GGUF's codes: the bytes of each
        row, uint8 [N, bytes]. Raises CheckpointError when the file changed since it was checked, or holds a dtype that
        torch has not."""
        import torch

        entry = self._checkpoint.tensors[name]
        dtype = (
            torch.uint8 if entry.dtype in CODED else getattr(torch, TORCH_DTYPES.get(entry.dtype, ""), None)
        )
        if dtype is None:
            raise CheckpointError(
                f"cannot read tensor {name!r} of {entry.shard.name}",
                f"its dtype is {entry.dtype}, which torch {torch.__version__} has not",
                "Use a release of the model in float16, bfloat16 or GPTQ Int4/Int8.",
            )
        if entry.nbytes == 0:
            try:
                return torch.empty(entry.shape, dtype=dtype)
            except RuntimeError as error:  # one size is 0 and the product of the others no 64-bit number
                raise CheckpointError(
                    f"cannot read tensor {name[:80]!r} of {entry.shard.name}",
                    f"it is empty and has the shape {list(entry.shape)}",
                    AS_WRITTEN,
                ) from error
        mapped = self._map(entry.shard)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of buffers that are read-only
            flat = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        if flat.data_ptr() % dtype.itemsize:
            flat = flat.clone()  # files of old writers: data not aligned to its dtype
        if entry.dtype in CODED:
            return flat.view(entry.shape[0], -1)
        if entry.transposed:
            return flat.view(dtype).view(entry.shape[::-1]).t()
        return flat.view(dtype).view(entry.shape)

    def dtype(self, name: str) -> str:
        """The dtype of the tensor ``name``, as its file names it."""
        return self._checkpoint.tensors[name].dtype

    def release(self, name: str) -> None:
        """Drop the pages of a tensor that was copied; the mapping stays valid and reads them again when used."""
        entry = self._checkpoint.tensors[name]
        mapped = self._maps.get(entry.shard)
        if mapped is None or not hasattr(mapped, "madvise"):
            return
        page = mmap.PAGESIZE
        first, last = -(-entry.begin // page) * page, entry.end // page * page
        if last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def origin(self, tensor: torch.Tensor) -> str | None:
        """The name of the tensor whose mapped memory ``tensor`` is, as a whole and in order; None for any other."""
        if not self._places:
            self._places = {
                (self._address(entry.shard) + entry.begin, entry.nbytes): name
                for name, entry in self._checkpoint.tensors.items()
                if entry.shard in self._maps and not entry.transposed and entry.nbytes
            }
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        name = self._places.get((tensor.data_ptr(), tensor.nbytes))
        if name is None:
            return None
        entry = self._checkpoint.tensors[name]
        same = f"torch.{TORCH_DTYPES.get(entry.dtype)}" == str(tensor.dtype) and entry.shape == tensor.shape
        return name if same else None

    def _address(self, path: Path) -> int:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.frombuffer(self._maps[path], dtype=torch.uint8, count=1).data_ptr()

    def _map(self, path: Path) -> mmap.mmap:
        shard = self._shards[path]
        try:
            if path not in self._maps:
                with opened(path, CheckpointError, asked=f"cannot read {path.name}") as file:
                    self._maps[path] = map_file(file, path)
            info = path.stat()
        except (OSError, ValueError) as error:
            if memory_ran_out(error):
                raise
            raise CheckpointError(
                f"cannot read {path.name}", str(error), "Check the file, its permissions and its disk."
            ) from error
        if (info.st_size, info.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise CheckpointError(
                f"cannot read {path.name}",
                f"it changed while it was loaded: {shard.size} bytes when checked, {info.st_size} now",
                "Wait until nothing writes to the model directory, then load again.",
            )
        return self._maps[path]


TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json: tensor name -> file name, and the bytes of all tensors where it says so."""

    weight_map: dict[str, str]
    total_size: int | float | None

    @property
    def files(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def _read_index(directory: Path) -> _Index | None:
    """The index with its file names checked; None where there is none."""
    path = directory / INDEX
    if not is_there(path, CheckpointError):
        return None
    index = read_json(path, CheckpointError)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"cannot read {INDEX}", "it has no weight_map", _NO_INDEX)
    for name in weight_map.values():
        check_file_name(name)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    result = _Index(weight_map, total if isinstance(total, (int, float)) else None)
    if len(result.files) > MAX_SHARDS:
        raise CheckpointError(f"cannot read {INDEX}", f"it names more than {MAX_SHARDS} files", _NO_INDEX)
    return result


def _is_left_over(directory: Path, index: _Index) -> bool:
    """Whether an index was left behind by files that were replaced by a single one, as merging tools do."""
    listing = _listing(directory)
    left = WHOLE in listing and not any(name in listing for name in index.files)
    if left:
        logger.warning("%s of %s names files of which none is there: %s serves", INDEX, directory, WHOLE)
    return left


def check_file_name(name: object) -> None:
    """Raise CheckpointError unless ``name``, from an index, is the plain name of a safetensors file."""
    asked = f"{INDEX} names the file {str(name)[:120]!r}"
    if not isinstance(name, str) or not name or len(name) > 255 or not name.isprintable():
        raise CheckpointError(asked, "that is not a file name", _NO_INDEX)
    if "/" in name or "\\" in name or ":" in name or name.startswith("."):
        raise CheckpointError(
            asked,
            "only plain names of files in the model's own directory are accepted",
            "Do not use this checkpoint unless you trust where it came from; put its files beside the index.",
        )
    if "?" in name:
        raise CheckpointError(
            asked,
            "the end of a download address was kept in the name",
            f"Rename the file to {name.split('?')[0]!r}, and correct the index.",
        )
    if name.endswith(_PICKLES):
        raise _pickled([name])
    if not name.endswith(".safetensors"):
        raise CheckpointError(asked, "it does not end in .safetensors", _NO_INDEX)


def _listing(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError as error:
        file = isinstance(error, NotADirectoryError)
        raise CheckpointError(
            f"cannot read the model directory {directory}",
            "it is a file" if file else str(error.strerror),
            f"Give the directory that holds it, {directory.parent}." if file else "Check the path.",
        ) from error


def _files_without_index(directory: Path) -> list[str]:
    """The files of a checkpoint that came without an index: one file, or a complete numbered set."""
    listing = _listing(directory)
    files = [name for name in listing if name.endswith(".safetensors")]
    if WHOLE in files:
        return [WHOLE]
    sets: dict[tuple[str, str], list[str]] = {}
    for name in files:
        if (match := _NUMBERED.fullmatch(name)) and int(match[3]):
            sets.setdefault((match[1], match[3]), []).append(name)
    if len(sets) == 1:
        stem, count = next(iter(sets))
        wanted = [f"{stem}-{i:05d}-of-{count}.safetensors" for i in range(1, min(int(count), MAX_SHARDS) + 1)]
        return wanted
    adapter = "adapter_model.safetensors"
    single = [name for name in files if name != adapter]
    if len(single) == 1 and not sets:
        return single
    raise _no_checkpoint(directory, listing, files)


def _no_checkpoint(directory: Path, listing: list[str], files: list[str]) -> CheckpointError:
    asked = f"no checkpoint in {directory}"
    if files and "adapter_config.json" in listing:
        return CheckpointError(
            asked,
            "it holds a LoRA adapter, not a model",
            "Load its base model and give the adapter beside it (--adapter), or merge it (qwenrt merge).",
        )
    if files:
        return CheckpointError(
            asked,
            f"{len(files)} safetensors files and no {INDEX} to say which belong together: {_some(files)}",
            "Keep one model in the directory, or add its index.",
        )
    with_query = [name for name in listing if ".safetensors?" in name]
    if with_query:
        return CheckpointError(
            asked,
            f"the end of a download address was kept in the name of {_some(with_query)}",
            f"Rename each to what comes before the question mark, as {with_query[0].split('?')[0]!r}.",
        )
    pickles = [name for name in listing if name.endswith(_PICKLES)]
    if pickles:
        return _pickled(pickles)
    return CheckpointError(
        asked,
        f"none of its {len(listing)} files is a safetensors file",
        "Give the directory that holds config.json and *.safetensors, or a model's name.",
    )


def _pickled(names: list[str]) -> CheckpointError:
    return CheckpointError(
        "these weights are pickled files, which are refused",
        f"found {_some(names)}; unpickling can run any code its author put in",
        "Use a revision with *.safetensors. If you trust the files, convert them on another machine: load with "
        "transformers, then save_pretrained(directory, safe_serialization=True).",
    )


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(n if n.isprintable() and len(n) <= 255 else repr(n[:80]) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def check_link(directory: Path, name: str) -> None:
    """A shard may be a link only within the directory, or into the store of a download client's cache."""
    path = directory / name
    if not os.path.islink(path):
        return
    opened(path, CheckpointError, asked=f"cannot read {name}").close()
    target, home = path.resolve(), directory.resolve()
    allowed = [home]
    store = _STORES.get(home.parent.name)
    if store is not None:
        allowed.append(home.parent.parent / store)
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{name} is a link that leads out of the model directory",
            f"it points to {target}",
            "Copy the file into the directory, or give the directory where the files really are.",
        )


def _check_present(directory: Path, wanted: list[str]) -> None:
    """Raise for absent files, naming all of them, and what stands in their place if that is known."""
    listing = _listing(directory)
    missing = [name for name in wanted if name not in listing]
    if not missing:
        return
    found = f"{len(missing)} of {len(wanted)} files are missing: {_some(missing)}"
    remedy = "Download them: `qwenrt pull` fetches only what is missing."
    likely = [name for name in listing if name.startswith(tuple(missing))]
    if likely:
        found += f"; there is {_some(likely)}"
        remedy = "If that download is complete, rename it to the name that is missing; if not, `qwenrt pull` goes on."
    raise CheckpointError(f"the checkpoint in {directory} is incomplete", found, remedy)


def _check_extra(directory: Path, wanted: list[str]) -> None:
    """Shards that the index does not name belong to another version of the model."""
    extra = [
        name
        for name in _listing(directory)
        if name not in wanted and (_NUMBERED.fullmatch(name) or name == WHOLE)
    ]
    if extra:
        raise CheckpointError(
            f"the checkpoint in {directory} holds files of another version",
            f"{INDEX} names {len(wanted)} files, and {_some(extra)} is there as well",
            "Delete the files that do not belong to this version, or move them elsewhere.",
        )


def _compare_index(checkpoint: Checkpoint, index: _Index) -> None:
    """Warn where the index tells of the tensors other than the files do. Only the names of the files are taken from
    it: each tensor is found by the header that holds it, and what a model lacks is missed when they are compared."""
    where = {name: entry.shard.name for name, entry in checkpoint.tensors.items()}
    absent = [name for name in index.weight_map if name not in where]
    moved = [name for name, file in index.weight_map.items() if where.get(name, file) != file]
    unlisted = [name for name in where if name not in index.weight_map]
    found = [
        f"{len(names)} tensors {what}: {_some(names)}"
        for what, names in (
            ("that it names are in no file", absent),
            ("are in another file than it says", moved),
            ("are not in it", unlisted),
        )
        if names
    ]
    total = index.total_size
    if total is not None and total != checkpoint.nbytes:
        said = f"{total:.0f}" if isinstance(total, float) else str(total)[:80]
        found.append(f"its total_size is {said}, and they hold {checkpoint.nbytes} bytes")
    if found:
        logger.warning(
            "%s and the files in %s disagree (%s): the files count",
            INDEX,
            checkpoint.directory,
            "; ".join(found),
        )
