"""The form of a module is told by its tensors; whatever they are, there is a form or a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.config import QuantConfig
from qwenrt.loader.checkpoint.formats import Awq, Dense, Fp8, Gptq, StoredLinear, format_of
from qwenrt.loader.checkpoint.header import TensorEntry
from qwenrt.loader.checkpoint.names import KINDS, QWEN2

GPTQ = QuantConfig(4, 32, other_groups=(16, 48))
AWQ = QuantConfig(4, 32, method="awq")
FP8 = QuantConfig(8, -1, method="fp8", block=(16, 32))


def module(columns: int = 96, rows: int = 64, **kinds: tuple[str, tuple[int, ...]]) -> StoredLinear:
    entries = {
        kind: TensorEntry(kind, dtype, shape, 0, 0, Path("x")) for kind, (dtype, shape) in kinds.items()
    }
    return StoredLinear("layers.0.o_proj", rows, columns, entries)


@pytest.mark.parametrize(
    ("words", "zeros", "groups", "g_idx", "found"),
    [
        (12, 8, 3, False, (4, 32)),
        (24, 16, 3, False, (8, 32)),
        (12, 8, 6, False, (4, 16)),
        (12, 8, 2, False, (4, 48)),
        (12, 8, 4, True, (4, 24)),  # named nowhere, told by g_idx
        (24, 16, 1, True, (8, 96)),
        (12, 8, 4, False, (4, 32)),  # and then its scales are found to be of the wrong shape
    ],
)
def test_bits_and_groups_of_gptq_are_those_of_its_tensors(
    words: int, zeros: int, groups: int, g_idx: bool, found: tuple[int, int]
) -> None:
    kinds = {
        "qweight": ("I32", (words, 64)),
        "qzeros": ("I32", (groups, zeros)),
        "scales": ("F16", (groups, 64)),
    }
    form = format_of(module(**kinds, **({"g_idx": ("I32", (96,))} if g_idx else {})), GPTQ)
    assert isinstance(form, Gptq) and (form.bits, form.group_size) == found
    fits = form.expected(module(**kinds))["scales"][0] == ((groups, 64),)
    assert fits == ((groups, g_idx) != (4, False))


def test_groups_that_may_be_of_two_sizes_need_an_order() -> None:
    quant = QuantConfig(4, 64, other_groups=(36, 40))  # three groups of 96 inputs either way
    kinds = {"qweight": ("I32", (12, 64)), "qzeros": ("I32", (3, 8)), "scales": ("F16", (3, 64))}
    assert format_of(module(**kinds), quant) == (
        "3 groups of scales may have 36 or 40 inputs each, and no g_idx tells"
    )
    assert isinstance(format_of(module(**kinds, g_idx=("I32", (96,))), quant), Gptq)


@pytest.mark.parametrize(
    ("scale", "shape", "block"),
    [
        ("weight_scale_inv", (4, 3), (16, 32)),
        ("weight_scale", (4, 3), (16, 32)),
        ("weight_scale", (64, 1), None),
        ("weight_scale", (64,), None),
        ("weight_scale_inv", (1,), None),
        ("weight_scale", (), None),
    ],
)
def test_scales_of_fp8_belong_to_what_their_shape_says(
    scale: str, shape: tuple[int, ...], block: tuple[int, int] | None
) -> None:
    kinds = {"weight": ("F8_E4M3", (64, 96)), scale: ("F32", shape)}
    form = format_of(module(**kinds), FP8)
    assert form == Fp8(scale, block) and shape in form.expected(module(**kinds))[scale][0]


def test_what_is_dense_is_dense_whatever_the_config_says() -> None:
    plain = module(weight=("BF16", (64, 96)))
    assert all(format_of(plain, quant) == Dense() for quant in (None, GPTQ, AWQ, FP8))
    codes = module(qweight=("I32", (96, 8)), qzeros=("I32", (6, 8)), scales=("F16", (6, 64)))
    assert format_of(codes, AWQ) == Awq(16)
    assert format_of(codes, FP8) == "integer codes, and the method of quantization_config is fp8"
    assert format_of(codes, None) == "config.json has no quantization_config"


_shapes = st.lists(st.integers(0, 200) | st.just(2**62), max_size=3).map(tuple)
_tensors = st.tuples(st.sampled_from(["F16", "F32", "I32", "F8_E4M3", "U8"]), _shapes)


@given(
    st.dictionaries(st.sampled_from([k for k in KINDS if k != "bias"]), _tensors, min_size=1),
    st.sampled_from([None, GPTQ, AWQ, FP8, QuantConfig(8, -1), QuantConfig(8, 7, method="fp8")]),
    st.integers(1, 5000),
    st.integers(1, 5000),
)
@settings(max_examples=300, deadline=None)
def test_any_tensors_have_a_form_or_a_reason(
    kinds: dict[str, tuple[str, tuple[int, ...]]], quant: QuantConfig | None, columns: int, rows: int
) -> None:
    one = module(columns, rows, **kinds)
    form = format_of(one, quant)
    if isinstance(form, str):
        assert form
    else:
        assert form.bits in (4, 8, 16) and all(shapes for shapes, _ in form.expected(one).values())


@pytest.mark.parametrize(
    "name",
    [
        *(f"model.layers.3.self_attn.{n}" for n in ("k_scale", "kv_scale", "q_scale", "attn.v_scale")),
        *(f"model.layers.3.self_attn.k_proj.{n}" for n in ("k_scale", "output_scale", "input_scale")),
        *("layers.0.mlp.down_proj.input_zero_point", "lm_head.input_scale"),
    ],
)
def test_scales_of_activations_and_caches_are_known_and_not_needed(name: str) -> None:
    place = QWEN2.locate(name)
    assert place is not None and place.ignored
