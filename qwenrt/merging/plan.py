"""The tensors of a merged checkpoint: those of the base under their names, dense, as adapters change them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from qwenrt.config.layers import LinearSpec
from qwenrt.loader.adapters import BaseWeights
from qwenrt.loader.checkpoint.checkpoint import TORCH_DTYPES, TensorReader
from qwenrt.loader.checkpoint.directory import Planned
from qwenrt.loader.checkpoint.formats import Dense
from qwenrt.loader.checkpoint.names import IGNORED, ParamSlot, table_for
from qwenrt.merging.changes import Changes, no_bias


class MergePlan:
    """``dtype``: of all weights, None for the dtype that each has; ``dense``: of those that are quantised in the base
    and become dense. ``unties``: whether the head gets a matrix of its own."""

    def __init__(
        self, base: BaseWeights, changes: Changes, dtype: torch.dtype | None, dense: torch.dtype
    ) -> None:
        self._base, self._changes, self._dtype, self._dense = base, changes, dtype, dense
        self._table, self._reader = table_for(base.config.model_type), TensorReader(base.checkpoint)
        self._done: set[tuple[str, str]] = set()
        tied = base.config.tie_word_embeddings and base.config.has_head
        self.unties = tied and changes.head_parts()

    def tensors(self) -> Iterator[Planned]:
        """In the order of the base's files."""
        base = self._base
        base.reader  # noqa: B018 (every tensor of the base is accounted for before any is written)
        for name in base.checkpoint.tensors:
            slot, stacked = self._slot(name), self._table.expert_of(name)
            if stacked is not None and base.config.moe is not None:
                yield self._experts(name, stacked)
            elif slot is None:
                continue
            elif slot.ignored:
                yield self._as_it_is(name)
            elif self._is_dense(slot):
                yield self._bias(name, slot) if slot.kind == "bias" else self._weight(name, slot)
            elif slot.kind == "bias":
                if base.model.linear_specs[slot.param].bias:
                    yield self._bias(name, slot)
            elif (slot.param, slot.part) not in self._done:
                self._done.add((slot.param, slot.part))
                yield self._dequantised(name.removesuffix(slot.kind) + "weight", slot)
        if self.unties:
            yield self._own_head()
        self._check_biases()

    # ---- one tensor

    def _as_it_is(self, name: str) -> Planned:
        planned = Planned.stored(name, self._reader)
        if self._dtype is None or planned.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return planned
        return self._made(name, self._dtype, planned.shape, lambda stored: stored.to(self._dtype))

    def _made(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], make: object) -> Planned:
        def read() -> torch.Tensor:
            made: torch.Tensor = make(self._reader.tensor(name))  # type: ignore[operator]
            return made

        return Planned(name, dtype, shape, read, lambda: self._reader.release(name))

    def _stored_dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[self._base.checkpoint.tensors[name].dtype])
        return self._dtype or dtype

    def _weight(self, name: str, slot: ParamSlot) -> Planned:
        first, rows = self._place(slot)
        if not self._changes.changes(slot.param, first, rows):
            return self._as_it_is(name)
        dtype = self._stored_dtype(name)
        shape = self._base.checkpoint.tensors[name].shape
        return self._made(
            name, dtype, shape,
            lambda stored: self._changes.weight(name, slot.param, stored, dtype, first, slot.part),
        )  # fmt: skip

    def _bias(self, name: str, slot: ParamSlot) -> Planned:
        self._done.add((slot.param, "bias"))
        if not self._changes.has_bias(slot.param):
            return self._as_it_is(name)
        dtype, (first, _) = self._stored_dtype(name), self._place(slot)
        shape = self._base.checkpoint.tensors[name].shape
        return self._made(
            name, dtype, shape, lambda stored: self._changes.bias(slot.param, stored, dtype, first, slot.part)
        )

    def _dequantised(self, name: str, slot: ParamSlot) -> Planned:
        """A matrix of codes as the dense one that it stands for, changed or not."""
        first, rows = self._place(slot)
        spec = self._base.model.linear_specs.get(slot.param)
        columns = self._base.model.tensor_specs[slot.param][1] if spec is None else spec.in_features

        def make() -> torch.Tensor:
            dense = self._base.weight(slot.param)[first : first + rows]
            dense = self._changes.in_file_order(dense, slot.param, slot.part)
            if not self._changes.changes(slot.param, first, rows):
                return dense.to(self._dense)
            return self._changes.weight(name, slot.param, dense, self._dense, first, slot.part)

        return Planned(name, self._dense, (rows, columns), make)

    def _experts(self, name: str, path: str) -> Planned:
        """One tensor of all experts' matrices."""
        entry = self._base.checkpoint.tensors[name]
        slots = [self._table.locate(path.replace("{e}", str(e))) for e in range(entry.shape[0])]
        params = [slot.param for slot in slots if slot is not None]
        if not any(map(self._changes.changes, params)):
            return self._as_it_is(name)
        spec, dtype = self._base.model.linear_specs[params[0]], self._stored_dtype(name)
        transposed = entry.shape[1:] != (spec.out_features, spec.in_features)

        def changed(stored: torch.Tensor) -> torch.Tensor:
            out = torch.empty(entry.shape, dtype=dtype)
            for e, param in enumerate(params):
                own = stored[e].t() if transposed else stored[e]
                made = self._changes.weight(f"{name}[{e}]", param, own, dtype)
                out[e] = made.t() if transposed else made
            return out

        return self._made(name, dtype, entry.shape, changed)

    def _own_head(self) -> Planned:
        """The head of a model whose head was the embedding."""
        name = self._base.reader.inventory.slots["embed_tokens"]["", "weight"]
        dtype, head = self._stored_dtype(name), self._table.source("lm_head")
        shape = self._base.checkpoint.tensors[name].shape

        def make() -> torch.Tensor:
            return self._changes.weight(head, "lm_head", self._reader.tensor(name), dtype)

        return Planned(head, dtype, shape, make)

    # ---- where it belongs

    def _place(self, slot: ParamSlot) -> tuple[int, int]:
        """The first row of a file's part in the model's weight, and how many it has."""
        spec: LinearSpec | None = self._base.model.linear_specs.get(slot.param)
        if spec is None:
            return 0, self._base.model.tensor_specs[slot.param][0]
        first = 0
        for part, rows in spec.parts:
            if part == slot.part:
                return first, rows
            first += rows
        return 0, spec.out_features

    def _is_dense(self, slot: ParamSlot) -> bool:
        known = self._base.reader.inventory.formats.get((slot.param, slot.part))
        return known is None or isinstance(known[1], Dense)

    def _slot(self, name: str) -> ParamSlot | None:
        """What a tensor of the base is for; None for one that is not written: a head that is the embedding again."""
        slot = self._table.locate(name) or IGNORED
        if slot.param != "lm_head" or not self._base.config.tie_word_embeddings:
            return slot
        only = self._base.reader.inventory.slots["embed_tokens"]["", "weight"] == name
        return replace(slot, param="embed_tokens") if only else None

    def _check_biases(self) -> None:
        for adapter, _ in self._changes.adapters:
            for param in adapter.weights.linears:
                if self._changes.has_bias(param) and (param, "bias") not in self._done:
                    raise no_bias(param, self._table.source(param, self._table.parts(param)[0]))
