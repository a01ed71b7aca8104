"""Every kernel of a decoding step at the shapes of released models, compiled before anything is measured: by as many
processes as there are cores, into the cache that later processes read."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from qwenrt.backends import registry
from qwenrt.backends.cuda import packing, streaming
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.ops.steps import DecodePlan, LayerKV, LayerState, RotaryRows
from qwenrt.ops.types import DeltaWeights, Experts, Packed

# that launch kernels
MODULES = ("portable", "between", "attention", "choose", "read", "stream", "attend", "delta", "experts")
_META = torch.device("meta")
_SHAPES = {
    "1.8B": (2048, 5504, 16, 128),
    "7B": (4096, 11008, 32, 128),
}  # hidden, intermediate, heads, head_dim
_VOCABULARY = 151936
_BLOCK, _WIDTH = 16, 128  # slots of a block, blocks of a sequence


@dataclass(frozen=True)
class Made:
    """One kernel: what the compiler said of it, or why there is none."""

    kernel: str
    seconds: float
    registers: int = 0
    spilt: int = 0
    shared: int = 0
    why: str = ""


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _weight(outputs: int, inputs: int, bits: int, dtype: torch.dtype = torch.bfloat16) -> Packed:
    if bits == 16:
        return Packed("dense", outputs, inputs, {"weight": _empty(outputs, inputs, dtype=dtype)}, None)
    words = _empty(outputs, inputs * bits // 32, dtype=torch.int32)
    scales = _empty(outputs, inputs // 128, dtype=torch.float16)
    data = {"words": words, "scales": scales, "zero": 1 << (bits - 1), "perm": None}
    return Packed(packing.KINDS[bits], outputs, inputs, data, None, bits=bits, group_size=128)


def _cache(heads: int, head_dim: int, int8: bool) -> LayerKV:
    shape = (_WIDTH, _BLOCK, heads, head_dim)
    if not int8:
        return LayerKV(_empty(*shape), _empty(*shape))
    sides = [_empty(*shape[:3], dtype=torch.float32) for _ in range(4)]
    return LayerKV(_empty(*shape, dtype=torch.uint8), _empty(*shape, dtype=torch.uint8), *sides)


def calls(backend: TritonBackend) -> dict[str, Callable[[], Any]]:
    """Ops by what they are asked with; their tensors hold nothing."""
    found: dict[str, Callable[[], Any]] = {}
    for model, (hidden, inner, heads, head_dim) in _SHAPES.items():
        norm = _empty(hidden)
        for rows in (1, 8):
            x, middle = _empty(rows, hidden), _empty(rows, inner)
            for bits in (16, 8, 4):
                weight = partial(_weight, bits=bits)
                qkv, gate_up = weight(3 * hidden, hidden), weight(2 * inner, hidden)
                name = f"{model}, {bits} bits, {rows} rows"
                found |= {
                    f"{name}: qkv": partial(backend.norm_linear, x, norm, 1e-6, qkv),
                    f"{name}: o": partial(_added, backend, x, weight(hidden, hidden), norm),
                    f"{name}: gate and up": partial(backend.norm_gate_up_silu, x, norm, 1e-6, gate_up),
                    f"{name}: down": partial(_added, backend, middle, weight(hidden, inner), norm),
                }
            head = _weight(_VOCABULARY, hidden, 16)
            found[f"{model}, {rows} rows: head"] = partial(backend.linear, x, head)
            logits = _empty(rows, _VOCABULARY, dtype=torch.float32)
            found[f"{rows} rows: choice"] = partial(backend.choose_rows, logits, None, 0, None)
            for int8 in (False, True):
                name = f"{model}, {rows} rows, {'int8' if int8 else 'float'} cache"
                found |= _between(backend, name, rows, (heads, heads, head_dim), int8)
    for bits in (16, 4):
        for tokens in (1, 8, 2048):
            found[f"experts, {bits} bits, {tokens} tokens"] = partial(experts, backend, tokens, bits)
    found["delta net"] = partial(delta_net, backend, 1)
    return found


def experts(backend: TritonBackend, tokens: int, bits: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Those of a layer of Qwen3-30B-A3B."""
    count, hidden, inner, top_k = 128, 2048, 768, 8

    def every(outputs: int, inputs: int) -> Packed:
        one = _weight(outputs, inputs, bits, dtype)
        data = {
            name: _empty(count, *value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in one.data.items()
        }
        return replace(one, data=data)

    both = every(2 * inner, hidden), every(hidden, inner)
    router, norm = _empty(count, hidden, dtype=dtype), _empty(hidden, dtype=dtype)
    w = Experts(router, [both[0]] * count, [both[1]] * count, top_k, True, stacked=both)
    backend.norm_moe_add_each(_empty(tokens, hidden, dtype=dtype), norm, 1e-6, w)


def delta_net(backend: TritonBackend, rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """That of a layer of Qwen3-Next."""
    heads = nk, nv, dk, dv = 16, 32, 128, 128
    channels, f32 = 2 * nk * dk + nv * dv, torch.float32
    of_heads, out_norm = _empty(nv, dtype=f32), _empty(dv, dtype=f32)
    linear = _weight(1, 1, 16, dtype)  # the kernels lie between them
    conv = _empty(4, channels, dtype=dtype)
    w = DeltaWeights(linear, linear, linear, conv, of_heads, of_heads, out_norm, heads)
    state = LayerState(_empty(9, 3, channels, dtype=dtype), _empty(9, nv, dk, dv, dtype=f32))
    of_rows, table = _empty(rows, dtype=torch.int64), _empty(rows, 8, dtype=torch.int64)
    inputs = _empty(rows, channels + nv * dv, dtype=dtype), _empty(rows, 2 * nv, dtype=dtype)
    backend.decode_delta_net(*inputs, w, 1e-6, state, DecodePlan(of_rows, table, of_rows, of_rows))


def _added(backend: TritonBackend, x: torch.Tensor, w: Packed, norm: torch.Tensor) -> None:
    """As a captured step has it, with what the next norm takes, or else as the seam has it."""
    residual = _empty(len(x), w.out_features)
    if not backend.gluon:
        backend.linear_add(x, w, residual)
        return
    from qwenrt.backends.cuda.kernels import stream

    following = stream.Next(norm, 1e-6, torch.bfloat16)
    stream.linear_add(x, w, streaming.warps(w, backend.tiles), residual, following)


def _between(
    backend: TritonBackend, name: str, rows: int, heads: tuple[int, int, int], int8: bool
) -> dict[str, Callable[[], Any]]:
    """What is between the linears."""
    kv, turn = _cache(heads[1], heads[2], int8), _empty(rows, heads[2], dtype=torch.float32)
    position, table, slots = (
        _empty(*shape, dtype=torch.int64) for shape in ((rows,), (rows, _WIDTH), (rows,))
    )
    plan, qkv = DecodePlan(position, table, slots), _empty(rows, 3 * heads[0] * heads[2])
    q = _empty(rows, heads[0], heads[2])
    if backend.gluon:
        from qwenrt.backends.cuda.kernels.attend import attend

        counts, turns = _empty(rows * heads[0], dtype=torch.int32), RotaryRows(turn, turn, None)
        at_once = partial(attend, qkv, heads, None, turns, kv, plan, 0.1, 0, counts, backend.tiles)
        return {f"{name}: attention in one launch": at_once}
    return {
        f"{name}: rotation": partial(backend.rotary_store_kv, qkv, heads, None, turn, turn, None, kv, plan),
        f"{name}: attention": partial(backend.decode_attention, q, kv, plan, 0.1),
    }


def made_by(device: str, share: int, of: int) -> list[Made]:
    """Compiles a share of all calls; in a process of its own, as it changes what a launch is."""
    backend = registry.create(device)
    assert isinstance(backend, TritonBackend)
    backend.dtype = torch.bfloat16
    found: list[Made] = []
    for name in MODULES:
        try:
            module: Any = importlib.import_module(f"qwenrt.backends.cuda.kernels.{name}")
        except Exception:  # Gluon, where there is none
            continue
        module.launch = lambda *args, **options: found.append(_warmed(*args, **options))
    for call in list(calls(backend).values())[share::of]:
        call()
    return found


def _warmed(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, pdl: int = False, **constants: Any
) -> Made:
    """Compiles, and launches nothing."""
    began = time.perf_counter()
    if pdl:
        constants["launch_pdl"] = True
    name = str(kernel.fn.__name__)
    try:
        code = kernel.warmup(*args, grid=grid, num_warps=warps, **constants)
        code._init_handles()
    except Exception as error:  # one that cannot be compiled is a finding, not the end
        return Made(name, time.perf_counter() - began, why=f"{type(error).__name__}: {str(error)[:200]}")
    taken = time.perf_counter() - began
    return Made(name, taken, int(code.n_regs), int(code.n_spills), int(code.metadata.shared))


def every(device: str, processes: int | None = None) -> Iterator[Made]:
    """All of them, as they come."""
    count = processes or min(16, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(made_by, device, share, count) for share in range(count)]:
            yield from job.result()
