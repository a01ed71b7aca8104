"""The table: every op with what is varied of it, in full or in the few combinations where any two values meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qwenrt.conformance import cached, choosing, linears, pairwise, rows
from qwenrt.conformance.adapters import BIASES, DORA, PAIRS, LoraCase
from qwenrt.conformance.cached import AttentionCase, CacheCase
from qwenrt.conformance.case import NORMAL, Case
from qwenrt.conformance.choosing import ChoosingCase
from qwenrt.conformance.compare import CONTIGUOUS, LAYOUTS, ROWS_APART
from qwenrt.conformance.linears import ExpertsCase, LinearCase, RoundingCase
from qwenrt.conformance.rows import RotaryCase, RowsCase
from qwenrt.conformance.states import StatesCase
from qwenrt.conformance.weights import FORMS, MAIN_FORMS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (outputs, inputs): one weight, inputs that fill neither a vector nor a group, rows that fill no block, several groups.
SHAPES = ((1, 1), (7, 33), (33, 96), (17, 200), (130, 515), (64, 1024))
LARGE = (1029, 1024)  # 2^20 weights and more, from where on backends may have other code
VALUES = (NORMAL, linears.MASSIVE, linears.FAR_FROM_ZERO, linears.NOT_FINITE)
HEADS = ((4, 4, 64), (4, 2, 80), (14, 2, 64), (2, 1, 256), (8, 1, 128), (6, 3, 40))
# What a step is made of: decoding, a prompt, pieces of prompts behind a history, all of it at once, and nothing.
LENS = (
    ((1, 513), (5, 300), (33, 290), (16, 21), (1, 16), (200, 200)),
    ((1, 1),),
    ((1, 40), (1, 300), (1, 17)),
    ((3, 3), (3, 3)),
    ((33, 33), (0, 20), (130, 130)),
    ((8, 1030), (17, 600)),
    ((1, 4097), (1, 1)),
    (),
)
# Of linear attention: key heads, value heads and their widths; sequences that begin, go on, decode, do nothing.
DELTA_HEADS = ((2, 6, 16, 24), (1, 1, 8, 8), (4, 4, 128, 128), (2, 8, 40, 16))
STATE_LENS = (
    ((1, 513), (5, 300), (70, 134), (16, 16), (1, 1), (200, 200)),
    ((1, 1),),
    ((1, 40), (1, 300), (1, 2)),
    ((3, 3), (7, 10), (8, 11)),
    ((33, 33), (0, 20), (130, 257)),
    (),
)


@dataclass(frozen=True)
class Op:
    """Cases of one op: each combination of values of ``axes`` is one."""

    name: str
    make: Callable[..., Case]
    axes: dict[str, Sequence[Any]]
    linear: bool = False  # whether the rounding of activations, by a backend's settings, changes it


OPS = (
    Op(
        "linear",
        LinearCase,
        {
            "dtype": DTYPES,
            "form": FORMS,
            "shape": SHAPES,
            "bias": (True, False),
            "values": VALUES,
            "layout": LAYOUTS,
        },
        linear=True,
    ),
    # Of large matrices; other dtypes add nothing to what is met above.
    Op(
        "linear",
        LinearCase,
        {
            "dtype": (torch.float32,),
            "form": MAIN_FORMS,
            "shape": (LARGE,),
            "bias": (True,),
            "values": (linears.MASSIVE, linears.NOT_FINITE),
        },
        linear=True,
    ),
    Op(
        "pack_linear",
        LinearCase,
        {"dtype": DTYPES, "form": FORMS, "shape": SHAPES, "bias": (True, False)},
    ),
    Op(
        "norm_linear",
        LinearCase,
        {"dtype": DTYPES, "form": MAIN_FORMS, "shape": SHAPES, "bias": (True, False), "layout": LAYOUTS},
        linear=True,
    ),
    Op(
        "linear_add",
        LinearCase,
        {
            "dtype": DTYPES,
            "form": MAIN_FORMS,
            "shape": SHAPES,
            "bias": (True, False),
            "layout": LAYOUTS,
        },
        linear=True,
    ),
    Op(
        "linear_add",
        LinearCase,
        {
            "dtype": (torch.float16,),
            "form": MAIN_FORMS,
            "shape": SHAPES,
            "values": (NORMAL, linears.OVERFLOWING),
            "wide": (True,),
        },
        linear=True,
    ),
    Op(
        "norm_gate_up_silu",
        LinearCase,
        {
            "dtype": DTYPES,
            "form": MAIN_FORMS,
            "shape": ((2, 1), (14, 33), (34, 200), (64, 1024)),
            "layout": LAYOUTS,
        },
        linear=True,
    ),
    Op(
        "norm_moe_add",
        ExpertsCase,
        {
            "dtype": DTYPES,
            "form": MAIN_FORMS,
            "experts": ((6, 2), (4, 4), (16, 5)),
            "sizes": ((48, 24, 0), (64, 40, 72), (64, 64, 0)),
            "norm_topk": (True, False),
            "layout": (CONTIGUOUS, ROWS_APART),
            "wide": (False, True),
        },
        linear=True,
    ),
    Op(
        "norm_moe_add_each",
        ExpertsCase,
        {
            "dtype": DTYPES,
            "form": MAIN_FORMS,
            "experts": ((6, 2), (4, 4)),
            "sizes": ((48, 24, 0), (64, 40, 72), (64, 64, 0)),
            "norm_topk": (True, False),
            "wide": (False, True),
        },
        linear=True,
    ),
    Op(
        "add_lora",
        LoraCase,
        {
            "dtype": DTYPES,
            "shape": SHAPES,
            "rank": (16, 1, 5, 64, 131),
            "adds": (PAIRS, DORA, BIASES),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "quantize_dense",
        RoundingCase,
        {
            "dtype": DTYPES,
            "bits": (4, 8),
            "group": (-1, 1, 7, 16, 32, 33, 64, 128),
            "shape": ((33, 96), (1, 1), (40, 300), (7, 129)),
            "spread": (1e-42, 1e-6, 0.02, 1.0, 1e4),
        },
    ),
    Op(
        "rms_norm",
        RowsCase,
        {
            "dtype": DTYPES,
            "width": (1, 7, 64, 1004, 2048),
            "values": (NORMAL, rows.ALL_SIZES, rows.NOT_FINITE),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "silu_and_mul",
        RowsCase,
        {
            "dtype": DTYPES,
            "width": (2, 14, 128, 2008),
            "values": (NORMAL, rows.ALL_SIZES, rows.NOT_FINITE),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "gate_output",
        RowsCase,
        {
            "dtype": DTYPES,
            "width": (4, 28, 128, 512),
            "values": (NORMAL, rows.ALL_SIZES, rows.NOT_FINITE),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "rotary",
        RotaryCase,
        {
            "dtype": DTYPES,
            "heads": (1, 6),
            "head_dim": (64, 80, 96, 128, 256),
            "half": (False, True),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "store_kv",
        CacheCase,
        {
            "dtype": DTYPES,
            "cache": (cached.FLOAT, cached.INT8),
            "heads": HEADS,
            "block_size": (16, 1, 5, 24, 128),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "rotary_store_kv",
        CacheCase,
        {
            "dtype": DTYPES,
            "cache": (cached.FLOAT, cached.INT8, cached.FITTED, cached.NO_CACHE),
            "heads": HEADS,
            "block_size": (16, 5, 128),
            "head_norms": (True, False),
            "log_n": (True, False),
            "half": (False, True),
            "layout": (CONTIGUOUS, ROWS_APART),
        },
    ),
    Op(
        "attention",
        AttentionCase,
        {
            "dtype": DTYPES,
            "cache": (cached.FLOAT,),
            "heads": HEADS,
            "lens": LENS,
            "window": (0, 20, 300, 1),
            "block_size": (16, 5, 24, 128),
            "sharp": (False, True),
            "not_finite": (False, True),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "attention",
        AttentionCase,
        {
            "dtype": DTYPES,
            "cache": (cached.INT8,),
            "heads": HEADS,
            "lens": LENS,
            "window": (0, 20, 300, 1),
            "block_size": (16, 5, 24, 128),
            "sharp": (False, True),
            "not_finite": (False, True),
            "layout": LAYOUTS,
        },
        linear=True,
    ),
    Op(
        "attention",
        AttentionCase,
        {
            "dtype": DTYPES,
            "cache": (cached.NO_CACHE,),
            "heads": HEADS[:3],
            "lens": LENS[1:],
            "window": (0, 20),
            "both_ways": (False, True),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "decode_attention",
        AttentionCase,
        {
            "dtype": DTYPES,
            "cache": (cached.FLOAT, cached.INT8),
            "heads": HEADS,
            "lens": ((), ((1, 5),), ((1, 1), (1, 37), (1, 64)), ((1, 300), (1, 16), (1, 17), (1, 513))),
            "window": (0, 20, 300, 1),
            "block_size": (16, 5, 24, 128),
            "sharp": (False, True),
            "layout": LAYOUTS,
        },
    ),
    Op(
        "choose",
        ChoosingCase,
        {"dtype": (torch.float32,), "vocab": (2011, 16, 32000), "gaps": (False, True)},
    ),
    Op(
        "choose",
        ChoosingCase,
        {
            "dtype": (torch.float32,),
            "rows": (choosing.FLAT, choosing.STEEP, choosing.STEPPED),
            "vocab": (2011, 16, 32000),
            "top_k": (65, 0, 1, 1025),
            "top_p": (1.0, 0.6, 0.95, 1e-3),
            "min_p": (0.0, 0.05),
            "temperature": (0.7, 1.3, 1e-3),
            "gaps": (False, True),
        },
    ),
    Op(
        "causal_conv",
        StatesCase,
        {
            "dtype": DTYPES,
            "taps": (4, 2, 8),
            "heads": DELTA_HEADS[:2],
            "lens": STATE_LENS,
            "kept": (True, False),
            "layout": (CONTIGUOUS, ROWS_APART),
        },
    ),
    Op(
        "gated_delta",
        StatesCase,
        {
            "dtype": DTYPES,
            "heads": DELTA_HEADS,
            "tiled": (False, True),
            "lens": STATE_LENS,
            "kept": (True, False),
            "layout": (CONTIGUOUS, ROWS_APART),
        },
    ),
    Op(
        "gated_norm",
        StatesCase,
        {"dtype": DTYPES, "heads": DELTA_HEADS, "lens": STATE_LENS[-3:], "layout": (CONTIGUOUS, ROWS_APART)},
    ),
    Op(
        "decode_delta_net",
        StatesCase,
        {
            "dtype": DTYPES,
            "heads": DELTA_HEADS,
            "taps": (4, 2, 8),
            "tiled": (False, True),
            "lens": (((1, 40), (1, 300), (1, 1), (1, 2)), ((1, 1),), ((1, 7),), ()),
            "layout": (CONTIGUOUS, ROWS_APART),
        },
    ),
    Op(
        "delta_net",
        StatesCase,
        {
            "dtype": DTYPES,
            "heads": DELTA_HEADS,
            "taps": (4, 2, 8),
            "tiled": (False, True),
            "lens": STATE_LENS,
            "kept": (True, False),
            "layout": (CONTIGUOUS, ROWS_APART),
        },
    ),
)


def names() -> list[str]:
    """The ops of the table."""
    return list(dict.fromkeys(op.name for op in OPS))


def table(ops: Sequence[str] = ()) -> Iterator[tuple[Case, bool]]:
    """Every case of ``ops`` (all), and whether a backend's rounding of activations changes it."""
    for op in OPS:
        if not ops or op.name in ops:
            for values in pairwise.product(op.axes):
                yield op.make(op.name, **values), op.linear


def selection(
    subjects: Sequence[str], linears_only: Sequence[str] = (), ops: Sequence[str] = ()
) -> Iterator[tuple[Case, str]]:
    """Cases in which any two values meet, of float32 and of the narrower dtypes, each for one of ``subjects``, which
    are varied like everything else; linears meet ``linears_only`` as well."""
    for op in OPS:
        if not ops or op.name in ops:
            who = [*subjects, *(linears_only if op.linear else ())]
            # of float32 and of narrower ones: kernels differ most in that
            for dtypes in (DTYPES[:1], DTYPES[1:]):
                some = [dtype for dtype in op.axes["dtype"] if dtype in dtypes]
                for values in pairwise.pairs({**op.axes, "dtype": some, "subject": who}) if some else ():
                    subject = values.pop("subject")
                    yield op.make(op.name, **values), subject
