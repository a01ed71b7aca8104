"""The layers of a decoding step by kernels in Gluon, beside the definitions of a small model; wrong ones are found."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.base import Backend
from qwenrt.backends.cuda.body import Body
from qwenrt.backends.cuda.tables import TILES, Warps
from qwenrt.config.layers import LinearSpec
from qwenrt.model import trial
from qwenrt.ops import reference
from qwenrt.ops.steps import DecodePlan, RotaryRows
from qwenrt.ops.types import CanonicalWeight, Packed
from tests.backends.test_selfcheck import MODELS, Model
from tests.gpu_sources.test_gluon import Streaming, shimmed

__all__ = ["shimmed"]
pytestmark = pytest.mark.gpu_sources
CPU = torch.device("cpu")
ORDERED = Model(form=(4, 64))
FOUND = MODELS | {"act-order": ORDERED}
NAMES = ("plain", "codes", "act-order", "bytes", "window", "qk-norm", "int8-cache", "all biases")


@pytest.fixture
def launched(shimmed: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Which kernels in Gluon were launched."""
    from qwenrt.backends.cuda.kernels import stream

    names = Counter[str]()

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        names["add" if options["ADD"] else "pair" if options["PAIR"] else "linear"] += 1
        shimmed.run(kernel, *args, **options)

    monkeypatch.setattr(stream, "launch", launch)
    return names


class Weights(trial._Weights):
    """Random weights of a small model, every linear in one piece."""

    act_order = False

    def _linear(self, spec: LinearSpec, *form: Any) -> list[CanonicalWeight]:
        name = spec.name if spec.name == "lm_head" else "a linear"
        (made,) = super()._linear(dataclasses.replace(spec, name=name), *form)
        if self.act_order and made.codes is not None:
            perm = torch.randperm(
                spec.in_features, generator=torch.Generator().manual_seed(spec.out_features)
            )
            made = dataclasses.replace(made, perm=perm.to(torch.int32))
        return [made]


class ActOrder(Weights):
    act_order = True


def weights_of(model: Model) -> Weights:
    kinds = trial.Kinds(lambda spec: model.form if spec.quantizable else (16, 128), model.stored, False)
    small = trial._small(model.config)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "num_layers": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rotary_dim": 32}
    kind = ActOrder if model is ORDERED else Weights
    return kind(dataclasses.replace(small, **sizes, **heads, windows=small.windows[:2]), kinds)


def logits(backend: Backend, name: str, dtype: torch.dtype, rows: int = 2) -> torch.Tensor:
    """Of a step over a cache that holds 1 everywhere: by the layers at once where a backend has them, else op by op."""
    model = weights_of(FOUND[name]).model(backend, dtype)
    parts = trial._parts(model, FOUND[name].int8_cache)
    position = torch.tensor([5, 40, 17][:rows])
    table = torch.tensor([[4, 2, 6, 3], [1, 7, 8, 0], [5, 9, 0, 0]][:rows])
    slots = reference.decode_slots(table, position, parts.block_size)
    every = model.rotary_table(64).rows
    q_scale = None if every.q_scale is None else every.q_scale[position]
    rotary = RotaryRows(every.cos[position], every.sin[position], q_scale)
    x, plan = model.embed(torch.tensor([3, 77, 200][:rows])), DecodePlan(position, table, slots)
    assert model.bind_decode() is None
    layers = backend.decode_layers(model)
    if layers is None:
        assert type(backend) is Backend
        return model.logits(model.final_norm(model.run_layers(x, rotary, plan, parts.cache)))
    return layers.logits(x, rotary, plan, parts.cache)


def streaming() -> Streaming:
    backend = Streaming(CPU)
    backend.tiles = dataclasses.replace(
        TILES, wide=Warps(4, 1), narrow=Warps(2, 2), wide_from=200, rows=1 << 15, dense_tokens=3
    )
    return backend


@torch.no_grad()
def off(name: str, dtype: torch.dtype) -> float:
    return selfcheck.relative(logits(streaming(), name, dtype), logits(Backend(CPU), name, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_layers_are_as_defined(name: str, dtype: torch.dtype, launched: Counter[str]) -> None:
    assert off(name, dtype) < 3 * selfcheck.TOLERANCE[dtype]
    assert launched == {"linear": 2 + 1, "pair": 2, "add": 2 * 2}, "four of a layer, and the head"


def first_norm(right: Any, self: Body, norm: torch.Tensor, eps: float, w: Packed) -> Any:
    return right(self, self._layers[0][0].input_norm, eps, w)


def in_file_order(right: Any, self: Body, norm: torch.Tensor, eps: float, w: Packed) -> Any:
    return dataclasses.replace(right(self, norm, eps, w), place=None)


def of_this_layer(right: Any, self: Body, i: int, rows: int) -> Any:
    return right(self, max(0, i - 1), rows)


def residual_forgotten(
    right: Any, self: Body, x: Any, w: Packed, residual: torch.Tensor, following: Any
) -> Any:
    return right(self, x, w, 0 * residual, following)


def inner_in_file_order(
    right: Any, self: Body, half: Any, w: Packed, pair: bool = False, place: Any = None
) -> Any:
    return right(self, half, w, pair=pair)


MUTANTS = {
    "one norm for all": ("plain", "_next", first_norm),
    "the norm of this layer": ("plain", "_after", of_this_layer),
    "the residual forgotten": ("plain", "_add", residual_forgotten),
    "act-order of the next one ignored": ("act-order", "_next", in_file_order),
    "act-order of down ignored": ("act-order", "_linear", inner_in_file_order),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_layers_are_found(mutant: str, launched: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, method, wrong = MUTANTS[mutant]
    right = getattr(Body, method)
    monkeypatch.setattr(Body, method, lambda self, *args, **options: wrong(right, self, *args, **options))
    try:
        apart = off(name, torch.bfloat16)
    except AssertionError:  # the head's norm asked for too soon
        return
    assert not apart < 5 * selfcheck.TOLERANCE[torch.bfloat16]
