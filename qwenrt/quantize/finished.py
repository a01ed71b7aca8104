"""The layers that are done, kept so that a run that was cut goes on where it was."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qwenrt.config import ModelConfig, QuantConfig, read_json
from qwenrt.config.layers import LinearSpec, file_rows
from qwenrt.errors import CheckpointError
from qwenrt.files import is_there
from qwenrt.loader.checkpoint.directory import write_json
from qwenrt.loader.checkpoint.formats import Awq, Gptq, ReadOptions, StoredLinear
from qwenrt.loader.checkpoint.header import read_metadata
from qwenrt.loader.checkpoint.inventory import Inventory, parts_of
from qwenrt.loader.checkpoint.writing import save_atomically
from qwenrt.loader.weights import WeightReader
from qwenrt.ops.awq import pack_awq
from qwenrt.ops.gptq import pack_gptq
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import merge, take_rows
from qwenrt.quantize.report import LinearReport
from qwenrt.quantize.settings import QuantizeSettings

PARTS = ".quantizing"
TEXTS = "texts.json"
AGAIN = "give the same call again, which goes on"


@dataclass(frozen=True)
class FinishedLayer:
    """What a layer has become: each linear's codes, and the tensors of the file that changed with them, by their names
    in it."""

    made: Mapping[str, CanonicalWeight]
    reports: Sequence[LinearReport]
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)


class FinishedLayers:
    """A file for each layer, its tensors as in the finished checkpoint."""

    def __init__(
        self, directory: Path, settings: QuantizeSettings, config: ModelConfig, inventory: Inventory
    ) -> None:
        self.directory, self._config, self._inventory = directory, config, inventory
        self._format: Gptq | Awq = Awq(settings.group_size)
        if settings.method != "awq":
            quant = QuantConfig(
                settings.bits,
                settings.group_size,
                settings.act_order == "full",
                bool(settings.sym),
                zero_offset=1,
            )
            self._format = Gptq(quant)

    def path(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.safetensors"

    def write(self, index: int, layer: FinishedLayer, specs: Sequence[LinearSpec]) -> None:
        tensors = dict(layer.changed)
        for spec in specs:
            for module, weight in self._modules(spec, layer.made[spec.name]):
                packed = (pack_awq if isinstance(self._format, Awq) else pack_gptq)(weight)
                packed.pop("bias", None)  # it stays the source's own
                tensors |= {f"{module}.{kind}": tensor.contiguous() for kind, tensor in packed.items()}
        told = {
            "report": json.dumps([dataclasses.asdict(report) for report in layer.reports]),
            "changed": json.dumps(sorted(layer.changed)),
        }
        save_atomically(tensors, self.path(index), told, AGAIN)

    def read(self, index: int, specs: Sequence[LinearSpec]) -> FinishedLayer | None:
        """What `write` kept, or None where that layer is not done."""
        path = self.path(index)
        if not is_there(path, CheckpointError):
            return None
        try:
            tensors = load_file(path)
            told = {name: json.loads(text) for name, text in read_metadata(path).items()}
            reports = [LinearReport(**fields) for fields in told["report"]]
            made = {spec.name: self._whole(spec, tensors) for spec in specs}
            return FinishedLayer(made, reports, {name: tensors[name] for name in told["changed"]})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"going on from {path}",
                f"not readable ({str(error)[:80]})",
                "Delete it: that layer is done again.",
            ) from error

    def _modules(self, spec: LinearSpec, weight: CanonicalWeight) -> Iterator[tuple[str, CanonicalWeight]]:
        """(module in the file, its own rows) of a linear."""
        row = 0
        for module, rows, order in self.modules(spec):
            taken = range(rows) if order is None else torch.tensor(order).argsort().tolist()
            yield module, take_rows(weight, [row + i for i in taken])
            row += rows

    def modules(self, spec: LinearSpec) -> Iterator[tuple[str, int, list[int] | None]]:
        """(module in the file, its rows, the order in which they are taken from there) of a linear. Experts that the
        source has stacked become modules of their own, gate and up beside each other, as other programs want them."""
        slots = self._inventory.slots[spec.name]
        for part, rows in parts_of(spec, slots):
            module = slots[part, "weight"].removesuffix(".weight")
            if not part and module.endswith("gate_up_proj"):
                for own, own_rows in spec.parts:
                    yield f"{module.removesuffix('gate_up_proj')}{own}_proj", own_rows, None
            else:
                yield module, rows, file_rows(self._config, spec.name, part)

    def _whole(self, spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> CanonicalWeight:
        """The linear whose modules `_modules` wrote."""
        made = []
        options = ReadOptions(keep_words=False, fp8_dtype=None)
        for module, rows, order in self.modules(spec):
            linear = StoredLinear(module, rows, spec.in_features, {})
            weight = self._format.read(linear, lambda kind, m=module: tensors[f"{m}.{kind}"], None, options)  # type: ignore[misc]
            made.append(weight if order is None else take_rows(weight, order))
        merged = merge(made)
        if merged is None:
            raise CheckpointError(
                f"going on with {spec.name}",
                "its parts have different orders of inputs",
                "Delete its layer's file.",
            )
        return merged


@contextmanager
def claimed(directory: Path) -> Iterator[Path]:
    """The directory for finished layers, held against other processes."""
    parts = directory / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"quantising into {directory}",
                "another process does so now",
                "Wait for it, or give another directory.",
            ) from error
        yield parts


def fingerprint(reader: WeightReader, settings: QuantizeSettings) -> dict[str, str]:
    """What decides the result besides the texts, by name: a run that was cut goes on only where all is the same."""
    tensors = hashlib.sha256()
    for names in reader.inventory.slots.values():
        for name in names.values():
            tensor = reader.reader.tensor(name)
            tensors.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            tensors.update(sample(tensor).numpy().tobytes())
    return {
        "settings": json.dumps(dataclasses.asdict(settings), sort_keys=True),
        "model": tensors.hexdigest(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def fingerprint_of_texts(texts: Sequence[Sequence[int]]) -> dict[str, str]:
    """The rest of what decides it."""
    return {"calibration texts": hashlib.sha256(repr([list(text) for text in texts]).encode()).hexdigest()}


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """16 of a tensor's elements, from its first to its last, float32."""
    flat = tensor.reshape(-1)
    places = torch.arange(16) * (len(flat) - 1) // 15  # float32's linspace misses by whole places past 2**24
    return flat[places].float()


def check_fingerprint(parts: Path, now: dict[str, str]) -> None:
    """Note some of what decides the result. CheckpointError where layers of another run lie here."""
    path = parts / "run.json"
    before = read_json(path, CheckpointError) if is_there(path, CheckpointError) else {}
    other = [name for name, value in now.items() if before.get(name, value) != value]
    if other:
        raise CheckpointError(
            f"going on with the layers in {parts}",
            f"they belong to a run with other {', '.join(other)}",
            "Use the same, another output directory, or resume=False (--no-resume).",
        )
    write_json(path, {**before, **now}, AGAIN)


def begin_anew(parts: Path) -> None:
    """Delete what another run has left."""
    for file in (*parts.glob("layer-*"), parts / TEXTS, parts / "run.json"):
        file.unlink(missing_ok=True)
