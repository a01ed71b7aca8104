"""A complete dense checkpoint: the base with adapters merged into it, one weight in memory at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenrt.config import ModelConfig, read_json, read_model_config
from qwenrt.errors import ConfigError, RequestError, shown
from qwenrt.loader.adapters import BaseWeights, open_adapter
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.directory import Planned, copy_files, write_json, write_shards
from qwenrt.loader.checkpoint.writing import check_room, claim_directory
from qwenrt.loader.progress import ByteBar
from qwenrt.merging.changes import Changes
from qwenrt.merging.plan import MergePlan

AdapterPath = str | Path | tuple[str | Path, float]
_DTYPES = ("float32", "bfloat16", "float16")
_AGAIN = "merge again"
_PARTIAL = ".partial.safetensors"


@dataclass(frozen=True)
class MergeReport:
    """A merged checkpoint in ``output_dir``. ``adapters``: each with its weight. ``changed``: how many weights are
    other than the base's; ``loss``: the part of the change that is lost where it is rounded to the stored dtype, over
    all of them, and of ``worst``, the weight where it is largest. ``was_quantised``: the format that the base had, None
    for a dense one. ``untied``: the head became a matrix of its own. Sizes in bytes."""

    output_dir: Path
    adapters: tuple[tuple[Path, float], ...]
    changed: int
    loss: float
    worst: tuple[str, float] | None
    dtype: str
    was_quantised: str | None
    untied: bool
    nbytes: int
    seconds: float

    def format(self) -> str:
        """The result in a few lines of text."""
        given = ", ".join(
            f"{path}" + ("" if share == 1 else f" x {share:g}") for path, share in self.adapters
        )
        lines = [f"{given} merged into {self.changed} weights in {self.seconds:.1f} s "
                 f"({self.nbytes / 1e6:.1f} MB, {self.dtype}): {self.output_dir}"]  # fmt: skip
        if self.worst is not None and self.loss:
            lines.append(
                f"rounding to the stored dtype changes the adapter's part by {100 * self.loss:.2g} %, "
                f"at most {100 * self.worst[1]:.2g} % ({self.worst[0]})"
            )
        if self.was_quantised:
            lines.append(f"the base was quantised ({self.was_quantised}); the result is dense")
        if self.untied:
            lines.append("head and embedding are two matrices now (tie_word_embeddings is false)")
        return "\n".join(lines)


def base_of(directory: Path) -> BaseWeights:
    """The weights in a model's directory."""
    checkpoint = open_checkpoint(directory)
    return BaseWeights(checkpoint, as_stored(read_model_config(directory), checkpoint))


def check_target(source: Path, target: Path) -> None:
    """RequestError where the result would replace what it is made of."""
    if target.resolve() == source.resolve():
        raise RequestError(f"merging into {target}", "it is the model's own directory", "Give another one.")


def merge_dense(
    source: Path,
    adapters: AdapterPath | Sequence[AdapterPath],
    target: Path,
    *,
    dtype: str = "auto",
    strict: bool = False,
    moe_layout: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> MergeReport:
    """See qwenrt.merge."""
    began = time.monotonic()
    if dtype not in ("auto", *_DTYPES):
        raise RequestError("merging", f"dtype={shown(dtype)}", f"Give one of auto, {', '.join(_DTYPES)}.")
    asked = asked_for(adapters)
    check_target(source, target)
    base = base_of(source)
    quant = base.config.quant
    _check_base(source, base.config)
    opened = [
        (open_adapter(path, base.config, base=base, strict=strict, moe_layout=moe_layout), share)
        for path, share in asked
    ]
    claim_directory(target, overwrite, lambda names: all(name.endswith(_PARTIAL) for name in names))
    changes = Changes(opened, base.config)
    own = base.config.dtype if base.config.dtype in _DTYPES else "bfloat16"
    stored = str(own) if dtype == "auto" else dtype
    plan = MergePlan(
        base, changes, None if dtype == "auto" else getattr(torch, dtype), getattr(torch, stored)
    )
    tensors = list(plan.tensors())
    total = sum(each.nbytes for each in tensors)
    check_room(target, total)
    with ByteBar("merging", total, progress) as bar, torch.no_grad(), _leaving_nothing(target):
        write_shards([_counted(each, bar) for each in tensors], target, _AGAIN)
    is_new = dtype != "auto" or quant is not None
    _write_config(source, target, base.config, stored if is_new else None, plan.unties)
    copy_files(source, target, ("config.json", *(("quantize_config.json",) if quant else ())))
    return MergeReport(
        target, tuple(asked), len(changes.loss.by_name), changes.loss.overall, changes.loss.worst, stored,
        None if quant is None else quant.name, plan.unties, total, time.monotonic() - began,
    )  # fmt: skip


def asked_for(adapters: AdapterPath | Sequence[AdapterPath]) -> list[tuple[Path, float]]:
    given = [adapters] if isinstance(adapters, (str, Path)) or _is_pair(adapters) else list(adapters)  # type: ignore[arg-type]
    if not given:
        raise RequestError("merging", "no adapter is given", "Give a directory, or a list of them.")
    found = []
    for each in given:
        path, share = each if _is_pair(each) else (each, 1.0)  # type: ignore[misc]
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not -100 <= share <= 100:
            found_ = f"its weight is {shown(share)}"
            raise RequestError(f"merging {path}", found_, "Give a number; 1 adds all of it, 0.5 half.")
        found.append((Path(path), float(share)))  # type: ignore[arg-type]
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and not isinstance(value[1], (str, Path, tuple))


def _check_base(source: Path, config: ModelConfig) -> None:
    if config.quant is not None and config.quant.method == "gguf":
        found = "it is a GGUF file"
        remedy = "Give the checkpoint in safetensors that it was made of, or serve the adapter beside it (--adapter)."
        raise ConfigError(f"merging into {source}", found, remedy)


def _counted(tensor: Planned, bar: ByteBar) -> Planned:
    def done() -> None:
        tensor.done()
        bar.add(tensor.nbytes)

    return Planned(tensor.name, tensor.dtype, tensor.shape, tensor.make, done)


@contextlib.contextmanager
def _leaving_nothing(target: Path) -> Any:
    """Where it fails or is stopped, half a checkpoint is not left behind."""
    try:
        yield
    except BaseException:
        for path in target.glob(f"*{_PARTIAL}"):
            path.unlink()
        raise


def _write_config(source: Path, target: Path, config: ModelConfig, dtype: str | None, untied: bool) -> None:
    """config.json with what is other in the result."""
    content = read_json(source / "config.json")
    for part in (content, content.get("text_config")):
        if not isinstance(part, dict):
            continue
        if config.quant is not None:
            part.pop("quantization_config", None)
        if dtype is not None:
            for name in {"dtype", "torch_dtype"} & part.keys() or (
                {"torch_dtype"} if part is content else set()
            ):
                part[name] = dtype
        if untied and (part is not content or "text_config" not in content or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(target / "config.json", content)
