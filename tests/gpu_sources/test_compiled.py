"""Kernels in Triton, compiled for GPUs that are not here: that they can be, that no register is spilt, and that weights
and keys are loaded 128 bits at a time. What no compiler shows is how fast they are, and whether they race."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenrt.backends.cuda import packing
from qwenrt.backends.cuda.overrides import TritonBackend
from qwenrt.backends.cuda.tables import TILES
from qwenrt.conformance.gpu import compiling
from qwenrt.ops.steps import DecodePlan, LayerKV
from qwenrt.ops.types import Packed

pytestmark = pytest.mark.gpu_sources
META, F16, BF16 = torch.device("meta"), torch.float16, torch.bfloat16


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def dense(n: int, k: int, dtype: torch.dtype) -> Packed:
    return Packed("dense", n, k, {"weight": empty(n, k, dtype=dtype)}, empty(n, dtype=dtype))


def codes(n: int, k: int, bits: int, group: int = 128, perm: bool = False, offsets: bool = False) -> Packed:
    groups = k // group
    data: dict[str, Any] = {
        "words": empty(n, k * bits // 32, dtype=torch.int32),
        "scales": empty(n, groups, dtype=F16),
        "perm": empty(k, dtype=torch.int32) if perm else None,
        "offsets" if offsets else "zeros": empty(n, groups, dtype=torch.float32 if offsets else torch.uint8),
    }
    return Packed(packing.KINDS[bits], n, k, data, None, bits=bits, group_size=group)


def cache(kv_heads: int, head_dim: int, dtype: torch.dtype, int8: bool) -> LayerKV:
    shape = (64, 16, kv_heads, head_dim)
    if not int8:
        return LayerKV(empty(*shape, dtype=dtype), empty(*shape, dtype=dtype))
    sides = [empty(*shape[:3], dtype=torch.float32) for _ in range(4)]
    return LayerKV(empty(*shape, dtype=torch.uint8), empty(*shape, dtype=torch.uint8), *sides)


def plan(rows: int) -> DecodePlan:
    numbers = [empty(*shape, dtype=torch.int64) for shape in ((rows,), (rows, 128), (rows,))]
    return DecodePlan(*numbers)


def attend(
    b: TritonBackend, dtype: torch.dtype, heads: tuple[int, int, int], int8: bool = False, window: int = 0
) -> Any:
    q = empty(1, heads[0], heads[2], dtype=dtype)
    return b.decode_attention(q, cache(*heads[1:], dtype, int8), plan(1), 0.1, window)


def rotate(b: TritonBackend, dtype: torch.dtype, heads: tuple[int, int, int], int8: bool) -> Any:
    qkv = empty(2, (heads[0] + 2 * heads[1]) * heads[2], dtype=dtype)
    norms = None if int8 else (empty(heads[2], dtype=dtype), empty(heads[2], dtype=dtype), 1e-6)
    turn, log_n = empty(2, heads[2], dtype=torch.float32), empty(2, dtype=torch.float32) if int8 else None
    return b.rotary_store_kv(qkv, heads, norms, turn, turn, log_n, cache(*heads[1:], dtype, int8), plan(2))


def reading(b: TritonBackend, dtype: torch.dtype) -> Any:
    from qwenrt.backends.cuda.kernels import read

    return read.read(empty(1 << 20, dtype=torch.int32))


def experts(b: TritonBackend, tokens: int, bits: int, dtype: torch.dtype) -> None:
    """Where there are no units for products, one token's."""
    compiling.experts(b, tokens if b.tiles.matrix_units else 1, bits, dtype)


Call = Callable[[TritonBackend, torch.dtype], Any]
# The shapes of 7B and of Qwen3-8B; the number of 128-bit loads that weights, codes or keys alone need.
CASES: dict[str, tuple[int, Call]] = {
    "dense": (2, lambda b, d: b.linear(empty(1, 4096, dtype=d), dense(4096, 4096, d))),
    "dense, gate and up": (
        2,
        lambda b, d: b.norm_gate_up_silu(
            empty(1, 4096, dtype=d), empty(4096, dtype=d), 1e-6, dense(22016, 4096, d)
        ),
    ),
    "int4": (1, lambda b, d: b.linear(empty(1, 4096, dtype=d), codes(4096, 4096, 4))),
    "int4, act-order, added": (
        1,
        lambda b, d: b.linear_add(
            empty(1, 11008, dtype=d), codes(4096, 11008, 4, perm=True), empty(1, 4096, dtype=d)
        ),
    ),
    "int4, groups of 32, offsets": (
        1,
        lambda b, d: b.norm_linear(
            empty(1, 4096, dtype=d), empty(4096, dtype=d), 1e-6, codes(12288, 4096, 4, 32, offsets=True)
        ),
    ),
    "int8, gate and up": (
        2,
        lambda b, d: b.norm_gate_up_silu(
            empty(1, 4096, dtype=d), empty(4096, dtype=d), 1e-6, codes(22016, 4096, 8)
        ),
    ),
    "int4, 16 tokens": (1, lambda b, d: b.linear(empty(16, 4096, dtype=d), codes(4096, 4096, 4))),
    "int8, 64 tokens": (1, lambda b, d: b.linear(empty(64, 4096, dtype=d), codes(4096, 4096, 8))),
    "int4, a matrix": (0, lambda b, d: b.linear(empty(65, 4096, dtype=d), codes(4096, 4096, 4))),
    "norm": (4, lambda b, d: b.rms_norm(empty(8, 4096, dtype=d), empty(4096, dtype=d), 1e-6)),
    "silu": (0, lambda b, d: b.silu_and_mul(empty(8, 22016, dtype=d))),
    "rotation, head norms": (0, lambda b, d: rotate(b, d, (32, 8, 128), False)),
    "rotation, int8 cache": (0, lambda b, d: rotate(b, d, (32, 32, 128), True)),
    "attention": (4, lambda b, d: attend(b, d, (32, 32, 128))),
    "attention, int8 cache": (2, lambda b, d: attend(b, d, (32, 32, 128), True)),
    "attention, heads shared": (4, lambda b, d: attend(b, d, (32, 8, 128), window=4096)),
    "attention, heads shared, int8 cache": (2, lambda b, d: attend(b, d, (28, 4, 128), True)),
    "attention, 256 channels": (4, lambda b, d: attend(b, d, (16, 2, 256))),
    "choice": (
        4,
        lambda b, d: b.choose_rows(
            empty(1, 151936, dtype=torch.float32), None, 0, empty(3, dtype=torch.int64)
        ),
    ),
    "reading": (4, reading),
    "experts, 4096 tokens": (0, lambda b, d: experts(b, 4096, 16, d)),
    "experts, int4, 512 tokens": (0, lambda b, d: experts(b, 512, 4, d)),
    "experts, int8, 64 tokens": (0, lambda b, d: experts(b, 64, 8, d)),
    "delta net": (0, lambda b, d: compiling.delta_net(b, 1, d)),
}


@pytest.fixture(scope="module")
def compiled() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not here: make gpu-sources fetches it")
    from tests.gpu_sources import compiled

    return compiled


def combinations() -> list[Any]:
    """Every case for the newest of either maker; of the others one in three, and the rest where there is time."""
    found = []
    for j, target in enumerate(("sm90", "gfx942", "sm80", "sm75", "gfx90a", "gfx906")):
        for i, case in enumerate(CASES):
            marks = [pytest.mark.slow] if j > 1 and (i + j) % 3 else []
            found.append(pytest.param(case, target, marks=marks, id=f"{target}: {case}"))
    return found


@pytest.mark.parametrize(("case", "target"), combinations())
def test_a_kernel_compiles_and_spills_nothing(
    case: str, target: str, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target == "gfx906" and compiled.triton.__version__ < "3.9":
        pytest.skip("this Triton knows no gfx906")
    wide, call = CASES[case]
    backend = TritonBackend(META)
    units = target not in ("gfx906", "sm75")
    backend.tiles = compiled.replace(
        TILES, matrix_units=units, state_warps=4 if target.startswith("gfx") else 8
    )
    dtype = BF16 if target in ("sm80", "sm90", "gfx90a", "gfx942") else F16
    backend.dtype = dtype
    room = (
        64 if target.startswith("gfx") else 99
    ) << 10  # of a block on AMD's, and on sm_86, which has least
    found = compiled.launches(lambda: call(backend, dtype), monkeypatch)
    assert found
    for launch in found:
        code = compiled.compiled(launch, target)
        assert code.spilt == 0, f"{launch.name}: {code}"
        assert code.registers <= 255 and code.shared <= room, f"{launch.name}: {code}"
        narrow = code.loads[8] + code.loads[16]
        # Scales, zeros, biases, act-order: not one for each weight. Beside a state's matrix stand a head's query, key,
        # value and gate.
        assert narrow <= (48 if launch.name == "delta_head" else 24), f"{launch.name}: {code}"
    first = compiled.compiled(found[0], target)
    if found[0].name == "codes_matrix":  # 16 codes are all that a thread has
        wide = min(wide, first.loads[64])
    assert first.loads[128] + first.loads[64] // 2 >= wide, f"{found[0].name}: {first}"


@pytest.mark.parametrize("gluon", [False, True])
def test_what_a_borrowed_gpu_compiles_first_is_launched(
    gluon: bool, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of `make gpu-check`'s phase; linears of few tokens are in Gluon where there is one."""
    backend = TritonBackend(META)
    backend.gluon, backend.dtype = gluon, BF16
    for name, call in compiling.calls(backend).items():
        found = compiled.launches(call, monkeypatch)
        dense = "16 bits, 8 rows" in name or "8 rows: head" in name
        assert found or (dense and not gluon), name
        if gluon and name.startswith(("1.8B", "7B")) and "cache" not in name:
            assert found[-1].name == "stream", name
        if gluon and "cache" in name:
            assert found[-1].name == "attend_split", name
