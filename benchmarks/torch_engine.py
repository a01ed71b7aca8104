"""Plain torch under measurement: the same network, eager, weights and activations in bfloat16."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.shapes import config_of
from benchmarks.timing import Stopwatch

_ROOM = 4608  # tokens the cache holds


class TorchEngine:
    """F.linear, scaled_dot_product_attention and a cache of keys and values: what a short script would do."""

    def __init__(self, shape: str, settings: dict[str, Any], threads: int) -> None:
        assert not settings, settings
        torch.set_num_threads(threads)
        c = self.config = config_of(shape)
        linears = {
            "qkv": (3 * c.hidden_size, c.hidden_size),
            "o": (c.hidden_size, c.hidden_size),
            "gate_up": (2 * c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }
        self.layers = [{k: _random(*dims) for k, dims in linears.items()} for _ in range(c.num_layers)]
        self.bias = torch.zeros(3 * c.hidden_size, dtype=torch.bfloat16)
        self.norm = torch.ones(c.hidden_size, dtype=torch.bfloat16)
        self.embed, self.head = (_random(c.vocab_size, c.hidden_size) for _ in range(2))
        self.cache = torch.zeros(c.num_layers, 2, c.num_heads, _ROOM, c.head_dim, dtype=torch.bfloat16)
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(_ROOM), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.about = {"version": torch.__version__}
        self._source = random.Random(0)

    def prefill(self, tokens: int) -> Stopwatch:
        ids = self._ids(tokens)
        with Stopwatch() as watch:
            self._forward(ids, 0)
        return watch

    def decode(self, context: int, new_tokens: int, batch: int) -> Stopwatch:
        assert batch == 1
        token = self._forward(self._ids(context), 0)
        with Stopwatch() as watch:
            for step in range(new_tokens):
                token = self._forward(token, context + step)
        return watch

    def _ids(self, tokens: int) -> torch.Tensor:
        return torch.tensor([self._source.randrange(self.config.vocab_size) for _ in range(tokens)])

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """ids int64 [T] at positions from ``start`` -> the likeliest next token, int64 [1]."""
        c, tokens = self.config, len(ids)
        end = start + tokens
        cos, sin = self.cos[start:end], self.sin[start:end]
        x = self.embed[ids]
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = F.linear(self._normed(x), layer["qkv"], self.bias)
            q, k, v = qkv.view(tokens, 3, c.num_heads, c.head_dim).permute(1, 2, 0, 3)
            keys[:, start:end], values[:, start:end] = _rotated(k, cos, sin), v
            attended = F.scaled_dot_product_attention(
                _rotated(q, cos, sin)[None], keys[None, :, :end], values[None, :, :end], is_causal=tokens > 1
            )
            x = x + F.linear(attended[0].transpose(0, 1).reshape(tokens, -1), layer["o"])
            gate, up = F.linear(self._normed(x), layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(self._normed(x[-1:]), self.head).argmax(-1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps)


def _random(rows: int, columns: int) -> torch.Tensor:
    """Random weights [rows, columns]; rows repeat, which makes no difference to a kernel's speed."""
    block = (torch.randn(min(rows, 512), columns) / columns**0.5).bfloat16()
    return block.repeat(-(-rows // 512), 1)[:rows].contiguous()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
