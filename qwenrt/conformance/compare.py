"""Results beside their definitions, and inputs as a caller may hand them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from qwenrt.conformance.bounds import Near, floor

CONTIGUOUS, ROWS_APART, TRANSPOSED = "contiguous", "rows apart", "transposed"
LAYOUTS = (CONTIGUOUS, ROWS_APART, TRANSPOSED)


@dataclass
class Finding:
    """What was seen of one case on one backend. ``error`` and ``bound``: those of the element that used up most of what
    is allowed, relative to the largest value of its result; ``complaints``: what is wrong, in words."""

    error: float = 0.0
    bound: float = 0.0
    complaints: list[str] = field(default_factory=list)
    served: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.error / self.bound if self.bound else float(self.error > 0)

    @property
    def ok(self) -> bool:
        return not self.complaints

    def expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.complaints.append(complaint)

    def near(self, what: str, got: torch.Tensor, wanted: Near, dtype: torch.dtype) -> None:
        """``got`` has this dtype, the shape, is finite where its definition is, and no further from it than allowed."""
        if got.dtype != dtype or got.shape != wanted.value.shape:
            told = f"{list(got.shape)} {got.dtype}, not {list(wanted.value.shape)} {dtype}"
            self.complaints.append(f"{what} is {told}")
            return
        if not got.numel():
            return
        got64, value = got.detach().cpu().double(), wanted.value
        finite = value.isfinite()
        self.expect(bool((got64.isfinite() == finite).all()), f"{what} is finite elsewhere than defined")
        error = (got64 - value).abs()
        allowed = wanted.error + 4 * floor(dtype)
        share = torch.where(finite & got64.isfinite(), error / allowed, 0.0)
        place = int(share.argmax())
        worst, size = float(share.flatten()[place]), float(value[finite].abs().max()) if finite.any() else 1.0
        size = size or 1.0
        found = float(error.flatten()[place]) / size if worst else 0.0
        bound = float(allowed.flatten()[place]) / size
        if worst >= self.share and (worst > 0 or not self.bound):
            self.error, self.bound = found, bound
        if worst > 1:
            self.complaints.append(f"{what} is off by {found:.2g}, where {bound:.2g} is allowed")

    def same(self, what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
        """Bit for bit, NaN included."""
        self.expect(_same(got, wanted), f"{what} differs")


class Inputs:
    """Tensors as they were before a call, and what lies between their rows; `unchanged` afterwards tells which were
    written to."""

    def __init__(self, **tensors: torch.Tensor | None) -> None:
        whole = {name: x if x._base is None else x._base for name, x in tensors.items() if x is not None}
        self._kept = {name: (x, x.clone()) for name, x in whole.items()}

    def unchanged(self, finding: Finding) -> None:
        for name, (now, before) in self._kept.items():
            finding.expect(_same(now, before), f"the call wrote to {name}")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a.cpu(), b.cpu())
    return torch.equal(a.cpu().nan_to_num(0.123), b.cpu().nan_to_num(0.123)) and torch.equal(
        a.isnan().cpu(), b.isnan().cpu()
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in memory of another layout, with NaN between rows that are apart."""
    if layout == ROWS_APART:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), torch.nan)
        wide[..., 3 : 3 + x.shape[-1]] = x
        return wide[..., 3 : 3 + x.shape[-1]]
    if layout == TRANSPOSED:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()


def last_rows(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """The last ``tokens`` rows; a call with fewer tokens has other code, and must give each of them the same."""
    return x[x.shape[0] - tokens :]


def named(names: Iterable[tuple[str, bool, str]]) -> str:
    """Which of an op's parts have kernels of their own; the reasons of those that have not."""
    parts = list(names)
    if all(native for _, native, _ in parts):
        return "own"
    whys = sorted({why for _, native, why in parts if not native and why}) or ["no kernel"]
    own = [op for op, native, _ in parts if native]
    return (f"own {' and '.join(own)}; " if own else "") + "definition: " + ", ".join(whys)
