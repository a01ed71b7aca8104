"""Attention of csrc/ over the paged cache; where there is none, the definition serves."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from qwenrt.ops import reference
from qwenrt.ops.steps import LayerKV, StepPlan

HEAD_DIMS = tuple(range(8, 257, 8))


class Sequences(ctypes.Structure):
    """QwenrtSequences of csrc/abi/qwenrt_layer.h."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("first_tokens", ctypes.c_void_p),
        ("q_lens", ctypes.c_void_p),
        ("kv_lens", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
    )


class Cache(ctypes.Structure):
    """QwenrtCache of csrc/abi/qwenrt_layer.h."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("k_zero", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("v_zero", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("k_offset", ctypes.c_void_p),
        ("k_factor", ctypes.c_void_p),
        ("rounded", ctypes.c_int64),
    )


Attend = Callable[[Sequences, Cache, torch.Tensor, torch.Tensor, float, int], None]


def cache_struct(kv: LayerKV, rounded: bool = False) -> Cache:
    """Where a layer's cache lies, as the kernels are told; ``rounded``: queries of 16 tokens or fewer, and their
    weights, may be rounded to 16 bits beside its codes."""
    _, block_size, num_kv_heads, head_dim = kv.k.shape
    sides = (kv.k_scale, kv.k_zero, kv.v_scale, kv.v_zero)
    sizes = (block_size, num_kv_heads, head_dim)
    return Cache(
        kv.k.data_ptr(),
        kv.v.data_ptr(),
        *map(address, sides),
        *sizes,
        *map(address, (kv.k_offset, kv.k_factor)),
        rounded,
    )


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies, as ctypes wants it."""
    return None if tensor is None else tensor.data_ptr()


def sequences_struct(plan: StepPlan) -> Sequences:
    """A step's sequences as the kernels are told; it points into ``plan.ragged``."""
    ragged = plan.ragged
    arrays = ragged.first_tokens, ragged.q_lens, ragged.kv_lens, ragged.first_blocks, ragged.blocks
    return Sequences(len(plan.q_lens), *(numbers.buffer_info()[0] for numbers in arrays))


def attention(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv: LayerKV | None,
    plan: StepPlan,
    scale: float,
    window: int,
    rounded: bool,
) -> torch.Tensor:
    """As reference.attention; ``attend`` is the kernel, ``rounded`` as of cache_struct."""
    wanted = q.dtype if kv is None or not kv.quantized else torch.uint8
    if kv is None or q.requires_grad or kv.k.dtype != wanted or plan.slots is None:
        return reference.attention(q, k, v, kv, plan, scale, window)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    out = torch.empty(q.shape)
    attend(sequences_struct(plan), cache_struct(kv, rounded), q, out, scale, window)
    return out
