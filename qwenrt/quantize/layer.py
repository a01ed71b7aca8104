"""One decoder layer at a time: its weights in float32, and what goes through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qwenrt.backends.base import Backend
from qwenrt.config.layers import LinearSpec, layer_linears, layer_tensors
from qwenrt.loader.checkpoint.checkpoint import TensorReader
from qwenrt.loader.weights import WeightReader
from qwenrt.model.qwen import Qwen
from qwenrt.model.rotary import ntk_alpha
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import dequantize
from qwenrt.quantize.hessian import Hessian

TOGETHER = 2048  # tokens that go through a layer at once
_MLP = ("gate_up_proj", "down_proj")


class _AllSeen(Exception):
    """Every wanted linear has got its inputs: what follows in the layer need not be computed."""


@dataclass
class Recorder(Backend):
    """Plain torch that notes the inputs of linears. ``wanted``: a weight's id -> where its inputs are added."""

    wanted: dict[int, Hessian] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def linear(self, x: torch.Tensor, w: Packed) -> torch.Tensor:
        hessian = self.wanted.get(id(w))
        if hessian is not None:
            hessian.add(x)
            self.seen.add(id(w))
            if len(self.seen) == len(self.wanted):
                raise _AllSeen
        return super().linear(x, w)


@dataclass(frozen=True)
class Batch:
    """Texts that go through a layer together: int64 ids [T] laid behind each other, which do not see each other."""

    ids: torch.Tensor
    plan: StepPlan
    alphas: list[int]


def batches_of(model: Qwen, texts: Sequence[Sequence[int]]) -> list[Batch]:
    """Texts as batches of about TOGETHER tokens, in their order."""
    batches: list[Batch] = []
    waiting: list[Sequence[int]] = []
    for number, text in enumerate(texts, 1):
        waiting.append(text)
        if number == len(texts) or sum(map(len, waiting)) >= TOGETHER:
            lengths = [len(each) for each in waiting]
            ids = torch.tensor([token for each in waiting for token in each], dtype=torch.int64)
            alphas = [ntk_alpha(length, model.config) for length in lengths]
            batches.append(Batch(ids, StepPlan(lengths, lengths), alphas))
            waiting = []
    return batches


class _Changed(TensorReader):
    """A checkpoint's tensors, some of them by others of the same names."""

    def __init__(self, reader: TensorReader, changed: Mapping[str, torch.Tensor]) -> None:
        self._reader, self._changed = reader, changed

    def tensor(self, name: str) -> torch.Tensor:
        changed = self._changed.get(name)
        return self._reader.tensor(name) if changed is None else changed

    def dtype(self, name: str) -> str:
        return self._reader.dtype(name)

    def release(self, name: str) -> None:
        self._reader.release(name)


def with_changed(reader: WeightReader, changed: Mapping[str, torch.Tensor]) -> WeightReader:
    """The same weights, of which the file has ``changed`` in another form: tensors of the same dtypes and shapes."""
    tensors = _Changed(reader.reader, changed)
    return WeightReader(tensors, reader.inventory, reader.config, reader.backend, reader.dtype)


def next_tokens(batch: Batch) -> torch.Tensor:
    """int64 [T]: what follows each token in its text, -1 where nothing does."""
    following = torch.full_like(batch.ids, -1)
    at = 0
    for length in batch.plan.q_lens:
        following[at : at + length - 1] = batch.ids[at + 1 : at + length]
        at += length
    return following


class Layer:
    """Layer ``index`` of a model whose other layers have no weights."""

    def __init__(self, model: Qwen, reader: WeightReader, index: int) -> None:
        self.index, self._model, self._layer = index, model, model.layers[index]
        assert isinstance(model.backend, Recorder)
        self._recorder = model.backend
        self._names = [*layer_tensors(model.config, index)]
        self.specs = {spec.name: spec for spec in layer_linears(model.config, index)}
        for name in self._names:
            model.set_tensor(name, reader.tensor(name))
        for name, spec in self.specs.items():
            packed = reader.linear(spec)
            packed.data["weight"] = packed.data["weight"].float().clone()  # not a view of the file
            model.set_linear(name, packed)
        model.backend.bindings.clear()
        self._layer.bind(model.backend, torch.float32, model.weights)

    def weight(self, name: str) -> torch.Tensor:
        """float32 [N, K]"""
        weight: torch.Tensor = self._model.weights.packed(name).data["weight"]
        return weight

    def put_all(self, weights: Mapping[str, CanonicalWeight]) -> None:
        """Compute with what these codes stand for from now on."""
        for name, weight in weights.items():
            self._model.weights.packed(name).data["weight"] = dequantize(weight, torch.float32)

    def put_dense(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Compute with these, float32 [N, K], from now on."""
        for name, weight in weights.items():
            self._model.weights.packed(name).data["weight"] = weight

    def drop(self) -> None:
        """Give the weights' memory back."""
        for name in (*self._names, *self.specs):
            self._model.weights.pop(name, None)
        del self._layer.weights, self._layer.mixer.weights

    def stages(self) -> list[tuple[bool, list[LinearSpec]]]:
        """Linears that are calibrated together, in the order of computation: (whether they are of the MLP, which)."""
        roles: dict[str, list[LinearSpec]] = {}
        for spec in self.specs.values():
            roles.setdefault(spec.name.rpartition(".")[2], []).append(spec)
        mixers = [(False, specs) for role, specs in roles.items() if role not in _MLP]
        return mixers + [(True, roles[role]) for role in _MLP]

    def forward(self, states: Sequence[torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The residual stream of each batch before the layer -> after it, in the dtype it has."""
        return self._run(lambda x, batch: self._mlp(self._mix(x, batch), batch), states, batches)

    def mixed(self, states: Sequence[torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """The same after the layer's first half."""
        return self._run(self._mix, states, batches)

    def with_mlp(self, states: Sequence[torch.Tensor], batches: Sequence[Batch]) -> list[torch.Tensor]:
        """From after the first half to after the layer."""
        return self._run(self._mlp, states, batches)

    def inputs(
        self,
        names: Iterable[str],
        states: Sequence[torch.Tensor],
        batches: Sequence[Batch],
        *,
        mlp: bool,
        cap: float,
    ) -> dict[str, Hessian]:
        """What comes into linears of one half of the layer, ``states`` being the residual stream before that half."""
        hessians = {name: Hessian(self.specs[name].in_features, cap) for name in names}
        packed = {name: self._model.weights.packed(name) for name in hessians}
        self._recorder.wanted.update({id(packed[name]): hessian for name, hessian in hessians.items()})
        half = self._mlp if mlp else self._mix
        try:
            for x, batch in zip(states, batches, strict=True):
                self._recorder.seen.clear()
                try:
                    half(x.float(), batch)
                except _AllSeen:
                    continue
        finally:
            self._recorder.wanted.clear()
        return hessians

    def _mix(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        rotary = self._model.rotary(batch.plan, batch.alphas)
        return self._layer.mixer.add(x, rotary, batch.plan, None)

    def _mlp(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._layer.add_mlp(x, batch.plan)

    def _run(
        self,
        part: Callable[[torch.Tensor, Batch], torch.Tensor],
        states: Sequence[torch.Tensor],
        batches: Sequence[Batch],
    ) -> list[torch.Tensor]:
        pairs = zip(states, batches, strict=True)
        return [part(x.float(), batch).to(x.dtype) for x, batch in pairs]
