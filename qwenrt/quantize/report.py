"""What quantising did: to each linear, and to what held-out texts say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LinearReport:
    """One linear. ``method``: whose codes it has. ``error``: of its outputs, relative, over the ``tokens`` that
    calibrated it; ``rounding_error`` the same of codes rounded to nearest. ``note``: why it has those where GPTQ was
    asked for."""

    name: str
    method: str
    tokens: int = 0
    error: float | None = None
    rounding_error: float | None = None
    damp: float | None = None
    seconds: float = 0.0
    note: str = ""


@dataclass
class Effect:
    """Over the held-out tokens: the mean negative log likelihood in nats of the source, of it rounded to nearest, and
    of the result; and the KL divergence of the last two from the source."""

    tokens: int = 0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    divergences: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, logits: list[torch.Tensor], targets: torch.Tensor) -> None:
        """``logits`` float32 [T, V] of the three, ``targets`` int64 [T] (below 0: none)."""
        logs = [F.log_softmax(each, dim=-1) for each in logits]
        counted = targets >= 0
        for i, log in enumerate(logs):
            self.losses[i] += float(F.nll_loss(log[counted], targets[counted], reduction="sum"))
        for i, log in enumerate(logs[1:]):
            self.divergences[i] += float(
                F.kl_div(log[counted], logs[0][counted], log_target=True, reduction="sum")
            )
        self.tokens += int(counted.sum())

    def perplexities(self) -> tuple[float, float, float]:
        """Of the source, rounded to nearest, and of the result."""
        source, nearest, result = (math.exp(loss / max(1, self.tokens)) for loss in self.losses)
        return source, nearest, result

    def mean_divergences(self) -> tuple[float, float]:
        """From the source, in nats a token: rounded to nearest, and the result."""
        nearest, result = (total / max(1, self.tokens) for total in self.divergences)
        return nearest, result


@dataclass(frozen=True)
class QuantizeReport:
    """A quantised checkpoint in ``output_dir``. ``perplexity`` and ``divergence`` (KL from the source, nats a token) of
    held-out calibration texts: of the source, of codes rounded to nearest, of the result. Sizes in bytes."""

    output_dir: Path
    linears: tuple[LinearReport, ...]
    calibration_tokens: int
    held_out_tokens: int
    perplexity: dict[str, float]
    divergence: dict[str, float]
    source_bytes: int
    result_bytes: int
    seconds: float

    @property
    def fallbacks(self) -> tuple[LinearReport, ...]:
        """Linears rounded to nearest although GPTQ was asked for."""
        return tuple(linear for linear in self.linears if linear.note)

    @property
    def worst(self) -> tuple[LinearReport, ...]:
        """The three linears with the largest error."""
        known = [linear for linear in self.linears if linear.error is not None]
        return tuple(sorted(known, key=lambda linear: -(linear.error or 0.0))[:3])

    def format(self) -> str:
        """The result in a few lines of text."""
        ppl, kl = self.perplexity, self.divergence
        lines = [
            f"{self.source_bytes / 1e6:.1f} MB -> {self.result_bytes / 1e6:.1f} MB in {self.seconds:.0f} s, "
            f"calibrated on {self.calibration_tokens} tokens: {self.output_dir}",
            f"perplexity on {self.held_out_tokens} tokens that were held out: {ppl['source']:.4g}, rounded to nearest "
            f"{ppl['rounded']:.4g}, now {ppl['result']:.4g}; KL divergence {kl['rounded']:.3g}, now {kl['result']:.3g}",
        ]
        if self.worst:
            each = ", ".join(f"{linear.name} {100 * (linear.error or 0):.1f} %" for linear in self.worst)
            lines.append(f"largest errors of outputs: {each}")
        if self.fallbacks:
            reasons: dict[str, int] = {}
            for linear in self.fallbacks:
                reasons[linear.note] = reasons.get(linear.note, 0) + 1
            said = ", ".join(f"{count} ({note})" for note, count in list(reasons.items())[:4])
            lines.append(f"rounded to nearest: {said}")
        return "\n".join(lines)
