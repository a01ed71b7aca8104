"""The built library's hot loops keep their sums in registers: what the compiler made of them, by objdump.

A spilled accumulator costs more than its load and store: gcc 12 once made the integer kernels 1.7 times slower
that way, with every result right. So the loops are disassembled and their traffic with the stack is counted.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from qwenrt.backends.cpu import kernels
from tests.kernel_sets import needs_kernels

# Kernel -> its multiply instructions and, by its template's numbers, how many of them its hot loop has: what is
# unrolled over sums, streams and places. Set-up and tails are other loops.
HOT: dict[str, tuple[str, Callable[..., int]]] = {
    "blocks_times_tile": ("vfmadd", lambda bits, tile, streams: 32 // bits * tile * streams),
    "dense_rows_times_tile": ("vfmadd", lambda half, tile, streams: tile * streams * (2 if tile == 1 else 1)),
    "dense12_rows_times_tile": ("vfmadd", lambda tile, streams, once: 8 * tile * streams),
    "panel_times_tile": ("vfmadd", lambda tile: 8 * tile),
    "distant_rows": (
        "vpmadd",
        lambda bits, tile, streams, whole, once: (9 if bits == 4 else 2) * tile * streams,
    ),
    "neighbouring_rows": ("vpmadd", lambda bits, streams, whole: (9 if bits == 4 else 2) * 4 * streams),
    "one_tile": ("vpdpbusd", lambda bits, tile, streams: 8 // bits * tile * streams),
    "integer_rows_of": ("vpdpbusd", lambda bits, tile, streams: 8 // bits * tile * streams),
    "all_tiles": ("vpdpbusd", lambda bits, streams: 8 // bits * 4 * streams),
}
# Moves of whole registers to or from the stack, as a share of these. Some are meant: with AVX2 the sums of a group wait
# in the first cache while a block's are in registers. A loop that has lost its accumulators has a load and a store for
# each multiply: 2.
MOST_STACK_MOVES = 0.6
STACK = re.compile(r"\((%rsp|%rbp)[,)].*%[yz]mm|%[yz]mm\d+,.*\((%rsp|%rbp)[,)]")


@dataclass(frozen=True)
class Loop:
    function: str
    multiplies: int
    stack_moves: int


def disassembly() -> str:
    done = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", str(kernels.LIBRARY)], capture_output=True, text=True
    )
    return done.stdout


def innermost_loops(body: list[tuple[int, str]]) -> Iterator[list[str]]:
    """``body``: (address, instruction). A loop is what lies between a jump back and its target."""
    jumps = [(int(m[1], 16), at) for at, code in body if (m := re.match(r"j\w+ +([0-9a-f]+) ", code))]
    loops = [(low, high) for low, high in jumps if body[0][0] <= low <= high]
    for low, high in loops:
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b in loops):
            yield [code for at, code in body if low <= at <= high]


def hot_loops() -> Iterator[Loop]:
    for function in disassembly().split("\n\n"):
        head = re.match(r"[0-9a-f]+ <.*?(\w+)<([\w, ]+)>\(.*>:\n", function)
        lines = re.findall(r"^ *([0-9a-f]+):\t(.+)$", function, re.MULTILINE)
        if head is None or head[1] not in HOT or not lines:
            continue
        opcode, count = HOT[head[1]]
        expected = count(*(int(n) if n.isdecimal() else 0 for n in head[2].split(", ")))
        for codes in innermost_loops([(int(at, 16), code.strip()) for at, code in lines]):
            multiplies = sum(code.startswith(opcode) for code in codes)
            if multiplies in (expected, 2 * expected):  # as written, or unrolled once more
                moves = sum(bool(STACK.search(code)) for code in codes)
                yield Loop(f"{head[1]}<{head[2]}>", multiplies, moves)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump (binutils)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64")
@needs_kernels
def test_hot_loops_keep_their_sums_in_registers() -> None:
    comment = subprocess.run(["objdump", "-sj", ".comment", str(kernels.LIBRARY)], capture_output=True).stdout
    if b"GCC" not in comment:
        pytest.skip("reads what gcc makes")
    loops = list(hot_loops())
    for kernel in (
        "blocks_times_tile",
        "dense_rows_times_tile",
        "dense12_rows_times_tile",
        "panel_times_tile",
        "distant_rows",
        "neighbouring_rows",
    ):
        assert any(loop.function.startswith(kernel) for loop in loops), f"no loop of {kernel} was found"
    spilled = [loop for loop in loops if loop.stack_moves > MOST_STACK_MOVES * loop.multiplies]
    assert not spilled, "\n".join(map(str, spilled))


def test_a_spilled_loop_is_seen() -> None:
    spilled = [
        (0x10, "vmovaps 0x20(%rsp),%ymm1"),
        (0x18, "vfmadd231ps %ymm0,%ymm2,%ymm1"),
        (0x20, "vmovaps %ymm1,0x20(%rsp)"),
        (0x24, "vaddps -0x40(%rbp),%ymm1,%ymm1"),
        (0x28, "jne    10 <f+0x10>"),
        (0x30, "jmp    0 <f>"),
    ]
    (codes,) = innermost_loops([(0, "nop"), *spilled])
    assert len(codes) == 5 and sum(bool(STACK.search(code)) for code in codes) == 3
