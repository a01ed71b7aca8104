"""The layers of a captured step, compiled for NVIDIA's cards: of linears in Gluon what a thread does for a weight, and
in which order. That they compile at all says that no conversion between layouts moves a number, which test_gluon.py
takes for granted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwenrt.backends.cuda.tables import TILES, Warps
from qwenrt.ops.steps import RotaryRows
from tests.gpu_sources.test_compiled import BF16, F16, cache, codes, compiled, dense, empty, plan

__all__ = ["compiled"]
pytestmark = pytest.mark.gpu_sources
WIDE, NARROW = Warps(4, 1), Warps(1, 8)


def normed(tokens: int, inputs: int, dtype: torch.dtype) -> Any:
    from qwenrt.backends.cuda.kernels.stream import Normed

    return Normed(empty(tokens, inputs, dtype=dtype), empty(256, tokens, dtype=torch.float32), 1e-6)


def linear(tokens: int, w: Any, dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    """qkv, gate and up or the head of 7B: a norm before, many outputs."""

    def call() -> None:
        from qwenrt.backends.cuda.kernels import stream

        stream.linear(normed(tokens, w.in_features, dtype), w, WIDE, dtype, **options)

    return call


def added(tokens: int, w: Any, dtype: torch.dtype, **options: Any) -> Callable[[], Any]:
    """o and down: a residual, and what the next norm takes."""

    def call() -> None:
        from qwenrt.backends.cuda.kernels import stream

        stream_dtype = torch.float32 if dtype == F16 else dtype
        following = stream.Next(empty(w.out_features, dtype=dtype), 1e-6, dtype)
        x, residual = (
            empty(tokens, w.in_features, dtype=dtype),
            empty(tokens, w.out_features, dtype=stream_dtype),
        )
        stream.linear_add(x, w, NARROW, residual, following, **options)

    return call


# What is launched; the registers that leave room for 20 warps of an SM or more (8 with 64 tokens); of a unit of 16 rows
# in the loop: loads of 128 bits of weights and of tokens, tensor products, instructions on bits.
CASES: dict[str, tuple[Callable[..., Any], int, tuple[int, int, int]]] = {
    "dense": (lambda d, **o: linear(1, dense(12288, 4096, d), d, **o), 72, (6, 4, 0)),
    "dense, gate and up": (lambda d, **o: linear(1, dense(22016, 4096, d), d, pair=True, **o), 72, (6, 4, 0)),
    "dense, added": (lambda d, **o: added(1, dense(4096, 11008, d), d, **o), 80, (6, 4, 0)),
    "int4": (lambda d, **o: linear(1, codes(12288, 4096, 4), d, **o), 80, (6, 16, 32)),
    "int4, gate and up": (
        lambda d, **o: linear(1, codes(22016, 4096, 4), d, pair=True, **o),
        80,
        (6, 16, 32),
    ),
    "int4, added": (lambda d, **o: added(1, codes(4096, 11008, 4), d, **o), 88, (6, 16, 32)),
    "int8, gate and up": (
        lambda d, **o: linear(1, codes(22016, 4096, 8), d, pair=True, **o),
        104,
        (8, 24, 64),
    ),
    "int4, 8 tokens": (lambda d, **o: linear(8, codes(12288, 4096, 4), d, **o), 88, (6, 16, 32)),
    "int4, 64 tokens": (lambda d, **o: linear(64, codes(12288, 4096, 4), d, **o), 184, (18, 64, 32)),
}


@pytest.mark.parametrize("target", ["sm90", "sm80"])
@pytest.mark.parametrize("case", CASES)
def test_weights_go_to_tensor_cores_by_registers_alone(
    case: str, target: str, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, registers, (loads, products, bits) = CASES[case]
    (launch,) = compiled.launches(make(BF16), monkeypatch)
    code = compiled.compiled(launch, target)
    assert code.spilt == 0 and code.registers <= registers, str(code)
    assert code.shared <= (512 if launch.constants["WK"] == 1 else 4096), str(code)
    # The norm, and warps that share inputs, meet in shared memory after the sums and not among them.
    body = code.loop
    assert count(body, "LDG.E.128") == loads, f"{code}\n{body}"
    assert count(body, "HMMA") == products and count(body, "LDS", "STS", "BAR", "SHFL") == 0, (
        f"{code}\n{body}"
    )
    assert bits <= count(body, "LOP3") <= bits + 8, f"{code}\n{body}"
    assert count(body, "LDG") - loads <= 4, "scales and zeros of two rows"


def test_float16_is_made_two_at_a_time(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,) = compiled.launches(CASES["int4"][0](F16), monkeypatch)
    body = compiled.compiled(launch, "sm90").loop
    assert 32 <= count(body, "HADD2", "HFMA2") <= 36 and count(body, "PRMT") <= 4, body


@pytest.mark.parametrize("case", ["dense", "int4, added", "int8, gate and up"])
def test_weights_are_under_way_before_a_kernel_waits(
    case: str, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (launch,) = compiled.launches(CASES[case][0](BF16, pdl=True), monkeypatch)
    order = [
        name.split(".")[0]
        for name in compiled.compiled(launch, "sm90").order
        if name.startswith(("LDG", "STG", "PREEXIT", "ACQBULK"))
    ]
    runs = [(name, len(list(group))) for name, group in itertools.groupby(order)]
    first = 8 if case != "int4, added" else 4
    assert runs[:4] == [("LDG", first), ("PREEXIT", 1), ("ACQBULK", 1), ("LDG", runs[3][1])], runs


def count(names: list[str], *starts: str) -> int:
    return sum(name.startswith(starts) for name in names)


def attended(heads: tuple[int, int, int], int8: bool, dtype: torch.dtype, norms: bool = False) -> Any:
    from qwenrt.backends.cuda.kernels.attend import attend

    turn = empty(1, heads[2], dtype=torch.float32)
    qkv, norm = empty(1, (heads[0] + 2 * heads[1]) * heads[2], dtype=dtype), empty(heads[2], dtype=dtype)
    qk_norms = (norm, norm, 1e-6) if norms else None
    counts, kv = empty(64 * heads[0], dtype=torch.int32), cache(*heads[1:], dtype, int8)
    return attend(qkv, heads, qk_norms, RotaryRows(turn, turn, None), kv, plan(1), 0.1, 0, counts, TILES)


@pytest.mark.parametrize("target", ["sm90", "sm80"])
@pytest.mark.parametrize(
    ("heads", "int8", "norms"),
    [
        ((32, 32, 128), False, False),
        ((32, 32, 128), True, False),
        ((32, 8, 128), False, True),
        ((28, 4, 128), True, False),
        ((16, 2, 256), False, True),
    ],
    ids=str,
)
def test_attention_in_one_launch_compiles_for_its_registers(
    heads: tuple[int, int, int],
    int8: bool,
    norms: bool,
    target: str,
    compiled: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (launch,) = compiled.launches(lambda: attended(heads, int8, BF16, norms), monkeypatch)
    code = compiled.compiled(launch, target)
    # Triton 3.6's assembler keeps one number of the prologue aside until the end.
    assert code.spilt <= 8 and code.registers <= 255 and code.shared <= 99 << 10, str(code)
    assert code.loads[128] >= 2 if int8 else 4, str(code)
    counts_between_barriers(code)


def counts_between_barriers(code: Any) -> None:
    """A split says that its part is stored when all threads have passed a barrier behind their stores; by an addition
    that releases them to the whole device and acquires the others'; and none reads a part before the next barrier. What
    test_races.py takes for granted of this is here."""
    (atomic,) = re.findall(r"\batom\.\S+", code.ptx)
    assert {"acq_rel", "gpu", "add"} <= set(atomic.split(".")), atomic
    met = [name for name in code.order if name.startswith(("STG", "LDG", "BAR", "ATOM", "MEMBAR", "CCTL"))]
    (at,) = [i for i, name in enumerate(met) if name.startswith("ATOM")]
    around = [name.split(".")[0] for name in met[at - 2 : at + 3]]
    # The first-level cache is emptied behind it, as it may hold what was there before another split stored its part.
    assert around == ["BAR", "MEMBAR", "ATOMG", "CCTL", "BAR"], around
