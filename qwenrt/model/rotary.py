"""Rotary tables with Qwen-1's dynamic NTK, and LogN: what a token's position does to its query and key."""

from __future__ import annotations

import math

import torch

from qwenrt.config import ModelConfig


def ntk_alpha(length: int, config: ModelConfig) -> int:
    """The NTK factor of a prompt of ``length`` tokens: 1 up to the training length S, then 3 up to 2S, 7 up to
    4S, 15 up to 8S (an exact power belongs to the lower step).

    alpha = max(2 ** ceil(log2(n / S) + 1) - 1, 1), counted in integers. It is chosen from the whole prompt and
    kept for the life of the sequence: cached keys were rotated with it.
    """
    if not config.use_dynamic_ntk or length <= config.train_length:
        return 1
    doublings = (-(-length // config.train_length) - 1).bit_length()
    return int(2 ** (doublings + 1) - 1)


class RotaryTables:
    """cos and sin per NTK factor, grown on demand: [positions, rotary_dim] float32, both halves alike."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._dim, self._theta, self._device = config.rotary_dim, config.rope_theta, device
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(
        self, positions: torch.Tensor, spans: list[tuple[int, int]], longest: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [T, rotary_dim] of flat ``positions`` (int64 [T]); ``spans``: (number of tokens, alpha) of each
        sequence in order; ``longest``: one more than the largest position."""
        alphas = {alpha for _, alpha in spans}
        if len(alphas) == 1:
            cos, sin = self._table(alphas.pop(), longest)
            return cos.index_select(0, positions), sin.index_select(0, positions)
        parts, start = [], 0
        for count, alpha in spans:
            cos, sin = self._table(alpha, longest)
            here = positions[start : start + count]
            parts.append((cos.index_select(0, here), sin.index_select(0, here)))
            start += count
        return torch.cat([c for c, _ in parts]), torch.cat([s for _, s in parts])

    def _table(self, alpha: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """base' = base * alpha ** (dim / (dim - 2)); inverse frequencies, angles, cos and sin in float32."""
        table = self._tables.get(alpha)
        if table is None or table[0].shape[0] < length:
            length = max(256, 1 << (length - 1).bit_length())
            base = self._theta * alpha ** (self._dim / (self._dim - 2))
            exponent = torch.arange(0, self._dim, 2, dtype=torch.float32) / self._dim
            angles = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / base**exponent)
            angles = torch.cat((angles, angles), dim=-1)
            table = angles.cos().to(self._device), angles.sin().to(self._device)
            self._tables[alpha] = table
        return table


def logn_scale(positions: torch.Tensor, config: ModelConfig) -> torch.Tensor | None:
    """What LogN multiplies the query at each position by: log_S(p + 1) beyond the training length S, else 1.

    ``positions`` int64 [T] on the host (computed in float64) -> float32 [T], or None where LogN is off.
    """
    if not config.use_logn_attn:
        return None
    count = (positions + 1).double()
    return (count.log() / math.log(config.train_length)).clamp_(min=1.0).float()
