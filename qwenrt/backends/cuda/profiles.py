"""What an architecture of torch's "cuda" devices is like, as data: NVIDIA's, AMD's and Hygon's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.backends.dcu.software import toolkit

_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Profile:
    """One architecture, as torch's properties name it: "sm_90", "gfx936".

    ``wave``: threads that go in step. ``matrix``: it has units for small matrices. ``bfloat16``: it computes in that
    dtype by itself. ``pdl``: a kernel may begin while the one before ends. ``max_threads`` of a block that kernels are
    compiled for. ``graph_sizes``: numbers of sequences whose steps are captured.
    """

    vendor: str  # "nvidia", "amd", "hygon"
    arch: str
    wave: int = 64
    matrix: bool = True
    bfloat16: bool = True
    pdl: bool = False
    max_threads: int = 256
    graph_sizes: tuple[int, ...] = _SIZES


# A K100_AI failed to capture more than 16 sequences in every report; others of Hygon's were not tried with more.
_HYGON_SIZES = (1, 2, 4, 8, 16)
_HYGON = {
    arch: Profile("hygon", arch, matrix=matrix, bfloat16=matrix, graph_sizes=_HYGON_SIZES)
    for arch, matrix in (
        ("gfx906", False),  # Z100, Z100L; the same id as AMD's MI50
        ("gfx926", False),  # K100
        ("gfx928", True),  # K100_AI, K500SM_AI
        ("gfx936", True),  # BW200, BW500SM, BW1000
        ("gfx938", True),  # BW1100
        ("gfx92a", True),
        ("gfx946", True),
    )
}
_SHARED = ("gfx906",)  # ids that AMD has too
_AMD = {"gfx906": Profile("amd", "gfx906", matrix=False, bfloat16=False)} | {
    arch: Profile("amd", arch) for arch in ("gfx908", "gfx90a", "gfx942", "gfx950")
}


def profile_of(device: torch.device) -> Profile:
    """The architecture of a device that torch sees. One that is not in the tables is taken for a plain one of its kind:
    AMD's without matrix units."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        arch, modern = f"sm_{found.major}{found.minor}", found.major >= 8
        return Profile("nvidia", arch, 32, found.major >= 7, modern, found.major >= 9, 1024)
    arch = str(found.gcnArchName).split(":")[0]
    if arch in _HYGON and (arch not in _SHARED or toolkit(torch.__version__) is not None):
        return _HYGON[arch]
    if arch in _AMD:
        return _AMD[arch]
    plain = Profile("amd", arch, _wave(found), matrix=False, bfloat16=False)
    return dataclasses.replace(plain, vendor="hygon", graph_sizes=_HYGON_SIZES) if _is_dtk() else plain


def _wave(properties: Any) -> int:
    return int(getattr(properties, "warp_size", 64))


def _is_dtk() -> bool:
    """A torch of Hygon's: its device is theirs whatever its id."""
    return toolkit(torch.__version__, seen=()) is not None
