"""The name table of Qwen-1: every tensor of a checkpoint has its place, and nothing else has."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.errors import ConfigError
from qwenrt.loader.checkpoint.names import KINDS, QWEN1, ParamSlot, table_for


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.wte.weight", ParamSlot("embed_tokens", "", "weight")),
        ("transformer.ln_f.weight", ParamSlot("norm", "", "weight")),
        ("lm_head.weight", ParamSlot("lm_head", "", "weight")),
        ("transformer.h.0.ln_1.weight", ParamSlot("layers.0.input_norm", "", "weight")),
        ("transformer.h.79.ln_2.weight", ParamSlot("layers.79.post_norm", "", "weight")),
        ("transformer.h.3.attn.c_attn.weight", ParamSlot("layers.3.qkv_proj", "", "weight")),
        ("transformer.h.3.attn.c_attn.bias", ParamSlot("layers.3.qkv_proj", "", "bias")),
        ("transformer.h.3.attn.c_proj.qweight", ParamSlot("layers.3.o_proj", "", "qweight")),
        ("transformer.h.3.mlp.w2.weight", ParamSlot("layers.3.gate_up_proj", "gate", "weight")),
        ("transformer.h.3.mlp.w1.g_idx", ParamSlot("layers.3.gate_up_proj", "up", "g_idx")),
        ("transformer.h.3.mlp.c_proj.scales", ParamSlot("layers.3.down_proj", "", "scales")),
        ("h.3.mlp.c_proj.weight", ParamSlot("layers.3.down_proj", "", "weight")),  # saved without its wrapper
    ],
)
def test_a_known_name_has_its_place(name: str, place: ParamSlot) -> None:
    assert QWEN1.locate(name) == place


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.bias",
        "transformer.h.0.attn.masked_bias",
        "transformer.h.0.attn.rotary_emb.inv_freq",
        "transformer.rotary_emb.inv_freq",
        "transformer.logn_tensor",
    ],
)
def test_buffers_of_old_files_are_ignored(name: str) -> None:
    place = QWEN1.locate(name)
    assert place is not None and place.ignored


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lm_head",
        "lm_head.weight.extra",
        "xtransformer.wte.weight",
        "transformer.lm_head.weight",
        "transformer.h.00.ln_1.weight",
        "transformer.h.1234567.ln_1.weight",
        "transformer.h.٣.ln_1.weight",  # a digit, but not one of ours
        "transformer.h.-1.ln_1.weight",
        "transformer.h.0.ln_1.bias",
        "transformer.h.0.attn.c_attn.weight\n",
        "transformerxwte.weight",
        "transformer.visual.conv1.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert QWEN1.locate(name) is None


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_no_text_breaks_it(name: str) -> None:
    place = QWEN1.locate(name)
    assert place is None or isinstance(place, ParamSlot)


def test_source_is_the_inverse_of_locate() -> None:
    for path in (*QWEN1.linears, *QWEN1.tensors):
        names = [path] if path in QWEN1.tensors else [f"{path}.{kind}" for kind in KINDS]
        for name in (n.format(n=7) for n in names):
            place = QWEN1.locate(name)
            assert place is not None
            assert QWEN1.source(place.param, place.part, place.kind) == name


def test_unknown_family() -> None:
    with pytest.raises(ConfigError, match=r"model_type 'llama'.*known types: qwen"):
        table_for("llama")
