"""What a step of one token takes behind a long context beside a short one: python -m benchmarks.context.

Contexts are not computed: steps run over a cache full of random numbers, which costs the same. Every round takes a step
behind each context, with an int8 cache once with products in 16-bit integers and once in float32 (as
`activations="exact"` has them), and reads memory; figures are medians over the rounds, ratios medians of the ratios
within a round. With one thread time is the processor's, which other processes disturb less, else the wall clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenrt.llm import LLM

_READ = 1 << 25  # int64 that are read for the bandwidth
_STEPS = 3  # of each kind in a round; the fastest counts


def main(arguments: Sequence[str] | None = None) -> int:
    """The table, in Markdown."""
    add = (
        parser := argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    ).add_argument
    add("--shape", default="Qwen3.5-4B")
    add("--quantize", default="int4")
    add("--quantize-head", default="int4")
    add("--contexts", default="512,32768", help="the shortest first (default: 512,32768)")
    add("--caches", default="auto,int8", help="values of kv_cache_dtype (default: auto,int8)")
    add("--rounds", type=int, default=15)
    add("--threads", type=int, default=2)
    add("--json", type=Path, help="a file for the figures, which is added to")
    asked = parser.parse_args(arguments)
    os.environ["QWENRT_NUM_THREADS"] = str(asked.threads)
    contexts = [int(n) for n in asked.contexts.split(",")]

    from qwenrt.loading import load_random

    print("| kernels | cache | products | context | ms a step | beside the shortest | reading, GB/s |")
    print("|---|---|---|---|---|---|---|")
    for cache in asked.caches.split(","):
        with load_random(
            asked.shape, quantize=asked.quantize, quantize_head=asked.quantize_head, kv_cache_dtype=cache,
            max_num_seqs=1, max_model_len=max(contexts) + 16, progress=False,
        ) as llm:  # fmt: skip
            rows = measure(llm, contexts, cache, asked.rounds)
        for row in rows:
            figures = f"{row['context']:,} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['read']:.1f}"
            print(f"| {row['kernels']} | {cache} | {row['products']} | {figures} |", flush=True)
        if asked.json:
            known = json.loads(asked.json.read_text()) if asked.json.exists() else []
            settings = {"shape": asked.shape, "weights": asked.quantize, "threads": asked.threads}
            asked.json.write_text(json.dumps([*known, *(settings | row for row in rows)], indent=1) + "\n")
    return 0


def measure(llm: LLM, contexts: list[int], cache: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of products and context."""
    import torch

    from qwenrt.backends.cpu.decoder import DecoderStack
    from qwenrt.ops.steps import Draw, LayerKV, Step

    runner = llm._assembled.engine._alive().runner
    stack, kernels = runner.stacks[0], runner.backend.kernels
    assert isinstance(stack, DecoderStack), "steps are not one call here"
    layers = [layer for layer in runner.cache.layers if isinstance(layer, LayerKV)]
    for layer in layers:
        fill(layer)
    states = [0] if len(layers) < len(runner.cache.layers) else []
    blocks = list(range(-(-max(contexts) // runner.cache.block_size)))
    steps = {n: Step([1], [n], [blocks], [1], [5], [0], [Draw()], state_slots=states) for n in contexts}
    clock = Clock(kernels.threads)
    took: dict[tuple[str, int], list[float]] = {}
    memory, read = torch.zeros(_READ, dtype=torch.int64), []
    for _ in range(rounds):
        for products in ("integers", "floats") if cache == "int8" else ("floats",):
            for struct in stack._caches:
                struct.rounded = products == "integers"
            for context, step in steps.items():
                best = min(clock(lambda step=step: stack.run(step).tokens()) for _ in range(_STEPS))
                took.setdefault((products, context), []).append(best)
        read.append(8e-9 * _READ / clock(lambda: kernels.read(memory)))
    return [
        {
            "kernels": kernels.isa,
            "cache": cache,
            "products": products,
            "context": context,
            "ms": statistics.median(times) * 1e3,
            "ratio": statistics.median(
                t / s for t, s in zip(times, took[products, contexts[0]], strict=True)
            ),
            "read": statistics.median(read),
        }
        for (products, context), times in took.items()
    ]


def fill(layer: Any) -> None:
    """Random numbers in every slot of a layer's cache."""
    for side in (layer.k, layer.v):
        side.random_(0, 256) if layer.quantized else side.normal_()
    if layer.quantized:
        for scale in (layer.k_scale, layer.v_scale):
            scale.uniform_(0.01, 0.02)
        for zero in (layer.k_zero, layer.v_zero):
            zero.uniform_(-2.5, -1.5)


class Clock:
    """The seconds that work takes."""

    def __init__(self, threads: int) -> None:
        self._now = time.process_time if threads == 1 else time.perf_counter

    def __call__(self, work: Callable[[], object]) -> float:
        began = self._now()
        work()
        return self._now() - began


if __name__ == "__main__":
    sys.exit(main())
