"""What the inputs of a linear are like: the sum of x x^T over calibration tokens."""

from __future__ import annotations

import torch

# A token whose norm is more than so many times the median weighs as if its norm were that. The first token of some
# models has inputs a thousand times those of all others; without a cap only its outputs would be kept.
CAP = 4.0
_TOGETHER = 512  # tokens whose median is taken, and which are added at once


class Hessian:
    """H [K, K] float32 = sum of w x x^T, w = min(1, (CAP median / norm of x)^2), over all inputs x that were added.

    ``cap`` 0 weighs all alike.
    """

    def __init__(self, inputs: int, cap: float = CAP) -> None:
        self.matrix = torch.zeros(inputs, inputs)
        self.tokens = 0
        self._cap = cap
        self._waiting: list[torch.Tensor] = []
        self._num_waiting = 0

    def add(self, x: torch.Tensor) -> None:
        """x [T, K]: inputs of T tokens."""
        self._waiting.append(x.detach().float().cpu().clone())
        self._num_waiting += len(x)
        if self._num_waiting >= _TOGETHER:
            self._fold()

    def finished(self) -> torch.Tensor:
        """H, with all that was added."""
        self._fold()
        return self.matrix

    def _fold(self) -> None:
        if not self._num_waiting:
            return
        x = torch.cat(self._waiting)
        self._waiting, self._num_waiting = [], 0
        self.tokens += len(x)
        if self._cap:
            norms = x.norm(dim=1)
            limit = self._cap * norms.median()
            if float(limit) > 0:
                x *= (limit / norms.clamp(min=1e-30)).clamp(max=1.0)[:, None]
        self.matrix.addmm_(x.t(), x)
