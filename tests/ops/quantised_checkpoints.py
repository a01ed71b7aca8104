"""Tiny GPTQ, AWQ and FP8 state dicts made from a dense one, and the matrices they stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwenrt.ops import awq, gptq, quantization
from qwenrt.ops.weights import dequantize

State = dict[str, torch.Tensor]


def awq_state(dense: State, names: list[str], group_size: int) -> tuple[State, State]:
    """(state, dequantised): ``dense`` with the modules ``names`` (without ".weight") as AWQ stores them.

    ``dequantised`` holds, under "<name>.weight", the float32 matrices that these bits mean. Biases and all other
    tensors stay as they are. Each module's outputs must be a multiple of 8, its inputs of ``group_size`` (-1: one
    group).
    """
    state, dequantised = dict(dense), {}
    for name in names:
        weight = quantization.quantize_dense(state.pop(f"{name}.weight"), 4, group_size, name=name)
        tensors = awq.pack_awq(weight)
        state |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
        zeros, scales = (
            grid.float().repeat_interleave(weight.group_size, 0) for grid in (weight.zeros, tensors["scales"])
        )
        dequantised[f"{name}.weight"] = ((weight.codes - zeros) * scales).t().contiguous()
    return state, dequantised


def gptq_config(bits: int, group_size: int) -> dict[str, Any]:
    """quantization_config of such a checkpoint's config.json."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": False, "sym": True}


def awq_config(group_size: int) -> dict[str, Any]:
    """quantization_config of such a checkpoint's config.json."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def gptq_state(
    dense: dict[str, torch.Tensor], names: list[str], bits: int, group_size: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors AutoGPTQ writes, biases in every module, and the matrices they stand for."""
    state, exact = dict(dense), dict(dense)
    for name in names:
        bias = dense.get(f"{name}.bias")
        weight = quantization.quantize_dense(state.pop(f"{name}.weight"), bits, group_size, bias, sym=True)
        state |= {f"{name}.{kind}": tensor for kind, tensor in gptq.pack_gptq(weight).items()}
        stored = state[f"{name}.scales"]
        exact[f"{name}.weight"] = dequantize(replace(weight, scales=stored), torch.float32)
        if bias is not None:
            exact[f"{name}.bias"] = bias.half().float()
    return state, exact


def fp8_state(
    dense: State, names: list[str], block: tuple[int, int] | None = (128, 128)
) -> tuple[State, State]:
    """(state, dequantised) as of awq_state, with each module as float8_e4m3fn "<name>.weight" and float32
    "<name>.weight_scale_inv", one scale a block, or without ``block`` "<name>.weight_scale" [N, 1], one a row.

    ``dequantised`` is the float32 product; it is rounded once more where weights are kept in another dtype.
    """
    state, dequantised = dict(dense), {}
    for name in names:
        weight = state[f"{name}.weight"].float()
        rows, columns = weight.shape
        high, wide = block or (1, columns)
        padded = torch.nn.functional.pad(weight.abs(), (0, -columns % wide, 0, -rows % high))
        largest = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).amax((1, 3))
        scale = (largest / 448).clamp(min=1e-12)
        spread = scale.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        values = (weight / spread).to(torch.float8_e4m3fn)
        state[f"{name}.weight"] = values
        state[f"{name}.weight_scale" if block is None else f"{name}.weight_scale_inv"] = scale
        dequantised[f"{name}.weight"] = values.float() * spread
    return state, dequantised


def fp8_config(block: tuple[int, int] | None = (128, 128)) -> dict[str, Any]:
    """quantization_config of such a checkpoint's config.json."""
    if block is not None:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
            "modules_to_not_convert": ["lm_head"],
        }
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


class Allocations(TorchDispatchMode):
    """While entered, remembers the bytes of the largest tensor that an op made, per dtype; views count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in given:
            self.largest[result.dtype] = max(self.largest.get(result.dtype, 0), result.nbytes)
        return result
