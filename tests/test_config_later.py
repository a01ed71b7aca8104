"""config.json of later generations as writers leave it: one setting in two places, and values that mean none."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.config import (
    GenerationConfig,
    ModelConfig,
    QuantConfig,
    YarnConfig,
    parse_model_config,
    read_model_config,
)
from qwenrt.config.layers import num_parameters
from qwenrt.errors import ConfigError

BASE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
READ = YarnConfig(4.0, 8192, 0.1 * 1.3862943611198906 + 1.0)


def read(*levels: dict[str, Any]) -> ModelConfig:
    """The config of a text model or, of two levels, of a vision-language wrapper and its text."""
    if len(levels) == 1:
        return parse_model_config(BASE | levels[0])
    outer, inner = levels
    text = {**BASE, "model_type": "qwen2_5_vl_text", **inner}
    text = {name: value for name, value in text.items() if value != "absent"}
    return parse_model_config({"model_type": "qwen2_5_vl", "text_config": text, **outer})


# ---- positions


@pytest.mark.parametrize(
    "levels",
    [
        ({"rope_scaling": YARN},),
        ({"rope_parameters": YARN},),
        ({"rope_parameters": PLAIN, "rope_scaling": YARN},),
        ({"rope_parameters": YARN, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},),
        ({"rope_parameters": YARN, "rope_scaling": {**YARN, "rope_type": None, "type": "yarn"}},),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}},),
        ({"rope_scaling": {**YARN, "rope_type": "default", "type": "yarn"}},),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 8192.0}},),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 8192},),
        ({"rope_scaling": YARN}, {}),
        ({}, {"rope_scaling": YARN}),
        ({"rope_scaling": YARN}, {"rope_parameters": PLAIN}),
        ({"rope_scaling": YARN}, {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}),
        ({"rope_parameters": PLAIN, "rope_theta": 1e6}, {"rope_scaling": YARN}),
    ],
)
def test_yarn_is_read_wherever_it_stands(levels: tuple[dict[str, Any], ...]) -> None:
    config = read(*levels)
    assert config.yarn == READ and config.rope_theta == 1e6
    assert config.max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("levels", "named"),
    [
        (({"rope_parameters": PLAIN, "rope_scaling": YARN},), ("rope_scaling", "rope_parameters")),
        (
            ({"rope_scaling": YARN}, {"rope_scaling": PLAIN}),
            ("rope_scaling of the outer level", "rope_scaling"),
        ),
        (({"rope_scaling": {"rope_type": "default", "factor": 4.0}},), ("rope_type 'default'", "factor 4.0")),
        (({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 10000.0}},), ("rope_theta 1e+06", "10000")),
        (({"dtype": "float32", "torch_dtype": "bfloat16"},), ("dtype 'float32'", "torch_dtype 'bfloat16'")),
        (({"vocab_size": 300}, {}), ("vocab_size 288 in text_config", "300 beside it")),
    ],
)
def test_what_says_less_is_named_in_a_warning(
    levels: tuple[dict[str, Any], ...], named: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    read(*levels)
    assert len(caplog.records) == 1
    assert all(word in caplog.text for word in (*named, "the first is used"))


@pytest.mark.parametrize(
    ("levels", "named"),
    [
        (
            ({"rope_parameters": YARN, "rope_scaling": {**YARN, "factor": 2.0}},),
            ("rope_parameters", "factor=4.0", "rope_scaling", "factor=2.0"),
        ),
        (({"rope_parameters": {"partial_rotary_factor": 0.25}},), ("partial_rotary_factor", "0.25")),
        (({"rope_scaling": {"factor": 4.0}},), ("a factor 4.0 and no rope_type",)),
        (({"rope_parameters": {"rope_theta": 5e6}},), ("rope_parameters.rope_theta 5e+06", "rope_theta 1e+06")),
        (({"rope_theta": 5e6}, {}), ("rope_theta 1e+06", "rope_theta of the outer level 5e+06")),
        (
            ({"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}},),
            ("layers of several kinds different positions",),
        ),
        (({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},), ("type is 'linear'",)),
        (
            ({"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 16},),
            ("num_experts 8", "num_local_experts 16"),
        ),
        (
            ({"quantization_config": {"bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"}},),
            ("checkpoint_format 'gptq'", "format 'gptq_v2'"),
        ),
        (
            (
                {
                    "model_type": "qwen", "seq_length": 64, "n_head": 8, "num_attention_heads": 4, "n_layer": 2,
                    "num_hidden_layers": 2,
                },
            ),
            ("n_head 8", "num_attention_heads 4"),
        ),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(levels: tuple[dict[str, Any], ...], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*levels)
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert "ownload" not in str(caught.value) and "etch" not in str(caught.value)


@pytest.mark.parametrize(
    ("levels", "named"),
    [
        (({"layer_types": ["sliding_attention"] * 4, "sliding_window": 64},), ("use_sliding_window false",)),
        (({"layer_types": ["full_attention"] * 3},), ("num_hidden_layers 4", "3 layer_types")),
        (
            (
                {
                    "quantization_config": {"bits": 4},
                    "compression_config": {"quant_method": "compressed-tensors"},
                },
            ),
            ("quantization_config", "compression_config"),
        ),
        (
            ({"quantization_config": {"bits": 4}}, {"quantization_config": {"bits": 8}}),
            ("'bits': 8} in text_config", "'bits': 4} beside it"),
        ),
    ],
)
def test_what_contradicts_and_does_no_harm_is_named_in_a_warning(
    levels: tuple[dict[str, Any], ...], named: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    read(*levels)
    assert len(caplog.records) == 1 and all(word in caplog.text for word in named), caplog.text


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", 5, None])
def test_a_kind_of_layers_that_is_not_computed_is_refused_whatever_the_window(kind: Any) -> None:
    for limited in (False, True):
        with pytest.raises(ConfigError, match="layer_types is"):
            read({"layer_types": [kind] * 4, "use_sliding_window": limited, "sliding_window": 64})


def test_a_name_that_stands_twice_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Readers of JSON take the last, and say nothing."""
    plain = json.dumps(BASE)
    (tmp_path / "config.json").write_text(f'{plain[:-1]}, "rope_theta": 5e5, "x": {{"y": 1, "y": 1}}}}')
    assert read_model_config(tmp_path).rope_theta == 5e5
    assert len(caplog.records) == 1
    assert "config.json says rope_theta 500000.0 and before that 1000000.0: the first is used" in caplog.text


def test_plain_positions_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for rope in ({}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": PLAIN}):
        assert read(rope).yarn is None
    assert read({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, {}).yarn is None
    assert not caplog.records


# ---- the outer level of a wrapper


def test_a_text_config_is_completed_by_what_stands_around_it() -> None:
    quant = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    config = read(
        {"vocab_size": 288, "eos_token_id": [7, 8], "torch_dtype": "bfloat16", "quantization_config": quant},
        {"vocab_size": "absent", "eos_token_id": 5},
    )
    assert config.vocab_size == 288 and config.dtype == "bfloat16"
    assert config.eos_token_ids == (5, 7, 8) and config.quant == QuantConfig(4, 64)
    flat = {**BASE, "model_type": "qwen2_5_vl", "text_config": None}
    assert parse_model_config(flat) == read({})


def test_the_sidecar_of_a_quantised_checkpoint_completes_config_json(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours = {"bits": 4, "group_size": 128, "checkpoint_format": None}
    config = parse_model_config(
        BASE | {"quantization_config": ours}, {"bits": 4, "checkpoint_format": "gptq_v2"}
    )
    assert config.quant is not None and config.quant.zero_offset == 0 and not caplog.records
    parse_model_config(BASE | {"quantization_config": ours}, {"bits": 8, "group_size": 128})
    assert "bits 4 in quantization_config" in caplog.text and "8 in quantize_config.json" in caplog.text
    parse_model_config(BASE | {"quantization_config": ours}, {"quant_method": "awq", "w_bit": 4})
    assert "quant_method 'gptq' in quantization_config" in caplog.text
    with pytest.raises(ConfigError, match=r"reading quantize_config.json: no bits"):
        parse_model_config(BASE, {"group_size": 128})
    with pytest.raises(ConfigError, match=r"reading quantization_config of config.json: no bits"):
        parse_model_config(BASE | {"quantization_config": {"group_size": 128}})


def test_the_older_name_of_a_compressed_files_quantisation() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel"}
    about = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    quant = read({"compression_config": about}).quant
    assert quant is not None and quant.method == "fp8"


def test_dynamic_rules_of_gptq_tell_group_sizes_alone() -> None:
    rules = {"-:(a+)+$": {}, "+:.*q_proj": {"bits": 8, "group_size": 32}, ".*down": {"group_size": -1}}
    quant = {"bits": 4, "group_size": 128, "dynamic": rules}
    config = read({"quantization_config": quant}).quant
    assert config is not None and config.other_groups == (-1, 32) and config.group_size == 128
    for rules in (None, False, {}):
        assert read({"quantization_config": {**quant, "dynamic": rules}}).quant == QuantConfig(4, 128)
    with pytest.raises(ConfigError, match=r"dynamic is \[1\]"):
        read({"quantization_config": {**quant, "dynamic": [1]}})


AUTO_ROUND = {
    "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
    "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers", "autoround_version": "0.9",
    "extra_config": {
        "model.layers.0.linear_attn.in_proj_a": {"bits": 16, "data_type": "float"},
        ".*shared_expert.*": {"bits": 8, "group_size": 32},
    },
}  # fmt: skip


def test_auto_rounds_own_config_is_that_of_the_layout_it_names() -> None:
    def quant(**fields: Any) -> QuantConfig | None:
        return read({"quantization_config": {**AUTO_ROUND, **fields}}).quant

    assert quant() == QuantConfig(4, 128, other_groups=(32,))
    assert quant(quant_method="intel/auto-round", extra_config=None, act_bits=16) == QuantConfig(4, 128)
    assert quant(packing_format="auto_round:auto_awq") == QuantConfig(
        4, 128, sym=False, zero_offset=0, method="awq"
    )


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format is 'auto_round:llm_compressor'"),
        ({"packing_format": None}, "packing_format is None. Supported are: auto_round:auto_gptq"),
        ({"data_type": "mx_fp4"}, "data_type 'mx_fp4', with activations of 16 bits"),
        ({"act_bits": 8}, "data_type 'int', with activations of 8 bits"),
        ({"bits": 3}, "3-bit GPTQ weights"),
        ({"extra_config": [1]}, r"extra_config is \[1\]"),
    ],
)
def test_what_auto_round_writes_and_is_not_read_is_named(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        read({"quantization_config": {**AUTO_ROUND, **fields}})


def test_the_names_awq_had_first() -> None:
    quant = {"quant_method": "AWQ", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
    config = read({"quantization_config": quant}).quant
    assert config is not None and (config.method, config.group_size) == ("awq", 64)


# ---- values that mean none, or are written in another way


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"max_position_embeddings": 32768.0, "hidden_size": 64.0}, {}),
        ({"num_key_value_heads": 2.0, "head_dim": None, "hidden_act": None}, {}),
        ({"eos_token_id": 151645.0}, {"eos_token_ids": (151645,)}),
        ({"eos_token_id": [7, -1]}, {"eos_token_ids": (7,)}),
        ({"eos_token_id": -1, "pad_token_id": -1}, {"eos_token_ids": ()}),
        ({"dtype": None, "torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"dtype": "float8_e4m3fn"}, {"dtype": None}),
        ({"tie_word_embeddings": 1}, {"tie_word_embeddings": True}),
        ({"use_sliding_window": 0, "sliding_window": None, "max_window_layers": None}, {}),
        ({"use_sliding_window": True, "sliding_window": None}, {}),
        ({"use_sliding_window": True, "sliding_window": -1}, {}),
        (
            {"use_sliding_window": True, "sliding_window": 4096.0, "max_window_layers": 3},
            {"windows": (0, 0, 0, 4096)},
        ),
        ({"quantization_config": None}, {}),
        ({"rope_theta": 1000000}, {}),
    ],
)
def test_oddities_that_mean_something_plain(
    change: dict[str, Any], expected: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config, plain = read(change), read({})
    for name in ("eos_token_ids", "dtype", "tie_word_embeddings", "windows", "hidden_size", "yarn"):
        assert getattr(config, name) == expected.get(name, getattr(plain, name)), name
    assert num_parameters(config) == (num_parameters(plain) - (288 * 64 if config.tie_word_embeddings else 0))
    assert len(caplog.records) <= 1


def test_a_fraction_is_no_size() -> None:
    for name in ("hidden_size", "max_position_embeddings", "eos_token_id"):
        for value in (64.5, float("nan"), float("inf"), 1e300, True, "64"):
            with pytest.raises(ConfigError, match=f"{name} is"):
                read({name: value})


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": None, "top_p": None, "temperature": None, "min_p": None}, {}),
        ({"top_k": 20.0, "max_new_tokens": 64.0}, {"top_k": 20, "max_tokens": 64}),
        ({"top_p": 0}, {"top_k": 1, "top_p": 1.0}),
        ({"top_p": 0.0, "top_k": 20}, {"top_k": 1}),
        ({"max_new_tokens": -1}, {"max_tokens": 512}),
        ({"pad_token_id": -1, "eos_token_id": -1}, {}),
        ({"do_sample": 0}, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0}),
    ],
)
def test_oddities_of_a_generation_config(
    said: dict[str, Any], meant: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = GenerationConfig.from_dict(said)
    for name, value in meant.items():
        assert getattr(config.sampling, name) == value
    assert config.eos_token_ids == ()
    assert len(caplog.records) <= 2


@pytest.mark.parametrize("said", [{"top_p": 1.5}, {"temperature": -1}, {"top_k": "20"}, {"top_p": False}])
def test_what_no_sampler_knows_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"generation_config.json: sampling parameter {next(iter(said))}"):
        GenerationConfig.from_dict(said)


def test_sampling_is_read_from_config_json_where_no_other_file_says_it(tmp_path: Path) -> None:
    filled_in = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "do_sample": False, "repetition_penalty": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **filled_in}))
    assert GenerationConfig.from_dir(tmp_path).sampling == GenerationConfig.from_dict({}).sampling
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **filled_in, "top_p": 0.7, "top_k": 20}))
    sampling = GenerationConfig.from_dir(tmp_path).sampling
    assert (sampling.top_p, sampling.top_k, sampling.temperature) == (0.7, 20, 1.0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 5}))
    assert GenerationConfig.from_dir(tmp_path).sampling.top_k == 5
    assert GenerationConfig.from_dir(tmp_path).sampling.top_p == 1.0


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["yarn", "mrope"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["factor", "rope_type", "type", "rope_theta", "bits", "dynamic"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
KEYS = (
    *BASE,
    *(
        "rope_parameters",
        "rope_scaling",
        "eos_token_id",
        "dtype",
        "torch_dtype",
        "sliding_window",
        "head_dim",
    ),
    *("use_sliding_window", "quantization_config", "tie_word_embeddings", "num_experts", "num_local_experts"),
)


@given(
    st.sampled_from(["qwen2", "qwen3", "qwen3_moe"]),
    st.dictionaries(st.sampled_from(KEYS), _json, max_size=4),
    st.dictionaries(st.sampled_from(KEYS), _json, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_any_json_on_either_level_gives_a_config_or_a_config_error(
    model_type: str, outer: dict[str, Any], inner: dict[str, Any]
) -> None:
    logging.getLogger("qwenrt").setLevel(logging.ERROR)
    try:
        for levels in (
            (inner,),
            (outer | {"model_type": "qwen3_vl_moe"}, inner | {"model_type": model_type}),
        ):
            try:
                config = read(*levels)
            except ConfigError as error:
                assert error.asked and error.found and error.remedy
            else:
                assert config.num_heads % config.num_kv_heads == 0
    finally:
        logging.getLogger("qwenrt").setLevel(logging.NOTSET)
