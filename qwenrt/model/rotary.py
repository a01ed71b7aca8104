"""Rotary tables with Qwen-1's dynamic NTK, and LogN: what a token's position does to its query and key."""

from __future__ import annotations

import math

import torch

from qwenrt.config import ModelConfig, YarnConfig


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
        self._dim, self._theta, self._yarn = config.rotary_dim, config.rope_theta, config.yarn
        self._device = device
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(self, spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [T, rotary_dim] of each sequence's positions in turn; ``spans``: (first position, one after the
        last, alpha) of each. Those of a single sequence are not copied."""
        alphas = {alpha for _, _, alpha in spans}
        if len(spans) > 1 and len(alphas) == 1:
            cos, sin = self._table(alphas.pop(), max(end for _, end, _ in spans))
            positions = torch.tensor(
                [p for start, end, _ in spans for p in range(start, end)], dtype=torch.int64
            )
            positions = positions.to(self._device)
            return cos.index_select(0, positions), sin.index_select(0, positions)
        parts = []
        for start, end, alpha in spans or [(0, 0, 1)]:
            cos, sin = self._table(alpha, max(end, 1))
            parts.append((cos[start:end], sin[start:end]))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([c for c, _ in parts]), torch.cat([s for _, s in parts])

    def _table(self, alpha: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._tables.get(alpha)
        if table is None or table[0].shape[0] < length:
            length = max(256, 1 << (length - 1).bit_length())
            self._tables[alpha] = table = self.turns(torch.arange(length), alpha)
        return table

    def turns(self, positions: torch.Tensor, alpha: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [P, rotary_dim] of any positions [P], made anew.

        base' = base * alpha ** (dim / (dim - 2)); inverse frequencies, angles, cos and sin in float32."""
        base = self._theta * alpha ** (self._dim / (self._dim - 2))
        exponent = torch.arange(0, self._dim, 2, dtype=torch.float32) / self._dim
        inv_freq, factor = 1.0 / base**exponent, 1.0
        if self._yarn is not None:
            inv_freq, factor = yarn_frequencies(inv_freq, base, self._yarn), self._yarn.attention_factor
        angles = torch.outer(positions.float(), inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(self._device), (angles.sin() * factor).to(self._device)


def yarn_frequencies(inv_freq: torch.Tensor, theta: float, yarn: YarnConfig) -> torch.Tensor:
    """Plain inverse frequencies [dim / 2] -> those of YaRN (arXiv 2309.00071, section 3.2).

    Pair j turns N * inv_freq[j] / 2 pi times within the original length N. From beta_fast turns on a pair is kept,
    up to beta_slow turns it is slowed by ``factor``; between the pairs where these fall the two are blended.
    """
    dim = 2 * inv_freq.shape[0]

    def pair(turns: float) -> float:
        return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inv_freq / yarn.factor * slowed + inv_freq * (1 - slowed)


def logn_scale(positions: torch.Tensor, config: ModelConfig) -> torch.Tensor | None:
    """What LogN multiplies the query at each position by: log_S(p + 1) beyond the training length S, else 1.

    ``positions`` int64 [T] on the host (computed in float64) -> float32 [T], or None where LogN is off.
    """
    if not config.use_logn_attn:
        return None
    count = (positions + 1).double()
    return (count.log() / math.log(config.train_length)).clamp_(min=1.0).float()
