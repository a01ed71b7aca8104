"""What else is installed on the machine, on the same work: torch's own 4-bit product and attention, and transformers,
which is imported here alone, in a process that ends with the phase."""

from __future__ import annotations

import importlib
import time
from typing import Any

import torch
import torch.nn.functional as F

from qwenrt.conformance.gpu import timing
from qwenrt.conformance.gpu.report import Notes

_GROUP, _INNER_TILES = 128, 8
_LAYERS, _HIDDEN, _HEADS, _INNER, _VOCABULARY = (
    24,
    2048,
    16,
    5504,
    151936,
)  # Qwen-1_8B, as transformers' Qwen2
_PROMPT, _TOKENS = 1024, 33


def int4(notes: Notes, device: torch.device, name: str, shape: tuple[int, int], limit: float) -> None:
    """One token by torch's 4-bit product, over copies of the weight that do not fit the cache together."""
    rows, columns = shape
    copies = max(2, (256 << 20) // (rows * columns // 2))
    x = torch.randn(1, columns, device=device, dtype=torch.bfloat16)
    try:
        codes = torch.randint(0, 255, (rows, columns // 2), device=device, dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, _INNER_TILES)
        scales = torch.ones(columns // _GROUP, rows, 2, device=device, dtype=torch.bfloat16)
        weights = [packed.clone() for _ in range(copies)]
        product = torch.ops.aten._weight_int4pack_mm
        graph = timing.graph_of(lambda: [product(x, w, _GROUP, scales) for w in weights])
    except Exception as error:  # not every build has it
        notes.detail["torch's int4"] = f"{type(error).__name__}: {str(error)[:200]}"
        return
    rate = rows * columns // 2 * copies / timing.seconds_of(graph.replay)
    notes.figure(f"{name} int4 by torch, GB/s", rate / 1e9)
    if limit:
        notes.figure(f"{name} int4 by torch, of the bandwidth", rate / limit)


def attention(notes: Notes, device: torch.device, tokens: int) -> None:
    """One token of 7B over ``tokens`` keys by torch's attention, which has them in one piece."""
    shape = (1, 32, tokens, 128)
    q = torch.randn(1, 32, 1, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    graph = timing.graph_of(lambda: F.scaled_dot_product_attention(q, k, v))
    notes.figure(f"attention of one token over {tokens} by torch, us", timing.seconds_of(graph.replay) * 1e6)


def transformers(notes: Notes, device: torch.device, ours: float) -> None:
    """Greedy decoding in bfloat16 by its own loop, beside ``ours`` in tokens a second, 0 where it was not measured."""
    try:
        library: Any = importlib.import_module("transformers")
    except Exception as error:
        notes.detail["transformers"] = f"{type(error).__name__}: {str(error)[:120]}"
        return
    config = library.Qwen2Config(
        vocab_size=_VOCABULARY, hidden_size=_HIDDEN, intermediate_size=_INNER, num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS, num_key_value_heads=_HEADS,
    )  # fmt: skip
    with torch.device(device):
        model = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    notes.detail["transformers"] = str(library.__version__)
    taken: dict[int, float] = {}
    for tokens in (_TOKENS, 1, _TOKENS):
        ids = torch.randint(0, 1000, (1, _PROMPT), device=device)
        torch.cuda.synchronize()
        at = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        taken[tokens] = time.perf_counter() - at
    rate = (_TOKENS - 1) / (taken[_TOKENS] - taken[1])
    notes.figure(f"Qwen-1_8B bfloat16, 1 at {_PROMPT} tokens by transformers: tokens/s", rate)
    if ours:
        notes.figure("qwenrt's tokens beside transformers'", ours / rate)
