"""Norm, silu, gates, and rotary with its store in csrc/: one call each where torch needs several; not for training."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from qwenrt.backends.cpu.attention import Cache, cache_struct
from qwenrt.ops.steps import DecodePlan, LayerKV, StepPlan


class Rotary(ctypes.Structure):
    """QwenrtRotary of csrc/abi/qwenrt_layer.h."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("qk", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("rotary_dim", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("gated", ctypes.c_int32),
    )


Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
RotaryStore = Callable[[Rotary, Cache | None, int], None]


def served(*tensors: torch.Tensor) -> bool:
    """Whether the kernels may have these: float32, and no gradient is to flow back."""
    recorded = torch.is_grad_enabled()
    return all(x.dtype == torch.float32 and not (recorded and x.requires_grad) for x in tensors)


def gate_output(kernel: Gate, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As Backend.gate_output, both float32."""
    return kernel(attended.contiguous(), gate if gate.stride(2) == 1 else gate.contiguous())


def rotary_store_kv(
    rotary_store: RotaryStore,
    qkv: torch.Tensor,
    heads: tuple[int, int, int],
    qk_norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: LayerKV | None,
    plan: StepPlan | DecodePlan,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As Backend.rotary_store_kv, qkv float32; ``rotary_store`` is the kernel."""
    num_heads, num_kv_heads, head_dim = heads
    tokens = qkv.shape[0]
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    q_norm, k_norm, eps = qk_norms if qk_norms is not None else (None, None, 0.0)
    qk = torch.empty(tokens, num_heads + num_kv_heads, head_dim)
    store = kv is not None and plan.slots is not None
    rotary = Rotary(
        qkv.data_ptr(),
        qk.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        None if q_scale is None else q_scale.data_ptr(),
        plan.slots.data_ptr() if store and plan.slots is not None else None,
        *heads,
        cos.shape[1],
        eps,
    )
    rotary_store(rotary, cache_struct(kv) if store and kv is not None else None, tokens)
    q, k = qk.split_with_sizes((num_heads, num_kv_heads), dim=1)
    v = qkv.view(tokens, num_heads + 2 * num_kv_heads, head_dim)[:, num_heads + num_kv_heads :]
    return q, k, v
