"""A whole stack of decoder layers in one call of csrc/: between two ops of a step no Python runs."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable

import torch

from qwenrt.backends.cpu import attention
from qwenrt.backends.cpu.attention import Cache, Sequences, cache_struct
from qwenrt.ops.types import LayerKV, LayerWeights, Packed, StepInputs


class Linear(ctypes.Structure):
    """QwenrtLinear of csrc/qwenrt_decoder.h."""

    _fields_ = (
        ("quant", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("is_half", ctypes.c_int32),
        ("activations", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """QwenrtLayer of csrc/qwenrt_decoder.h."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class Step(ctypes.Structure):
    """QwenrtStep of csrc/qwenrt_decoder.h."""

    _fields_ = (
        ("sequences", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_scale", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


LinearOf = Callable[[Packed], "Linear | None"]
Run = Callable[["ctypes.Array[Layer]", "ctypes.Array[Cache]", Step, torch.Tensor, torch.Tensor], bool]


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layer(w: LayerWeights, linear_of: LinearOf) -> Layer | None:
    if not isinstance(w.mlp, tuple):
        return None
    linears = [linear_of(packed) for packed in (w.qkv_proj, w.o_proj, *w.mlp)]
    if any(linear is None for linear in linears):
        return None
    q_norm, k_norm, _ = w.qk_norms or (None, None, w.eps)
    norms = (_address(norm) for norm in (w.input_norm, w.post_norm, q_norm, k_norm))
    return Layer(*norms, *linears, *w.heads, w.window, w.eps, w.scale)


class DecoderStack:
    """Layers as the kernel is told of them. Keeps what they point at alive."""

    def __init__(self, layers: list[LayerWeights], structs: list[Layer], run: Run) -> None:
        self._weights, self._run = layers, run
        self._layers = (Layer * len(structs))(*structs)
        self._held: tuple[list[LayerKV], ctypes.Array[Cache]] = ([], (Cache * 0)())

    @classmethod
    def of(cls, layers: list[LayerWeights], linear_of: LinearOf, run: Run) -> DecoderStack | None:
        """None where a layer has a part that the kernel knows nothing of."""
        structs = [struct for w in layers if (struct := _layer(w, linear_of)) is not None]
        return cls(layers, structs, run) if structs and len(structs) == len(layers) else None

    def __call__(self, x: torch.Tensor, step: StepInputs, kv: list[LayerKV]) -> torch.Tensor | None:
        """x float32 [T, D] -> [T, D]; None for a step that the seams must serve."""
        plan = step.plan
        division = attention.divide(plan)
        if division is None or division.others or not division.native.count or plan.slots is None:
            return None
        if x.requires_grad or kv[0].k.dtype not in (torch.float32, torch.uint8):
            return None
        held, caches = self._held
        if len(held) != len(kv) or not all(map(operator.is_, held, kv)):
            caches = (Cache * len(kv))(*(cache_struct(layer) for layer in kv))
            self._held = list(kv), caches
        x, out = x.contiguous(), torch.empty(x.shape)
        struct = Step(
            ctypes.addressof(division.native),
            step.cos.data_ptr(),
            step.sin.data_ptr(),
            _address(step.q_scale),
            plan.slots.data_ptr(),
            step.cos.shape[1],
            x.shape[0],
        )
        return out if self._run(self._layers, caches, struct, x, out) else None


__all__ = ["DecoderStack", "Layer", "Linear", "Sequences", "Step"]
