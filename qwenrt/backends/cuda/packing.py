"""Codes as the kernels read them: an output's row lies in one piece, 32 bits at a time.

Word j of a row holds inputs 8j to 8j + 7 (int4) or 4j to 4j + 3 (int8): those with even numbers in its lower half, the
others beside them in the upper, both rising from the lowest bits. So one mask takes two neighbours out of a word, as
tensor cores want them. A group of ``GROUPS`` inputs shares a scale; a file's larger groups are repeated. Behind the
last input stand codes 0 up to the end of its group, which the kernels multiply by 0.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from qwenrt.ops.types import CanonicalWeight, Packed
from qwenrt.ops.weights import code_tensors

KINDS = {4: "rows4", 8: "rows8"}
GROUPS = (8, 16, 32, 64, 128)  # inputs that share a scale, as kernels are made for


def kernel_group(group_size: int, in_features: int) -> int | None:
    """The largest of GROUPS that ends where a file's groups end; None where there is none."""
    if group_size >= in_features:  # one group, which may be cut anywhere
        return next((size for size in GROUPS if size >= in_features), GROUPS[-1])
    return next((size for size in reversed(GROUPS) if group_size % size == 0), None)


def pack(weight: CanonicalWeight, dtype: torch.dtype, device: torch.device) -> Packed | None:
    """Codes [K, N] of a canonical weight, packed on the device; None where no kernel has its groups.

    ``data``: "words" int32 [N, groups * words of a group], "scales" [N, groups] as they were, and where not all zeros
    are the same number ("zero"), "zeros" uint8 (int16 where one is 256) or "offsets" float32 [N, groups]; "perm" int32
    [K] or None.
    """
    codes, scales, zeros = code_tensors(weight)
    inputs, outputs = codes.shape
    group = kernel_group(weight.group_size, inputs)
    if group is None:
        return None
    count = -(-inputs // group)
    rows = F.pad(codes.to(device), (0, 0, 0, count * group - inputs)).t().contiguous()
    rows = in_words(rows, weight.bits)
    shared = torch.arange(count, device=device) * group // weight.group_size

    def by_row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device).index_select(0, shared).t().contiguous()

    data: dict[str, object] = {
        "words": rows,
        "scales": by_row(scales),
        "perm": None if weight.perm is None else weight.perm.to(device, torch.int32),
    }
    if weight.offsets is not None:
        data["offsets"] = by_row(weight.offsets.float())
    elif bool((zeros == zeros[0, 0]).all()):
        data["zero"] = int(zeros[0, 0])
    else:
        data["zeros"] = by_row(zeros.to(torch.uint8 if int(zeros.max()) < 256 else torch.int16))
    bias = None if weight.bias is None else weight.bias.to(device, dtype).contiguous()
    return Packed(KINDS[weight.bits], outputs, inputs, data, bias, bits=weight.bits, group_size=group)


def in_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K], K in whole words -> int32 [N, K * bits / 32]."""
    halves = codes.view(len(codes), -1, 16 // bits, 2).transpose(2, 3)  # [N, words, half, place]
    if bits == 4:
        halves = halves[..., 0::2] | (halves[..., 1::2] << 4)
    return halves.flatten(1).contiguous().view(torch.int32)


def of_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of in_words."""
    halves = words.contiguous().view(torch.uint8).view(len(words), -1, 2, 2)
    if bits == 4:
        halves = torch.stack((halves & 15, halves >> 4), -1).flatten(3)
    return halves.transpose(2, 3).flatten(1)


def unpack(w: Packed) -> CanonicalWeight:
    """The inverse, on the device: the same codes, scales and zeros, in groups of ``w.group_size``."""
    rows, scales = of_words(w.data["words"], w.bits), w.data["scales"]
    zeros = w.data.get("zeros")
    if zeros is None and "zero" in w.data:
        zeros = torch.full_like(scales, w.data["zero"], dtype=torch.int16)
    return CanonicalWeight(
        codes=rows[:, : w.in_features].t().contiguous(),
        scales=scales.t().contiguous(),
        zeros=None if zeros is None else zeros.to(torch.int16).t().contiguous(),
        offsets=w.data["offsets"].t().contiguous() if "offsets" in w.data else None,
        bits=w.bits,
        group_size=w.group_size,
        perm=w.data["perm"],
        bias=w.bias,
    )


def why_not_restored(w: Packed) -> str | None:
    """What is wrong with codes that come from a file, whose shapes the kernels trust; None where nothing is."""
    if w.group_size not in GROUPS or KINDS.get(w.bits) != w.kind:
        return f"{w.kind} has groups of {w.group_size} and {w.bits} bits"
    groups = -(-w.in_features // w.group_size)
    shapes = {
        "words": ((w.out_features, groups * w.group_size * w.bits // 32), (torch.int32,)),
        "scales": ((w.out_features, groups), (torch.float16, torch.bfloat16, torch.float32)),
        "zeros": ((w.out_features, groups), (torch.uint8, torch.int16)),
        "offsets": ((w.out_features, groups), (torch.float32,)),
        "perm": ((w.in_features,), (torch.int32,)),
    }
    for name, (shape, dtypes) in shapes.items():
        tensor = w.data.get(name)
        if tensor is None and name not in ("words", "scales"):
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in dtypes:
            return f"{name} of {w.kind} has not the dtype that its kernel reads"
        if tensor.shape != shape or not tensor.is_contiguous():
            return f"{name} of {w.kind} is not {list(shape)}"
    if sum(name in w.data for name in ("zero", "zeros", "offsets")) != 1:
        return f"{w.kind} has not one of zero, zeros and offsets"
    perm = w.data.get("perm")
    if perm is not None and (int(perm.min()) < 0 or int(perm.max()) >= w.in_features):
        return f"perm of {w.kind} names inputs that there are not"
    if w.bias is not None and w.bias.shape != (w.out_features,):
        return f"bias of {w.kind} is not [{w.out_features}]"
    return None


def in_rows(w: Packed, most: int) -> list[Packed]:
    """The same linear as several with at most so many outputs each; the same memory."""
    if w.out_features <= most:
        return [w]
    parts = []
    for first in range(0, w.out_features, most):
        here = slice(first, min(first + most, w.out_features))
        data = {
            name: value[here] if isinstance(value, torch.Tensor) and name not in ("perm", "place") else value
            for name, value in w.data.items()
        }
        bias = None if w.bias is None else w.bias[here]
        size = here.stop - here.start
        parts.append(dataclasses.replace(w, out_features=size, data=data, bias=bias))
    return parts
