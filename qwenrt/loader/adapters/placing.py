"""Which weight of the model each tensor of an adapter is for, told from headers alone: all are placed, or one error
lists what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qwenrt.config import ModelConfig
from qwenrt.config.adapter import AdapterConfig
from qwenrt.config.layers import LinearSpec, file_rows, head_linear, layer_linears, layer_tensors
from qwenrt.errors import CheckpointError
from qwenrt.loader.adapters.names import Piece, piece_of
from qwenrt.loader.checkpoint.formats import FLOATS
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.loader.checkpoint.names import table_for

OUT_IN, IN_OUT = "out_in", "in_out"  # how a tensor of all experts' weights was seen by who trained its pair
LAYOUTS = (OUT_IN, IN_OUT)
_MAX_NAME = 500  # characters
_PADDING = 1024  # rows by which releases of one vocabulary differ, no more
_LINEAR = ("a", "b", "b_bias", "magnitude", "bias", "whole")
_HEAD = (*_LINEAR, "base", "token_rows")
_EMBEDDING = ("embedding_a", "embedding_b", "magnitude", "whole", "base", "token_rows")
_STACKED = ("mlp.experts", "mlp.experts.base_layer")


@dataclass
class Target:
    """One module that an adapter changes. ``param``: the model's weight; ``spec``: the linear that it is, or is a part
    of, from row ``first`` on; None for the embedding and for norms. ``order``: in which the file's rows are taken.
    ``rows``, ``columns``: of the module. ``kinds``: the adapter's tensors, by what they are for it. ``experts``: the
    names of all experts' linears where the tensors are for all of them, with the ``layout`` they have."""

    module: str
    param: str
    spec: LinearSpec | None
    first: int
    rows: int
    columns: int
    order: list[int] | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    layout: str = OUT_IN


class Placing:
    """The modules of one adapter. ``targets`` are in the order of the model's rows."""

    def __init__(
        self,
        adapter: AdapterConfig,
        config: ModelConfig,
        entries: Mapping[str, TensorEntry],
        layout: str | None = None,
    ) -> None:
        self.adapter, self.config, self.entries, self._layout = adapter, config, entries, layout
        self.table = table_for(config.model_type)
        self.linears = linears_of(config)
        self._tensors = tensors_of(config)
        self._pieces = {name: piece_of(name) if len(name) <= _MAX_NAME else None for name in entries}
        self._shapes = {
            piece: entries[name].shape for name, piece in self._pieces.items() if piece is not None
        }
        self._of_module: dict[str, Target | None] = {}
        self._found: dict[tuple[str, str | int], Target] = {}
        self._unknown: list[str] = []
        self._wrong: list[str] = []
        for name in entries:
            self._place(name)
        for target in self._found.values():
            self._check(target)

    @property
    def targets(self) -> list[Target]:
        order = {param: i for i, param in enumerate((*self._tensors, *self.linears))}
        return sorted(self._found.values(), key=lambda t: (order.get(t.param, 0), t.first))

    def raise_problems(self, where: str) -> None:
        """Raise one CheckpointError that lists what is wrong, if anything is."""
        found = [
            f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (
                (f"are for nothing in this model ({self.config.model_type})", self._unknown),
                ("do not fit", self._wrong),
            )
            if names
        ]
        if found:
            raise CheckpointError(
                f"of the {len(self.entries)} tensors of the adapter in {where}",
                "; ".join(found),
                "Load it beside the model that it was trained on. If that is this one, the program that wrote the "
                "file has names or a layout that are not known here.",
            )

    def _place(self, name: str) -> None:
        piece = self._pieces[name]
        target = None if piece is None else self._target_of(piece.module)
        if piece is None or target is None:
            self._unknown.append(name[:_MAX_NAME])
            return
        if piece.kind not in _kinds_of(target):
            self._unknown.append(name)
        elif piece.kind in target.kinds:
            self._wrong.append(f"{name} (the same as {target.kinds[piece.kind]})")
        elif self.entries[name].dtype not in FLOATS:
            self._wrong.append(f"{name} {self.entries[name].dtype}, expected {' or '.join(FLOATS[:3])}")
        else:
            target.kinds[piece.kind] = name

    def _target_of(self, module: str) -> Target | None:
        """The one target for a module, however its path is written."""
        if module not in self._of_module:
            target = self._target(module)
            if target is not None:
                key = (
                    "" if target.experts else target.param,
                    target.module if target.experts else target.first,
                )
                target = self._found.setdefault(key, target)
            self._of_module[module] = target
        return self._of_module[module]

    def _target(self, module: str) -> Target | None:
        """The module's place in the model, None where it has none."""
        if module.endswith(_STACKED):
            return self._stacked(module)
        slot = self.table.locate(f"{module}.weight")
        if slot is None or slot.ignored:
            return None
        spec = self.linears.get(slot.param)
        if spec is None:
            shape = self._tensors.get(slot.param)
            if shape is None:
                return None
            return Target(module, slot.param, None, 0, shape[0], shape[-1] if len(shape) > 1 else 1)
        first = 0
        for part, rows in spec.parts:
            if part == slot.part:
                return Target(module, slot.param, spec, first, rows, spec.in_features)
            first += rows
        if slot.part:
            return None
        order = file_rows(self.config, slot.param, "")
        return Target(module, slot.param, spec, 0, spec.out_features, spec.in_features, order)

    def _stacked(self, module: str) -> Target | None:
        """The linears of all experts of a layer: which of the two is told by the shapes, as the one that peft adapts
        first is called base_layer whatever it is."""
        moe, stem = self.config.moe, module.removesuffix(".base_layer")
        slot = self.table.locate(f"{stem}.0.gate_up_proj.weight")
        a, b = (self._shapes.get(Piece(module, kind), ()) for kind in ("a", "b"))
        if moe is None or slot is None or slot.param not in self.linears or (len(a), len(b)) != (2, 2):
            return None
        columns, rows = a[1], b[0]
        d, i, found = self.config.hidden_size, moe.intermediate_size, list[tuple[str, str]]()
        for role, out, into in (("gate_up_proj", 2 * i, d), ("down_proj", d, i)):
            found += [(role, OUT_IN)] if (columns, rows) == (into, out) else []
            found += [(role, IN_OUT)] if (columns, rows) == (out, into) else []
        if len(found) > 1 and self._layout is None:
            raise CheckpointError(
                f"the adapter's tensors for {module}",
                f"[{rows}, {columns}] may stand for [out, in] or for [in, out]",
                'Say which: moe_layout="out_in", as peft writes it beside transformers 5, or "in_out".',
            )
        found = [each for each in found if len(found) == 1 or each[1] == self._layout]
        if not found:
            return None
        (role, layout), prefix = found[0], slot.param.removesuffix(".0.gate_up_proj")
        names = tuple(f"{prefix}.{e}.{role}" for e in range(moe.num_experts))
        spec = self.linears[names[0]]
        target = Target(f"{stem}.{role}", names[0], spec, 0, spec.out_features, spec.in_features, None)
        target.experts, target.layout = names, layout
        return target

    # ---- shapes

    def _check(self, target: Target) -> None:
        shapes = {kind: self.entries[name].shape for kind, name in target.kinds.items()}
        rank = self._rank(target, shapes)
        for kind, shape in shapes.items():
            wanted = self._expected(target, kind, rank)
            if tuple(shape) != wanted:
                self._wrong.append(f"{target.kinds[kind]} {list(shape)}, expected {list(wanted)}")

    def _rank(self, target: Target, shapes: Mapping[str, Sequence[int]]) -> int:
        """The rank of a module's pair, 0 where it has none; what contradicts it is noted."""
        for one, other in (("a", "b"), ("embedding_a", "embedding_b")):
            if (one in shapes) != (other in shapes):
                given = target.kinds[one if one in shapes else other]
                self._wrong.append(f"{given} (the other half of the pair is missing)")
                return 0
            if one in shapes:
                rank = shapes[one][0] // max(1, len(target.experts))
                said = self.adapter.rank_of(target.module)
                if rank != said:
                    found = (
                        f"{target.kinds[one]} {list(shapes[one])} (rank {rank}, and the config says {said})"
                    )
                    self._wrong.append(found)
                return rank
        return 0

    def _expected(self, target: Target, kind: str, rank: int) -> tuple[int, ...]:
        if kind == "token_rows":
            return len(self.token_ids(target.module)), target.columns
        if target.experts:
            n, swapped = len(target.experts) * rank, target.layout == IN_OUT
            rows, columns = (target.columns, target.rows) if swapped else (target.rows, target.columns)
            return (n, columns) if kind == "a" else (rows, n)
        rows, columns = target.rows, target.columns
        if target.param in (
            "embed_tokens",
            "lm_head",
        ):  # another padding of the vocabulary is the same vocabulary
            rows = self._vocabulary(target)
        if target.spec is None and target.param != "embed_tokens":
            return self._tensors[target.param]
        by_kind = {"a": (rank, columns), "b": (rows, rank), "embedding_a": (rank, rows), "embedding_b": (columns, rank),
                   "whole": (rows, columns), "base": (rows, columns)}  # fmt: skip
        return by_kind.get(kind, (rows if target.spec is not None else columns,))

    def _vocabulary(self, target: Target) -> int:
        """Rows of the vocabulary that the adapter's tensors have."""
        for kind, dim in (("whole", 0), ("b", 0), ("embedding_a", 1), ("base", 0)):
            if kind in target.kinds and len(self.entries[target.kinds[kind]].shape) == 2:
                rows = self.entries[target.kinds[kind]].shape[dim]
                if abs(rows - target.rows) < _PADDING:
                    return rows
        return target.rows

    def token_ids(self, module: str) -> tuple[int, ...]:
        """The tokens whose rows in a module are new, as the config has them."""
        for name, ids in self.adapter.token_rows:
            if module == name or module.endswith(f".{name}"):
                return ids
        return ()

    # ---- what should be there

    def missing(self) -> list[str]:
        """What the config lists and no tensor is for: modules kept whole, rows of tokens, targets outside experts."""
        given = {target.module for target in self._found.values() if "whole" in target.kinds}
        rows = {target.module for target in self._found.values() if "token_rows" in target.kinds}
        wanted = [(name, given) for name in self.adapter.kept_modules]
        wanted += [(name, rows) for name, _ in self.adapter.token_rows]
        absent = [
            name for name, there in wanted if not any(f".{module}".endswith(f".{name}") for module in there)
        ]
        pairs = {(t.param, t.first) for t in self._found.values() if "a" in t.kinds}
        for spec in self.linears.values():
            if ".experts." not in spec.name and spec.parts[0][0]:
                absent += [module for module, at in self._modules(spec) if (spec.name, at) not in pairs]
        return absent

    def _modules(self, spec: LinearSpec) -> list[tuple[str, int]]:
        """(module, first row) of a linear's parts that the config names as targets."""
        found, first = list[tuple[str, int]](), 0
        whole = self.table.parts(spec.name) == [""]
        for part, rows in spec.parts:
            module = self.table.source(spec.name, "" if whole else part).removesuffix(".weight")
            if first == 0 or not whole:
                found += [(module, first)] if self.adapter.is_target(module) else []
            first += rows
        return found


def linears_of(config: ModelConfig) -> dict[str, LinearSpec]:
    """Every linear of a network by name, what chooses experts included, the head last."""
    specs = [spec for i in range(config.num_layers) for spec in layer_linears(config, i)]
    gates = [
        LinearSpec(name, shape[1], (("", shape[0]),), bias=False, quantizable=False)
        for i in range(config.num_layers)
        for name, shape in layer_tensors(config, i).items()
        if len(shape) == 2
    ]
    return {spec.name: spec for spec in (*specs, *gates, head_linear(config))}


def tensors_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every other weight of a network and its shape."""
    found: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        found |= {name: shape for name, shape in layer_tensors(config, i).items() if len(shape) != 2}
    return {**found, "norm": (config.hidden_size,)}


def _kinds_of(target: Target) -> tuple[str, ...]:
    """What an adapter may have for a module."""
    if target.experts:
        return "a", "b"
    if target.spec is not None:
        return _HEAD if target.param == "lm_head" else _LINEAR
    return _EMBEDDING if target.param == "embed_tokens" else ("whole",)
