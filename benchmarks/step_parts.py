"""What a decode step is made of, by the number of sequences: processor time of one thread in the kernels of each part.

    python -m benchmarks.step_parts [--isa avx2] [--activations int8] [--context 200] [--rows 1,8,16]

For Qwen-1.8B's shape with int4 weights, in milliseconds a step: the linears of all layers, the output layer as it is
and as `quantize_head="int8"` makes it, attention over a float32 cache and over an int8 cache. The least of many calls,
so that it says something on a busy machine as well. Of the output layer and the caches a part is measured, and scaled.
"""

from __future__ import annotations

import argparse
import sys
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwenrt.backends.cpu.kernels import Kernels
    from qwenrt.ops.types import CanonicalWeight

HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, HEAD_DIM = 2048, 5504, 151936, 24, 16, 128
LINEARS = (  # role, inputs, outputs
    ("qkv_proj", HIDDEN, 3 * HIDDEN),
    ("o_proj", HIDDEN, HIDDEN),
    ("gate_up_proj", HIDDEN, 2 * INNER),
    ("down_proj", INNER, HIDDEN),
)
_HEAD_ROWS = 8192  # of the output layer, that are measured
_CACHES = 3  # layers whose caches are read in turn, so that none stays in the processor's
_BLOCK = 16  # tokens of the cache
_SECONDS = 0.3  # for each figure

Work = Callable[[], object]


def least(work: Work) -> float:
    """Milliseconds of processor time of this thread."""
    best, until = float("inf"), time.thread_time() + _SECONDS
    work()
    while time.thread_time() < until:
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best * 1e3


def product(kernels: Kernels, activations: str, weight: CanonicalWeight, role: str) -> Callable[[int], Work]:
    """What multiplies that weight with so many tokens."""
    import torch

    from qwenrt.backends.cpu import CPUBackend
    from qwenrt.backends.cpu.activations import rule_of

    cpu = CPUBackend(torch.device("cpu"))
    cpu.configure(kernels.isa, num_threads=1, activations=activations)
    packed = cpu.pack_linear(weight, torch.float32)
    packed.role = role

    def beside(count: int) -> Work:
        x = torch.randn(count, packed.in_features)
        if packed.kind == "dense12":
            return lambda: kernels.dense12_linear(x, packed, True)
        if packed.kind == "dense16":
            return lambda: kernels.dense16_linear(x, packed.data["weight"], None, True)
        rule = rule_of(activations, packed)
        return lambda: kernels.quant_linear(x, packed, rule)

    return beside


def attention(kernels: Kernels, context: int, count: int, coded: bool) -> Work:
    """What reads _CACHES layers' caches for so many sequences of ``context`` tokens, whose blocks lie anywhere."""
    import torch

    from qwenrt.backends.cpu.attention import Cache, Sequences

    each = -(-context // _BLOCK)
    blocks = array("q", torch.randperm(each * count).tolist())
    starts = range(0, count * each, each)
    numbers = [array("q", n) for n in (range(count), [1] * count, [context] * count, starts)]
    sequences = Sequences(count, *(a.buffer_info()[0] for a in (*numbers, blocks)))
    caches: list[Cache] = []
    kept: list[object] = [numbers, blocks]
    for _ in range(_CACHES):
        shape = (2, each * count, _BLOCK, HEADS, HEAD_DIM)
        k, v = torch.randint(0, 255, shape, dtype=torch.uint8) if coded else torch.randn(shape)
        scales = torch.rand(4, *k.shape[:3]) * 0.01
        kept += [k, v, scales]
        sides = [scales[i].data_ptr() if coded else None for i in range(4)]
        caches.append(Cache(k.data_ptr(), v.data_ptr(), *sides, _BLOCK, HEADS, HEAD_DIM, None, None))
    q = torch.randn(count, HEADS, HEAD_DIM)
    out = torch.empty_like(q)

    def read() -> object:
        for cache in caches:
            kernels.attend(sequences, cache, q, out, HEAD_DIM**-0.5, 0)
        return kept  # what the structs point at

    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", default="auto", help="instruction set")
    parser.add_argument("--activations", default="int8", choices=("int8", "int16"))
    parser.add_argument("--context", type=int, default=200, help="tokens of each sequence")
    parser.add_argument("--rows", default="1,8,16", help="sequences, of each column")
    args = parser.parse_args()
    from qwenrt.backends.cpu.kernels import Kernels
    from qwenrt.loader.random_weights import random_rows

    kernels = Kernels(isa=args.isa, threads=1)
    rows = [int(text) for text in args.rows.split(",")]
    sys.stdout.write(
        f"{kernels.isa}, {args.activations}, {args.context} tokens; ms with {args.rows} sequences\n"
    )

    def tell(name: str, times: list[float]) -> None:
        sys.stdout.write(f"{name:26}" + "".join(f"{ms:8.1f}" for ms in times) + "\n")
        sys.stdout.flush()

    total = [0.0] * len(rows)
    for role, inputs, outputs in LINEARS:
        beside = product(kernels, args.activations, random_rows(outputs, inputs, 4), role)
        total = [ms + LAYERS * least(beside(count)) for ms, count in zip(total, rows, strict=True)]
    tell("linears of the layers", total)
    for bits, name in ((16, "output layer, bfloat16"), (8, "output layer, int8")):
        beside = product(kernels, args.activations, random_rows(_HEAD_ROWS, HIDDEN, bits), "lm_head")
        tell(name, [VOCABULARY / _HEAD_ROWS * least(beside(count)) for count in rows])
    for coded, name in ((False, "attention, float32 cache"), (True, "attention, int8 cache")):
        works = (attention(kernels, args.context, count, coded) for count in rows)
        tell(name, [LAYERS / _CACHES * least(work) for work in works])


if __name__ == "__main__":
    main()
