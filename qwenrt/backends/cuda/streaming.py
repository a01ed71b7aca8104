"""Linears by kernels/stream.py: which of them, and in what form they want their inputs. They need NVIDIA's sm_80 or
later, and a Triton that has Gluon."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

import torch

from qwenrt.backends.cuda.tables import Tiles, Warps
from qwenrt.ops.types import Packed

if TYPE_CHECKING:
    from qwenrt.backends.cuda.kernels.stream import Normed

DTYPES = (torch.bfloat16, torch.float16)
_ALIGNED = 16  # bytes that a thread loads at once


@functools.cache
def missing() -> str | None:
    """Why kernels in Gluon cannot be made here, or None."""
    try:
        importlib.import_module("qwenrt.backends.cuda.kernels.stream")
    except Exception as error:  # an older Triton has none, or another one
        return f"Gluon cannot be used here ({type(error).__name__}: {str(error)[:120]})"
    return None


def why_not(w: Packed, dtype: torch.dtype) -> str | None:
    """Why inputs in ``dtype`` are not multiplied by ``w`` there, in few words; None where they are."""
    if w.kind not in ("dense", "rows4", "rows8"):
        return f"no kernel for {w.kind}"
    if dtype not in DTYPES:
        return f"no kernel for {str(dtype).removeprefix('torch.')}"
    unit = 64 if w.kind == "dense" else w.group_size
    if w.kind != "dense" and unit < (32 if w.bits == 4 else 16):
        return f"groups of {w.group_size}"
    if w.in_features % unit or w.out_features % 2:
        return f"{w.out_features} outputs of {w.in_features} inputs are not whole pairs of units of {unit}"
    weight = w.data["weight" if w.kind == "dense" else "words"]
    if w.kind == "dense" and weight.dtype != dtype:
        return f"a weight in {str(weight.dtype).removeprefix('torch.')}"
    if not weight.is_contiguous() or (weight.device.type != "meta" and weight.data_ptr() % _ALIGNED):
        return "a weight that does not lie in one piece from a multiple of 16 bytes on"
    return None


def warps(w: Packed, tiles: Tiles) -> Warps:
    """Of a program."""
    return tiles.warps(w.bits if w.kind != "dense" else 16, w.out_features, w.in_features)


def place(w: Packed) -> torch.Tensor | None:
    """Of each input the place where its linear reads it, int32 [K]: the inverse of an act-order; None of none. Kept
    beside the codes."""
    perm = w.data.get("perm")
    if perm is None:
        return None
    if "place" not in w.data:
        w.data["place"] = torch.argsort(perm).to(torch.int32)
    kept: torch.Tensor = w.data["place"]
    return kept


def in_order(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x [T, K] in the order of the codes."""
    perm = w.data.get("perm")
    return x if perm is None else x.index_select(-1, perm)


def normed(
    x: torch.Tensor, norm: torch.Tensor, eps: float, w: Packed, dtype: torch.dtype, tiles: Tiles
) -> Normed:
    """x [T, D] as ``w`` wants it: half of the norm done, in its order."""
    from qwenrt.backends.cuda.kernels import between, stream

    half = between.scaled(x, norm, dtype, stream.HEADROOM[dtype], place(w), tiles.rows)
    return stream.Normed(*half, eps)
