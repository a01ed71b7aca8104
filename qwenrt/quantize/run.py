"""The way through a model: each layer is read, calibrated, rounded, and what follows sees it as it has become."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qwenrt.config.layers import LinearSpec
from qwenrt.loader.weights import WeightReader
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from qwenrt.quantize.awq import Scaling, folds_of, search
from qwenrt.quantize.finished import FinishedLayer, FinishedLayers
from qwenrt.quantize.hessian import Hessian
from qwenrt.quantize.layer import Batch, Layer, batches_of, next_tokens, with_changed
from qwenrt.quantize.report import Effect, LinearReport
from qwenrt.quantize.settings import QuantizeSettings
from qwenrt.quantize.solver import relative_error, rounded, solve

_MULTIPLE = 32  # of both sizes of a matrix that files hold codes of
_FEW = 8  # an expert that saw fewer tokens than a share of 1/8 of its inputs is rounded to nearest
_HEAD_TOKENS = 128  # whose logits are computed at once


def is_quantized(spec: LinearSpec, settings: QuantizeSettings) -> bool:
    """Whether a linear is rounded: all of a layer whose sizes the format can hold, but those that decide what a delta
    net remembers. AWQ's format has no place for a group that is not full."""
    sizes = (spec.in_features, *(rows for _, rows in spec.parts))
    full = settings.method != "awq" or settings.group_size == -1 or not spec.in_features % settings.group_size
    return spec.quantizable and full and all(size % _MULTIPLE == 0 for size in sizes)


@dataclass
class _Stream:
    """Texts on their way: the residual stream of each batch before the next layer."""

    batches: list[Batch]
    states: list[torch.Tensor]

    @classmethod
    def of(cls, model: Qwen, texts: Sequence[Sequence[int]], dtype: torch.dtype) -> _Stream:
        batches = batches_of(model, texts)
        return cls(batches, [model.embed(batch.ids).to(dtype) for batch in batches])

    def through(self, layer: Layer) -> None:
        self.states = layer.forward(self.states, self.batches)


class Quantizer:
    """One run over the layers. ``calibration``, ``held_out``: texts as token ids; the second measure only. States are
    kept in ``dtype``, that of the checkpoint."""

    def __init__(
        self,
        model: Qwen,
        reader: WeightReader,
        settings: QuantizeSettings,
        calibration: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.reader, self.settings = model, reader, settings
        texts = calibration if settings.calibrates else ()
        self._calibration = _Stream.of(model, texts, dtype)
        self._measured = {
            name: _Stream.of(model, held_out, dtype) for name in ("source", "rounded", "result")
        }

    def run(
        self, finished: FinishedLayers, tell: Callable[[str], object], done: Callable[[], object]
    ) -> list[LinearReport]:
        """All layers, each kept in ``finished`` as soon as it is done, and taken from there where it was. ``tell`` is
        told what comes next, ``done`` called after each layer."""
        reports: list[LinearReport] = []
        for index in range(self.model.config.num_layers):
            layer = Layer(self.model, self.reader, index)
            specs = [spec for spec in layer.specs.values() if is_quantized(spec, self.settings)]
            tell(f"layer {index}: source")
            self._measured["source"].through(layer)
            dense = {spec.name: layer.weight(spec.name) for spec in specs}
            nearest = {name: rounded(weight, self.settings.grid) for name, weight in dense.items()}
            layer.put_all(nearest)
            self._measured["rounded"].through(layer)
            layer.put_dense(dense)
            done_before = finished.read(index, specs)
            known = done_before or self._found(layer, nearest, tell)
            if done_before is None:
                finished.write(index, known, specs)
            if known.changed:
                layer.drop()
                layer = Layer(self.model, with_changed(self.reader, known.changed), index)
            layer.put_all(known.made)
            if done_before is not None or self.settings.method == "awq":
                self._calibration.through(layer)
            reports += known.reports
            self._measured["result"].through(layer)
            layer.drop()
            done()
        return reports

    def _found(
        self, layer: Layer, nearest: dict[str, CanonicalWeight], tell: Callable[[str], object]
    ) -> FinishedLayer:
        """The layer's codes by the method that was asked for."""
        if self.settings.method == "rtn":
            return FinishedLayer(nearest, [LinearReport(name, "rtn") for name in nearest])
        return (self._scaled if self.settings.method == "awq" else self._calibrated)(layer, nearest, tell)

    def _scaled(
        self, layer: Layer, nearest: dict[str, CanonicalWeight], tell: Callable[[str], object]
    ) -> FinishedLayer:
        """By AWQ: all linears' inputs are those of the dense layer."""
        stream, settings, began = self._calibration, self.settings, time.monotonic()
        tell("inputs")
        hessians: dict[str, Hessian] = {}
        states: Sequence[torch.Tensor] = stream.states
        for mlp in (False, True):
            stages = [specs for of_mlp, specs in layer.stages() if of_mlp == mlp]
            names = [spec.name for specs in stages for spec in specs if spec.name in nearest]
            if names:
                hessians |= layer.inputs(names, states, stream.batches, mlp=mlp, cap=settings.cap)
            states = states if mlp else layer.mixed(states, stream.batches)
        sums = {name: hessian.finished() for name, hessian in hessians.items()}
        scaling = Scaling(self.reader, layer.specs)
        for fold in folds_of(self.model.config, layer.index, layer.specs, set(nearest)):
            tell(", ".join(sorted({name.rpartition(".")[2] for name in fold.readers})))
            scaling.take(
                fold, search([(layer.weight(name), sums[name]) for name in fold.readers], settings.grid)
            )
        made: dict[str, CanonicalWeight] = {}
        reports: list[LinearReport] = []
        for name, plain in nearest.items():
            weight = layer.weight(name)
            made[name], error = scaling.rounded(name, weight, sums[name], settings.grid)
            before = relative_error(weight, dequantize(plain, torch.float32), sums[name])
            reports.append(LinearReport(name, "awq", hessians[name].tokens, error, before))
        reports[0] = replace(reports[0], seconds=round(time.monotonic() - began, 2))
        return FinishedLayer(made, reports, scaling.changed)

    def _calibrated(
        self, layer: Layer, nearest: dict[str, CanonicalWeight], tell: Callable[[str], object]
    ) -> FinishedLayer:
        """By GPTQ: the layer's linears one stage after the other, calibrated on what the stages before have become;
        then the texts are behind it."""
        stream, settings = self._calibration, self.settings
        made: dict[str, CanonicalWeight] = {}
        reports: list[LinearReport] = []
        stages = [(mlp, [s.name for s in specs if s.name in nearest]) for mlp, specs in layer.stages()]
        for mlp in (False, True):
            names = [name for of_mlp, stage in stages if of_mlp == mlp for name in stage]
            rounds = [stage for of_mlp, stage in stages if of_mlp == mlp] if settings.sequential else [names]
            for stage in filter(None, rounds):
                tell(", ".join(sorted({name.rpartition(".")[2] for name in stage})))
                found = layer.inputs(stage, stream.states, stream.batches, mlp=mlp, cap=settings.cap)
                for name in stage:
                    made[name], report = self._solved(
                        name, layer.weight(name), found.pop(name), nearest[name]
                    )
                    reports.append(report)
                    layer.put_all({name: made[name]})
            run = layer.with_mlp if mlp else layer.mixed
            stream.states = run(stream.states, stream.batches)
        return FinishedLayer(made, reports)

    def _solved(
        self, name: str, weight: torch.Tensor, inputs: Hessian, nearest: CanonicalWeight
    ) -> tuple[CanonicalWeight, LinearReport]:
        """The better of GPTQ's codes and the nearest, by the error of the outputs; the nearest where too few tokens
        came to tell."""
        hessian, tokens = inputs.finished(), inputs.tokens
        error = relative_error(weight, dequantize(nearest, torch.float32), hessian)
        if tokens < weight.shape[1] / _FEW:
            return nearest, LinearReport(
                name, "rtn", tokens, error, error, note=f"{tokens} tokens came to it"
            )
        began = time.monotonic()
        solution = solve(weight, hessian, self.settings.grid, self.settings.act_order, self.settings.damp)
        seconds = time.monotonic() - began
        if solution is None:
            return nearest, LinearReport(
                name, "rtn", tokens, error, error, note="its inputs have no usable Hessian"
            )
        by_gptq = relative_error(weight, dequantize(solution.weight, torch.float32), hessian)
        if not by_gptq < error:
            return nearest, LinearReport(name, "rtn", tokens, error, error, note="nearer than GPTQ's")
        report = LinearReport(name, "gptq", tokens, by_gptq, error, solution.damp, round(seconds, 2))
        return solution.weight, report

    def effect(self) -> Effect:
        """What the held-out texts say of the source, of it rounded to nearest, and of the result."""
        model, reader = self.model, self.reader
        model.set_tensor("norm", reader.tensor("norm"))
        tied = model.embed_tokens.float() if model.config.tie_word_embeddings else None
        head = reader.linear(model.linear_specs["lm_head"], tied).data["weight"].float()
        effect = Effect()
        for row, batch in enumerate(self._measured["source"].batches):
            targets = next_tokens(batch)
            for start in range(0, len(targets), _HEAD_TOKENS):
                part = slice(start, start + _HEAD_TOKENS)
                logits = [
                    torch.nn.functional.linear(
                        model.backend.rms_norm(
                            stream.states[row][part].float(),
                            model.weights.tensor("norm"),
                            model.config.rms_norm_eps,
                        ),
                        head,
                    )
                    for stream in self._measured.values()
                ]
                effect.add(logits, targets[part])
        return effect
