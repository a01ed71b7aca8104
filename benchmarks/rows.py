"""What is measured: the rows of the table with their floors and goals, and the curves of the plots."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.shapes import TINY

SMALL, LARGE, HYBRID = "Qwen-1_8B", "Qwen-7B", "Qwen3.5-4B"
# A multiple of the cache's blocks and one: all but the last token of such a prompt come from the prefix cache.
SHORT = 17
LONG = 8177


@dataclass(frozen=True)
class Engine:
    """An engine with its settings: what one worker process loads."""

    name: str  # qwenrt | llama.cpp | torch | onnxruntime-genai
    shape: str
    settings: tuple[tuple[str, Any], ...] = ()

    def described(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape, "settings": dict(self.settings)}


@dataclass(frozen=True)
class Work:
    """One measurement: ``prefill`` of ``tokens``, ``decode`` of ``new_tokens`` behind ``tokens``, or ``start``."""

    kind: str
    tokens: int
    new_tokens: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Row:
    """A line of the table. ``title`` is for lists: the page says what was done. ``ratio`` and ``fraction`` are
    (floor, goal), ``start`` the same in seconds."""

    key: str
    title: str
    ours: Engine
    peer: Engine
    work: Work
    ratio: tuple[float, float] | None = None
    fraction: tuple[float, float] | None = None
    start: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A plot: each of ``engines`` does ``work`` with every value of ``varied`` (a field of Work)."""

    key: str
    plot: str
    engines: tuple[tuple[str, Engine], ...]
    work: Work
    varied: str
    values: tuple[int, ...]
    peer_values: tuple[int, ...]


def qwenrt(shape: str, **settings: Any) -> Engine:
    return Engine("qwenrt", shape, tuple(sorted(settings.items())))


def llama(shape: str, weights: str, **settings: Any) -> Engine:
    return Engine("llama.cpp", shape, tuple(sorted({"weights": weights, **settings}.items())))


def torch_eager(shape: str) -> Engine:
    return Engine("torch", shape)


def ort(shape: str) -> Engine:
    return Engine("onnxruntime-genai", shape, (("group", 128),))


def _int4(shape: str, **more: Any) -> Engine:
    return qwenrt(shape, quantize="int4", activations="int8", quantize_head="int8", **more)


def table() -> list[Row]:
    """All rows, in an order in which neighbours share what is loaded; the start is not measured while the memory of a
    large model is given back."""
    decode, prefill = Work("decode", SHORT, 48), Work("prefill", 512)
    int4, q4 = _int4(SMALL, max_num_seqs=8, max_model_len=2048), llama(SMALL, "Q4_0")
    int16 = qwenrt(SMALL, quantize="int4", activations="int16", max_model_len=2048)
    int8 = qwenrt(SMALL, quantize="int8", activations="int16", quantize_head="int8", max_model_len=2048)
    bf16 = qwenrt(SMALL, activations="int16", max_model_len=2048)
    long = _int4(SMALL, kv_cache_dtype="int8", max_num_seqs=1, max_model_len=8320)
    long_q4 = llama(SMALL, "Q4_0", cache="Q8_0", context=8320)
    short_step = Work("decode", SHORT, 24)
    hybrid, hybrid_q4 = _int4(HYBRID, max_model_len=2048), llama(HYBRID, "Q4_0")
    large, large_q4 = _int4(LARGE, max_model_len=2048), llama(LARGE, "Q4_0")
    return [
        Row("decode-int4", "decode, int4", int4, q4, decode, (1.4, 1.7), (0.75, 0.90)),
        Row("prefill-int4", "prefill 512, int4", int4, q4, prefill, (1.8, 2.5)),
        Row(
            "batch-int4",
            "decode of 8 sequences, int4",
            int4,
            llama(SMALL, "Q4_0", sequences=8),
            Work("decode", SHORT, 24, 8),
            (1.3, 2.0),
        ),
        Row("decode-int4-int16", "decode, int4", int16, q4, decode, (0.95, 1.15), (0.65, 0.85)),
        Row("decode-int8", "decode, int8", int8, llama(SMALL, "Q8_0"), decode, (1.25, 1.5), (0.80, 0.93)),
        Row("prefill-int8", "prefill 512, int8", int8, llama(SMALL, "Q8_0"), prefill, (1.4, 2.0)),
        Row("decode-bf16", "decode, bf16", bf16, llama(SMALL, "F16"), decode, (1.3, 1.6), (0.85, 0.97)),
        Row("prefill-bf16", "prefill 512, bf16", bf16, llama(SMALL, "F16"), prefill, (1.0, 1.2)),
        Row("decode-torch", "decode, bf16", bf16, torch_eager(SMALL), short_step, (2.0, 2.5)),
        Row("prefill-torch", "prefill 512, bf16", bf16, torch_eager(SMALL), prefill, (8.0, 10.0)),
        Row("decode-ort", "decode, int4", int4, ort(SMALL), short_step),
        Row("prefill-ort", "prefill 512, int4", int4, ort(SMALL), prefill),
        Row("decode-8k", "decode at 8k context, int4", long, long_q4, Work("decode", LONG, 32), (1.1, 1.4)),
        Row(
            "start",
            "process start to first token, int4",
            qwenrt(SMALL, quantize="int4", activations="int8", quantize_head="int8", max_model_len=2048),
            q4,
            Work("start", 8, 1),
            start=(2.5, 1.5),
        ),
        Row("decode-4b", "decode, int4", hybrid, hybrid_q4, short_step, (1.2, 1.6)),
        Row("prefill-4b", "prefill 512, int4", hybrid, hybrid_q4, prefill, (1.5, 2.0)),
        Row("decode-7b", "decode, int4", large, large_q4, short_step, (1.3, 1.7), (0.75, 0.90)),
        Row("prefill-7b", "prefill 512, int4", large, large_q4, prefill, (1.3, 1.7)),
    ]


def curves(longest: int = 32768, peer_longest: int = 8192) -> list[Curve]:
    """The plots' measurements. Filling a long context takes minutes: ``longest`` and ``peer_longest`` bound it."""
    contexts = tuple(n + 1 for n in (16, 1024, 4096, 8160, 16384, 32640) if n < longest)
    peer = tuple(n for n in contexts if n <= peer_longest)
    room, peer_room = max(contexts) + 127, max(peer, default=1) + 127
    step = Work("decode", SHORT, 16)
    caches = [
        Curve(
            f"context-{ours}",
            "context",
            (
                (
                    f"qwenrt, {ours} cache",
                    _int4(SMALL, kv_cache_dtype=kind, max_num_seqs=1, max_model_len=room),
                ),
                (f"llama.cpp, {theirs} cache", llama(SMALL, "Q4_0", cache=theirs, context=peer_room)),
            ),
            step,
            "tokens",
            contexts,
            peer,
        )
        for ours, kind, theirs in (("int8", "int8", "Q8_0"), ("float32", "auto", "F16"))
    ]
    batches, prompts = (1, 2, 4, 8, 16, 32), (8, 32, 128, 512, 2048, 4096)
    many = _int4(SMALL, max_num_seqs=32, max_model_len=4224)
    return [
        *caches,
        Curve(
            "batch",
            "batch",
            (("qwenrt", many), ("llama.cpp", llama(SMALL, "Q4_0", sequences=32))),
            step,
            "batch",
            batches,
            batches,
        ),
        Curve(
            "prompt",
            "prompt",
            (("qwenrt", many), ("llama.cpp", llama(SMALL, "Q4_0", context=4224))),
            Work("prefill", 512),
            "tokens",
            prompts,
            prompts,
        ),
    ]


def quick(work: Work) -> Work:
    """The same kind of work, small enough to prove that a row runs end to end."""
    return dataclasses.replace(
        work, tokens=min(work.tokens, 33), new_tokens=min(work.new_tokens, 4), batch=min(work.batch, 8)
    )


def tiny(engine: Engine) -> Engine:
    """The same engine with a network of two small layers."""
    return dataclasses.replace(engine, shape=TINY)
