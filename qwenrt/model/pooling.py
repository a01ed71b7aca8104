"""From the final states of a text's tokens to one vector, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": torch.clone,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}


def pool(states: torch.Tensor, poolings: Sequence[str], skipped: int = 0) -> torch.Tensor:
    """states [n, D] -> float32 [len(poolings) * D]: the vectors of all poolings (config.embedding.POOLINGS), joined.

    The first ``skipped`` of the n tokens, fewer than n, are left out; "weightedmean" counts them all the same.
    """
    kept = states[skipped:].float()
    weights = torch.arange(skipped + 1, len(states) + 1, device=states.device).float()
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "cls": lambda: kept[0],
        "max": lambda: kept.amax(0),
        "mean": lambda: kept.mean(0),
        "mean_sqrt_len_tokens": lambda: kept.sum(0) / len(kept) ** 0.5,
        "weightedmean": lambda: weights @ kept / weights.sum(),
        "lasttoken": lambda: kept[-1],
    }
    return torch.cat([ways[name]() for name in poolings])


def dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [B, K], weight [N, K] -> [B, N], all float32: activation(x weightᵀ + bias) + x residualᵀ."""
    y = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else y + F.linear(x, residual)
