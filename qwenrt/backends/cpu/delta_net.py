"""Layers of linear attention in csrc/, over the states of a step's sequences; without states the definition serves."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable

import torch

from qwenrt.backends.cpu.attention import Sequences, sequences_struct
from qwenrt.ops.steps import LayerState, StepPlan
from qwenrt.ops.types import DeltaWeights

_MOST_DIM, _TAPS = 256, range(2, 9)  # of a head, and of the convolution


class DeltaNet(ctypes.Structure):
    """QwenrtDeltaNet of csrc/abi/qwenrt_layer.h."""

    _fields_ = (
        ("projected", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("conv", ctypes.c_void_p),
        ("log_decay", ctypes.c_void_p),
        ("decay_bias", ctypes.c_void_p),
        ("out_norm", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("conv_states", ctypes.c_void_p),
        ("delta_states", ctypes.c_void_p),
        ("mixed", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("key_heads", ctypes.c_int64),
        ("value_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("tiled", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("reserved", ctypes.c_float),
    )


Kernel = Callable[[DeltaNet, Sequences], None]


def serves(w: DeltaWeights) -> bool:
    """Whether the kernel knows heads of these sizes."""
    _, _, key_dim, value_dim = w.heads
    return key_dim <= _MOST_DIM and value_dim <= _MOST_DIM and value_dim % 8 == 0 and w.conv.shape[0] in _TAPS


def net_struct(w: DeltaWeights, eps: float, state: LayerState) -> DeltaNet:
    """Of a layer's sizes, weights and states, which must outlive it; what a step gives and takes is left out."""
    fields = dict(zip(("key_heads", "value_heads", "key_dim", "value_dim"), w.heads, strict=True))
    return DeltaNet(
        conv=w.conv.data_ptr(),
        log_decay=w.log_decay.data_ptr(),
        decay_bias=w.decay_bias.data_ptr(),
        out_norm=w.out_norm.data_ptr(),
        conv_states=state.conv.data_ptr(),
        delta_states=state.delta.data_ptr(),
        taps=w.conv.shape[0],
        tiled=w.tiled,
        eps=eps,
        **fields,
    )


def delta_net(
    kernel: Kernel,
    projected: torch.Tensor,
    rates: torch.Tensor,
    w: DeltaWeights,
    eps: float,
    state: LayerState,
    plan: StepPlan,
) -> torch.Tensor:
    """As Backend.delta_net, all float32, with states."""
    _, value_heads, _, value_dim = w.heads
    tokens, slots = projected.shape[0], array("q", plan.state_slots)
    out, mixed = torch.empty(tokens, value_heads * value_dim), torch.empty(tokens, w.conv.shape[1])
    projected, rates, net = projected.contiguous(), rates.contiguous(), net_struct(w, eps, state)
    net.projected, net.rates, net.slots = projected.data_ptr(), rates.data_ptr(), slots.buffer_info()[0]
    net.mixed, net.out = mixed.data_ptr(), out.data_ptr()
    kernel(net, sequences_struct(plan))
    return out
