"""Random weights in the place of a checkpoint's: benchmarks of a released shape without a download."""

from __future__ import annotations

import dataclasses
import math

import torch

from qwenrt.backends import selfcheck
from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.config.layers import is_wide
from qwenrt.config.quant import rounded_group
from qwenrt.loader.weights import QUANTIZE_BITS, bits_of, quantize_bits
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import CanonicalWeight

_ROWS = 512  # that are random; a larger matrix repeats them, which makes no difference to a kernel's speed


def fill_with_random_weights(
    model: Qwen,
    config: ModelConfig,
    backend: Backend,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    quantize_head: str | None = None,
) -> None:
    """Give every parameter of ``model`` random values, packed as `load_weights` packs those of a checkpoint in
    bfloat16."""
    bits, head_bits = quantize_bits(quantize, config), QUANTIZE_BITS.get(quantize_head or "")
    for name, dims in model.tensor_specs.items():
        tensor = torch.ones(dims) if len(dims) == 1 else random_rows(dims[0], math.prod(dims[1:]), 16).dense
        assert tensor is not None
        kept = backend.weight_dtype("bfloat16", dtype) if name == "embed_tokens" else dtype
        kept = torch.float32 if is_wide(config, name) else kept
        model.set_tensor(name, tensor.view(dims).to(backend.device, kept))
    made: dict[tuple[int, int, int], CanonicalWeight] = {}  # the last two: experts are many and of one shape
    for name, spec in model.linear_specs.items():
        own = bits_of(spec, bits, head_bits) or 16
        shape = (spec.out_features, spec.in_features, own)
        if shape not in made:
            if len(made) > 1:
                made.clear()
            made[shape] = random_rows(*shape)
        weight = made[shape]
        if name == "lm_head" and config.tie_word_embeddings and own == 16:
            weight = CanonicalWeight(dense=model.embed_tokens, shared=True)
        bias = torch.zeros(spec.out_features) if spec.bias else None
        model.set_linear(name, backend.pack_linear(dataclasses.replace(weight, bias=bias), dtype))


def random_rows(rows: int, columns: int, bits: int) -> CanonicalWeight:
    """A random weight [rows, columns] as a checkpoint would hold it: bfloat16 where ``bits`` is 16, else codes."""
    block = selfcheck.random_weight(min(rows, _ROWS), columns, bits, rounded_group(bits), seed=rows)
    times = -(-rows // _ROWS)
    if block.dense is not None:
        return CanonicalWeight(dense=block.dense.bfloat16().repeat(times, 1)[:rows])
    codes, scales, zeros = (
        tensor.repeat(1, times)[:, :rows].contiguous()
        for tensor in (block.codes, block.scales, block.zeros)
        if tensor is not None
    )
    return dataclasses.replace(block, codes=codes, scales=scales, zeros=zeros)
