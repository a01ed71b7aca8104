"""peft's LoRA adapters: a directory's files -> what the model's own weights become."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from qwenrt.config import ModelConfig
from qwenrt.config.adapter import FILE, AdapterConfig, read_adapter_config
from qwenrt.errors import CheckpointError, RequestError, shown
from qwenrt.files import is_there
from qwenrt.loader.adapters.names import PICKLED, WEIGHTS
from qwenrt.loader.adapters.placing import IN_OUT, LAYOUTS, Placing, Target
from qwenrt.loader.checkpoint.checkpoint import Checkpoint, TensorReader, check_link
from qwenrt.loader.checkpoint.digest import add_shard
from qwenrt.loader.checkpoint.header import read_metadata, read_shard
from qwenrt.loader.weights import all_finite
from qwenrt.ops.types import AdapterWeights, LoraPair, TokenRows

BASE_DIGEST = "qwenrt.base"  # in the file's metadata: what digest_of says of the base
_CONVERT = (
    'If you trust it, convert it where it lies: python -c "import torch, safetensors.torch as s; s.save_file({k: '
    f"v.clone() for k, v in torch.load('{PICKLED}', map_location='cpu', weights_only=True).items()}}, '{WEIGHTS}')\""
)
logger = logging.getLogger("qwenrt")


class Base(Protocol):
    """What is asked of the model beneath: float32 weights by the model's own names, and its digest."""

    @property
    def digest(self) -> str: ...

    def weight(self, param: str) -> torch.Tensor: ...

    def bias(self, param: str) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is. ``rank``: the largest of its pairs; ``targets``: last words of the modules' names;
    ``whole``: modules of which it brings all or some rows. ``nbytes``: as float32 in memory; ``digest``: of its file;
    ``base``: what its config says it was trained on."""

    path: Path
    rank: int
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    nbytes: int
    digest: str
    base: str | None
    config: AdapterConfig


@dataclass
class Adapter:
    """All that a directory holds. ``weights``: what can be served beside the model; ``replaced``: other weights by the
    model's own names, of a linear's part from row ``first`` on: (param, first) -> the whole tensor. Pairs for what
    chooses experts are in ``gates``."""

    info: AdapterInfo
    weights: AdapterWeights
    gates: dict[str, tuple[LoraPair, ...]] = field(default_factory=dict)
    replaced: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)


def read_adapter(
    directory: str | Path,
    config: ModelConfig,
    *,
    base: Base | None = None,
    device: torch.device | str = "cpu",
    strict: bool = False,
    moe_layout: str | None = None,
) -> tuple[AdapterWeights, AdapterInfo]:
    """The adapter in ``directory``, to be served beside a model of ``config``: float32 on ``device``.

    ``base``: the model's weights, of which DoRA needs the norms and new biases the old ones. ``strict``: an adapter
    that lacks what its config lists is refused, where else it is a warning. ``moe_layout``: see LAYOUTS. Raises
    ConfigError for its config, CheckpointError for its files, RequestError where it changes what can only be merged.
    """
    adapter = open_adapter(directory, config, base=base, device=device, strict=strict, moe_layout=moe_layout)
    routers = _routers(adapter, base)
    rest = [
        param for param in (*adapter.gates, *(name for name, _ in adapter.replaced)) if param not in routers
    ]
    if rest:
        raise RequestError(
            f"serving the adapter in {directory}",
            f"it changes {len(rest)} weights that are the same for all requests: {', '.join(rest[:4])}",
            "Merge it: qwenrt merge MODEL ADAPTER -o OUT.",
        )
    weights = replace(adapter.weights, routers=routers)
    return weights, replace(adapter.info, nbytes=sum(tensor.nbytes for tensor in weights.tensors))


def _routers(adapter: Adapter, base: Base | None) -> dict[str, torch.Tensor]:
    """What chooses experts as the adapter has it: whole, or of the ``base``'s and a pair for it."""
    found = {param: tensor for (param, _), tensor in adapter.replaced.items() if param.endswith(".router")}
    if base is None:
        return found
    for param, pairs in adapter.gates.items():
        if param.endswith(".router") and param not in found and all(p.bias is None for p in pairs):
            (pair,) = pairs
            own = base.weight(param).to(pair.a.device) + pair.scale * (pair.b @ pair.a)
            found[param] = own if pair.row_scale is None else pair.row_scale.unsqueeze(1) * own
    return found


def open_adapter(
    directory: str | Path,
    config: ModelConfig,
    *,
    base: Base | None = None,
    device: torch.device | str = "cpu",
    strict: bool = False,
    moe_layout: str | None = None,
) -> Adapter:
    """As read_adapter, with what cannot be served."""
    path = Path(directory)
    if moe_layout not in (None, *LAYOUTS):
        found = f"moe_layout={shown(moe_layout)}"
        raise RequestError(f"reading the adapter in {path}", found, f"Give one of {', '.join(LAYOUTS)}.")
    said = read_adapter_config(_file(path, FILE))
    shard = read_shard(_file(path, WEIGHTS))
    entries = {entry.name: entry for entry in shard.tensors}
    placing = Placing(said, config, entries, moe_layout)
    placing.raise_problems(str(path))
    _check_complete(path, placing, strict)
    known = read_metadata(shard.path).get(BASE_DIGEST)
    if base is not None and known is not None and known != base.digest:
        logger.warning("%s was trained on other weights than these (its base was %s)", path, said.base)
    reader = TensorReader(Checkpoint(path, (shard,), entries))
    building = _Builder(placing, reader, base, torch.device(device))
    adapter = building.built()
    digest = hashlib.sha256()
    add_shard(digest, shard)
    tensors = [*adapter.tensors, *building.replaced.values()]
    tensors += [tensor for pairs in building.gates.values() for pair in pairs for tensor in pair.tensors]
    whole = {t.module for t in placing.targets if t.kinds.keys() & {"whole", "token_rows"}}
    targets = {
        t.module.rpartition(".")[2] for t in placing.targets if t.kinds.keys() & {"a", "embedding_a", "bias"}
    }
    info = AdapterInfo(
        path, building.rank, tuple(sorted(targets)), tuple(sorted(whole)), sum(t.nbytes for t in tensors),
        digest.hexdigest(), said.base, said,
    )  # fmt: skip
    if not targets and not whole:
        logger.warning("the adapter in %s changes nothing: it has no tensors", path)
    elif not building.changes:
        logger.warning("the adapter in %s changes nothing: B is zero in all of its pairs", path)
    return Adapter(info, adapter, building.gates, building.replaced)


def _file(directory: Path, name: str) -> Path:
    """One of the adapter's two files. Raises CheckpointError that says what lies there in its place."""
    asked = f"reading the adapter in {directory}"
    if not directory.is_dir():
        found = "it is a file" if is_there(directory, CheckpointError) else "there is no such directory"
        raise CheckpointError(asked, found, f"Give the directory that holds {FILE} and {WEIGHTS}.")
    path = directory / name
    if is_there(path, CheckpointError):
        check_link(directory, name)
        return path
    if name == WEIGHTS and is_there(directory / PICKLED, CheckpointError):
        raise CheckpointError(
            asked, f"{PICKLED} is a pickle, which can run any code its author put in", _CONVERT
        )
    if name == FILE and is_there(directory / "config.json", CheckpointError):
        raise CheckpointError(
            asked, f"it holds a model, not an adapter: there is no {FILE}", "Load it as a model."
        )
    raise CheckpointError(asked, f"there is no {name}", f"An adapter has {FILE} and {WEIGHTS}: copy both.")


def _check_complete(path: Path, placing: Placing, strict: bool) -> None:
    missing = placing.missing()
    if not missing:
        return
    found = f"{FILE} lists {len(missing)} modules for which there are no tensors: {', '.join(missing[:6])}"
    if strict:
        remedy = (
            "Take an earlier step of the training (checkpoint-*), which may have them; or leave strict out."
        )
        raise CheckpointError(f"the adapter in {path} is incomplete", found, remedy)
    logger.warning(
        "the adapter in %s is incomplete: %s. They were trained and not saved, as finetune.py of Qwen-1 does at the "
        "end; the base's own serve in their place, so answers may be worse than in training. An earlier step of it "
        "(checkpoint-*) may have them",
        path,
        found,
    )


class _Builder:
    """An adapter's tensors, read once, as float32 on the device."""

    def __init__(
        self, placing: Placing, reader: TensorReader, base: Base | None, device: torch.device
    ) -> None:
        self.placing, self.config, self.adapter = placing, placing.config, placing.adapter
        self.reader, self.base, self.device = reader, base, device
        self.rank, self.changes = 0, False
        self.gates: dict[str, tuple[LoraPair, ...]] = {}
        self.replaced: dict[tuple[str, int], torch.Tensor] = {}
        self._pairs: dict[str, list[LoraPair]] = {}
        self._rows: dict[str, TokenRows] = {}

    def built(self) -> AdapterWeights:
        embed_pair: LoraPair | None = None
        for target in self.placing.targets:
            if target.param == "embed_tokens":
                embed_pair = self._embedding(target)
            elif target.experts:
                self._experts(target)
            elif target.spec is not None:
                self._linear(target)
            else:
                self.replaced[target.param, 0] = self._read(target, "whole")
                self.changes = True
        for param, pairs in self._pairs.items():
            pairs.sort(key=lambda pair: pair.first)
            if any(one.rows.stop > other.first for one, other in pairwise(pairs)):
                found = "there are tensors for it alone and for all experts"
                raise CheckpointError(f"the adapter's {param}", found, "Keep one of them.")
        made = {param: tuple(pairs) for param, pairs in self._pairs.items()}
        self.gates = {param: pairs for param, pairs in made.items() if _is_gate(param)}
        linears = {param: pairs for param, pairs in made.items() if param not in self.gates}
        return AdapterWeights(linears, self._rows.get("embed_tokens"), self._rows.get("lm_head"), embed_pair)

    def _read(self, target: Target, kind: str) -> torch.Tensor:
        """A tensor in float32, its rows in the model's order. Raises CheckpointError for values that are not finite."""
        name = target.kinds[kind]
        stored = self.reader.tensor(name)
        if self.device.type == "cpu" and stored.dtype in (torch.float32, torch.float16):
            tensor, finite = _copied_alone(stored, kind)
        else:
            tensor = stored.to(self.device, torch.float32, copy=True)
            finite = all_finite(tensor)
        if not finite:
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"the adapter's tensor {name}",
                f"{bad} of its {tensor.numel()} values are NaN or infinite",
                "Its training failed there: use an earlier step of it.",
            )
        by_row = target.order is not None and kind in ("b", "b_bias", "magnitude", "bias", "whole")
        return tensor[target.order] if by_row else tensor

    def _has(self, target: Target, kind: str) -> bool:
        return kind in target.kinds

    def _of_base(self, target: Target, why: str) -> Base:
        if self.base is None:
            found = f"it has {why} for {target.module}, which are computed from the model's own weights"
            raise CheckpointError("reading an adapter alone", found, "Read it beside its model (base=).")
        return self.base

    # ---- linears

    def _linear(self, target: Target) -> None:
        rows = slice(target.first, target.first + target.rows)
        head = target.param == "lm_head"
        if head:
            self._whole_rows(target)
        elif self._has(target, "whole"):
            self.replaced[target.param, target.first] = self._read(target, "whole")
            self.changes = True
        bias = self._bias(target, rows)
        if not self._has(target, "a"):
            if bias is not None:
                a, b = torch.zeros(0, target.columns), torch.zeros(target.rows, 0)
                self._add(
                    target.param,
                    LoraPair(a.to(self.device), b.to(self.device), 1.0, target.first, None, bias),
                )
            return
        a, b = self._read(target, "a"), self._read(target, "b")
        b = _with_rows(b, target.rows) if head else b
        scale = self._scale(target.module, len(a))
        if self._has(target, "b_bias"):
            own = scale * self._read(target, "b_bias")
            bias = own if bias is None else bias + own
        row_scale = None
        if self._has(target, "magnitude"):
            weight = self._of_base(target, "DoRA's magnitudes").weight(target.param)[rows].to(self.device)
            norms = torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)
            row_scale = self._read(target, "magnitude") / norms
            self.changes = True
        self._add(target.param, LoraPair(a, b, scale, target.first, row_scale, bias))

    def _bias(self, target: Target, rows: slice) -> torch.Tensor | None:
        """What is added to a linear's bias, of which the file has the new one."""
        if not self._has(target, "bias"):
            return None
        old = self._of_base(target, "new biases").bias(target.param)
        new = self._read(target, "bias")
        return new if old is None else new - old[rows].to(self.device)

    def _scale(self, module: str, rank: int) -> float:
        self.rank = max(self.rank, rank)
        return self.adapter.scale_of(module, rank)

    def _add(self, param: str, pair: LoraPair) -> None:
        self._pairs.setdefault(param, []).append(pair)
        self.changes = self.changes or bool(pair.b.any()) or pair.bias is not None

    def _experts(self, target: Target) -> None:
        """A pair for each expert, from tensors of all: A's rows are expert by expert, B's columns rank by rank."""
        a, b = self._read(target, "a"), self._read(target, "b")
        number = len(target.experts)
        rank = len(a) // number
        scale = self._scale(target.module, rank)
        each_a, each_b = a.view(number, rank, -1), b.view(len(b), rank, number)
        for e, param in enumerate(target.experts):
            own_a, own_b = each_a[e], each_b[:, :, e].contiguous()
            if target.layout == IN_OUT:
                own_a, own_b = own_b.t().contiguous(), own_a.t().contiguous()
            self._add(param, LoraPair(own_a, own_b, scale))

    # ---- embedding and head

    def _embedding(self, target: Target) -> LoraPair | None:
        self._whole_rows(target)
        if not self._has(target, "embedding_a"):
            return None
        if self._has(target, "magnitude"):
            found = f"DoRA on {target.module}"
            raise CheckpointError(
                "reading an adapter", found, "Merge it with the version of peft that trained it."
            )
        a, b = self._read(target, "embedding_a"), self._read(target, "embedding_b")
        a = _with_rows(a.t(), target.rows).t().contiguous()
        pair = LoraPair(a, b, self._scale(target.module, len(a)))
        self.changes = self.changes or bool(b.any())
        own_head = any(t.param == "lm_head" and "a" in t.kinds for t in self.placing.targets)
        if self.config.tie_word_embeddings and self.adapter.tie and not own_head:
            self._add("lm_head", LoraPair(b.t().contiguous(), a.t().contiguous(), pair.scale))
        return pair

    def _whole_rows(self, target: Target) -> None:
        """New rows of the embedding or the head, all or some."""
        tied = self.config.tie_word_embeddings and target.param == "embed_tokens"
        for kind in ("base", "whole", "token_rows"):
            if not self._has(target, kind):
                continue
            rows = self._read(target, kind)
            if kind == "base" and self.base is not None and self._is_base(target, rows):
                continue
            made = self._some_rows(target, rows) if kind == "token_rows" else self._all_rows(target, rows)
            self.changes = True
            kept = any(f".{target.module}".endswith(f".{name}") for name in self.adapter.kept_modules)
            also_head = tied and (kind != "whole" or self.adapter.tie or not kept)
            for param in (target.param, *(("lm_head",) if also_head else ())):
                self._rows[param] = made

    def _is_base(self, target: Target, rows: torch.Tensor) -> bool:
        assert self.base is not None
        own = self.base.weight(target.param)
        count = min(len(own), len(rows))
        return torch.equal(own[:count], rows[:count].cpu())

    def _some_rows(self, target: Target, rows: torch.Tensor) -> TokenRows:
        ids = torch.tensor(self.placing.token_ids(target.module), dtype=torch.int64)
        if len(ids) and int(ids.max()) >= target.rows:
            found = f"it has a row for token {int(ids.max())}, and the model {target.rows} tokens"
            raise CheckpointError(f"the adapter's {target.module}", found, "It belongs to another model.")
        order = ids.argsort()
        return TokenRows(rows[order.to(self.device)], ids[order].to(self.device))

    def _all_rows(self, target: Target, rows: torch.Tensor) -> TokenRows:
        """All rows, or those that a vocabulary of another padding has."""
        if len(rows) == target.rows:
            return TokenRows(rows)
        logger.warning(
            "the adapter's %s has %d rows and the model's %d: rows beyond the shorter one, which pad the vocabulary, "
            "are the model's own", target.module, len(rows), target.rows,
        )  # fmt: skip
        count = min(len(rows), target.rows)
        return TokenRows(
            rows[:count], None if count == target.rows else torch.arange(count, device=self.device)
        )


def _copied_alone(stored: torch.Tensor, kind: str) -> tuple[torch.Tensor, bool]:
    """A copy in float32, and whether all of it is finite. By numpy, with the calling thread alone: torch would divide
    each matrix among threads that wait for cores beside those that serve requests meanwhile. B's columns are
    contiguous, as kernels read them."""
    values = stored.numpy()
    made = np.array(values.T if kind == "b" else values, np.float32, order="C")
    finite = not made.size or bool(np.isfinite(made.min()) and np.isfinite(made.max()))
    return torch.from_numpy(made.T if kind == "b" else made), finite


def _is_gate(param: str) -> bool:
    return param.endswith((".router", ".shared_expert_gate"))


def _with_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The first ``rows`` rows, zeros behind those that there are: a vocabulary of another padding."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, max(0, rows - len(tensor))))[:rows]
