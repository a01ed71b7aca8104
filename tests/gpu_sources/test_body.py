"""The layers of a decoding step by kernels in Gluon, beside the definitions of a small model; wrong ones are found."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections import Counter
from pathlib import Path
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
from qwenrt.ops.steps import DecodePlan, LayerKV, RotaryRows
from qwenrt.ops.types import CanonicalWeight, Packed
from tests.backends.test_selfcheck import MODELS, Model
from tests.gpu_sources.mutants import Mutant
from tests.gpu_sources.test_gluon import Streaming, shimmed
from tests.gpu_sources.test_numerics import mutated

__all__ = ["shimmed"]
pytestmark = pytest.mark.gpu_sources
CPU = torch.device("cpu")
ORDERED = Model(form=(4, 64))
FOUND = MODELS | {"act-order": ORDERED, "own keys": Model(int8_cache=True)}
NAMES = (
    "plain",
    "codes",
    "act-order",
    "logn",
    "own keys",
    "bytes",
    "window",
    "qk-norm",
    "int8-cache",
    "all biases",
)


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
    if model is FOUND["own keys"]:  # of each query head: sums in the place of products
        heads["num_kv_heads"] = 4
    kind = ActOrder if model is ORDERED else Weights
    return kind(dataclasses.replace(small, **sizes, **heads, windows=small.windows[:2]), kinds)


def step(backend: Backend, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[Any]]:
    """Logits and cache of a step of three rows: by the layers at once where a backend has them, else op by op."""
    model = weights_of(FOUND[name]).model(backend, dtype)
    parts = trial._parts(model, FOUND[name].int8_cache)
    for i, layer in enumerate(parts.cache):
        if isinstance(layer, LayerKV) and not layer.quantized:
            layer.k.copy_(torch.randn(layer.k.shape, generator=torch.Generator().manual_seed(i)))
            layer.v.copy_(torch.randn(layer.v.shape, generator=torch.Generator().manual_seed(i + 9)))
    position = torch.tensor([5, 40, 17])
    table = torch.tensor([[4, 2, 6, 3], [1, 7, 8, 0], [5, 9, 0, 0]])
    slots = reference.decode_slots(table, position, parts.block_size)
    every = model.rotary_table(64).rows
    q_scale = None if every.q_scale is None else every.q_scale[position]
    rotary = RotaryRows(every.cos[position], every.sin[position], q_scale)
    x, plan = model.embed(torch.tensor([3, 77, 200])), DecodePlan(position, table, slots)
    assert model.bind_decode() is None
    layers = backend.decode_layers(model)
    if layers is None:
        assert type(backend) is Backend
        x = model.run_layers(x, rotary, plan, parts.cache)
        return model.logits(model.final_norm(x)), list(parts.cache)
    result = layers.logits(x, rotary, plan, parts.cache)
    assert isinstance(layers, Body) and layers._counts is not None and not layers._counts.any()
    return result, list(parts.cache)


def streaming() -> Streaming:
    backend = Streaming(CPU)
    # Four splits of the keys, of which some have none; programs of all shapes.
    few = {"rows": 1 << 15, "dense_tokens": 3, "keys": 16, "per_split": 16}
    backend.tiles = dataclasses.replace(TILES, wide=Warps(4, 1), narrow=Warps(2, 2), wide_from=200, **few)
    return backend


@torch.no_grad()
def off(name: str, dtype: torch.dtype) -> float:
    (ours, our_cache), (theirs, their_cache) = step(streaming(), name, dtype), step(Backend(CPU), name, dtype)
    stored = max(map(selfcheck.cache_error, our_cache, their_cache))
    return max(selfcheck.relative(ours, theirs), stored)


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


ATTENTION = {
    "the newest key forgotten": ("most = tl.where(last, score,", "most = tl.where(last, score - 100.0,"),
    "the newest key in every split": ("last = share == SPLITS - 1", "last = share >= 0"),
    "a key too few": (
        "high = tl.minimum(low + per_split, position)",
        "high = tl.minimum(low + per_split, position - 1)",
    ),
    "a window of one more": ("position + 1 - window, 0)", "position - window, 0)"),
    "the next slot": (
        "place = (own * SLOTS + position % SLOTS)",
        "place = (own * SLOTS + (position + 1) % SLOTS)",
    ),
    "values of the neighbour": ("start + KVH * D + d", "start + d"),
    "LogN ignored": ("q = (q * tl.load(q_scale_ptr + row)", "q = (q * 0.0 + q"),
    "queries not fitted to codes": ("q = q * factor.to(dtype)", "q = q * 1.0 + 0.0 * factor.to(dtype)"),
    "the first splits alone": (
        "for first in range(0, SPLITS, AT_ONCE)",
        "for first in range(0, SPLITS - AT_ONCE, AT_ONCE)",
    ),
    "merged too soon": ("== SPLITS - 1:", "== SPLITS - 2:"),
    "a counter that stays": ("tl.store(count, 0)", "tl.store(count, 1)"),
}
SHOWN_BY = {
    "a window of one more": "window",
    "LogN ignored": "logn",
    "queries not fitted to codes": "int8-cache",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_wrong_attention_is_found(
    name: str, launched: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwenrt.backends.cuda import kernels

    right, wrong = ATTENTION[name]
    importlib.import_module("qwenrt.backends.cuda.kernels.attend")
    module = mutated(Mutant(name, "attend", right, wrong, ""), tmp_path, monkeypatch)
    monkeypatch.setattr(kernels, "attend", module)
    monkeypatch.setitem(sys.modules, "qwenrt.backends.cuda.kernels.attend", module)
    try:
        apart = off(SHOWN_BY.get(name, "plain"), torch.float16)
    except AssertionError:  # what counts is not 0 again
        return
    assert not apart < 3 * selfcheck.TOLERANCE[torch.float16], apart
