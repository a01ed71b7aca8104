"""config.json in both spellings, hostile and contradictory files, the environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.config import (
    Environment,
    GenerationConfig,
    QuantConfig,
    parse_model_config,
    read_json,
    read_model_config,
)
from qwenrt.config.layers import num_parameters
from qwenrt.errors import ConfigError

LATE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "model_type": "qwen",
}
EARLY: dict[str, Any] = {
    "padded_vocab_size": 151936,
    "n_embd": 4096,
    "n_layer": 32,
    "n_head": 32,
    "kv_channels": 128,
    "ffn_hidden_size": 22016,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "seq_length": 8192,
    "n_positions": 32768,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "n_inner": None,
    "activation": "swiglu",
    "pos_emb": "rotary",
}


def test_both_spellings_mean_the_same() -> None:
    assert parse_model_config(EARLY) == parse_model_config(LATE)


def test_the_mlp_width_is_halved_once() -> None:
    assert parse_model_config(LATE).intermediate_size == 11008


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ((24, 2048, 16, 11008, 151936), 1_836_828_672),
        ((32, 4096, 32, 22016, 151936), 7_721_324_544),
        ((40, 5120, 40, 27392, 152064), 14_167_290_880),
        ((80, 8192, 64, 49152, 152064), 72_287_920_128),
    ],
)
def test_parameter_counts_of_the_releases(shape: tuple[int, ...], parameters: int) -> None:
    layers, hidden, heads, intermediate, vocab = shape
    config = parse_model_config(
        LATE
        | {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "vocab_size": vocab,
        }
    )
    assert num_parameters(config) == parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"hidden_size": 4095}, "does not divide into 32 heads"),
        ({"kv_channels": 64}, "kv_channels 64 x 32 heads is 2048, hidden_size is 4096"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rotary_emb_base": 0}, "rotary_emb_base is 0"),
        ({"rotary_emb_base": float("nan")}, "rotary_emb_base is nan"),
        ({"intermediate_size": 22017}, "intermediate_size is 22017"),
        ({"seq_length": None}, "no seq_length"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are all true"),
        ({"use_logn_attn": "yes"}, "use_logn_attn is 'yes'"),
        ({"rotary_pct": 0.01}, "rotates 1 of them"),
        (
            {"model_type": "qwen4_exp"},
            "model_type is 'qwen4_exp' (Qwen3.8-Flash-Next): it has several residual",
        ),
        ({"model_type": "qwen9"}, "model_type is 'qwen9' (a Qwen this version does not know)"),
        ({"model_type": "llama"}, "model_type is 'llama' (not a Qwen)"),
        ({"model_type": ["qwen"]}, "(not a Qwen)"),
        ({"model_type": "Qwen3"}, """model_type is 'Qwen3'. Write "model_type": "qwen3"."""),
        ({"model_type": "qwen2-VL"}, 'Write "model_type": "qwen2_vl".'),
        ({"model_type": None, "seq_length": None}, "no model_type. Add it"),
        ({"quantization_config": {"bits": 3, "group_size": 128}}, "3-bit GPTQ"),
        ({"quantization_config": {"bits": 4, "group_size": 0}}, "group_size is 0"),
        (
            {"quantization_config": {"bits": 4, "quant_method": "bitsandbytes"}},
            "quant_method is 'bitsandbytes'",
        ),
        ({"quantization_config": {"bits": 4, "quant_method": ["gptq"]}}, "quant_method is ['gptq']"),
        ({"quantization_config": {"bits": 3, "quant_method": "awq"}}, "3-bit AWQ"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "the AWQ layout is 'gemv'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size is",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "without config_groups"),
        ({"quantization_config": [1]}, "quantization_config is [1]"),
    ],
)
def test_contradictions_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_config(LATE | change)
    assert message in str(caught.value)


def test_code_named_by_a_checkpoint_is_never_looked_at() -> None:
    hostile = LATE | {"auto_map": {"AutoConfig": "evil.Config"}, "_attn_implementation_internal": "x/y"}
    assert parse_model_config(hostile) == parse_model_config(LATE)


def test_quantisation_of_config_json_comes_before_the_sidecar() -> None:
    config = parse_model_config(
        LATE | {"quantization_config": {"bits": 8, "group_size": -1}}, {"bits": 4, "group_size": 128}
    )
    assert config.quant == QuantConfig(bits=8, group_size=-1)
    v2 = parse_model_config(LATE, {"bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2"})
    assert v2.quant is not None and v2.quant.zero_offset == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a git-lfs pointer"),
        (b"<!DOCTYPE html><html>login</html>", "an HTML page"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_and_crlf_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{\r\n"a": 1\r\n}')
    assert read_json(path) == {"a": 1}


def test_a_missing_file_says_what_a_model_directory_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file\. Is this a model directory"):
        read_model_config(tmp_path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*LATE, *EARLY, "quantization_config", "rotary_pct"]), _json))
def test_any_json_gives_a_config_or_a_config_error(changes: dict[str, Any]) -> None:
    try:
        config = parse_model_config(LATE | changes)
    except ConfigError as error:
        assert error.asked and error.remedy
    else:
        assert config.head_dim * config.num_heads == config.hidden_size


GENERATION_KEYS = (
    *("chat_format", "eos_token_id", "pad_token_id", "stop_words_ids", "max_window_size", "max_new_tokens"),
    *("top_k", "top_p", "do_sample", "repetition_penalty", "temperature", "decay_bound"),
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(GENERATION_KEYS),
        _json,
    )
)
def test_any_generation_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        GenerationConfig.from_dict(changes)
    except ConfigError as error:
        assert error.asked


def test_generation_config_of_a_chat_checkpoint() -> None:
    config = GenerationConfig.from_dict(
        {
            "chat_format": "chatml",
            "eos_token_id": 151643,
            "pad_token_id": 151643,
            "max_window_size": 24000,
            "max_new_tokens": 512,
            "do_sample": True,
            "top_k": 0,
            "top_p": 0.8,
            "repetition_penalty": 1.1,
            "stop_words_ids": [[151643]],
            "decay_factor": 1,
        }
    )
    assert config.eos_token_ids == (151643,) and config.stop_words_ids == ((151643,),)
    assert (config.max_window_size, config.sampling.top_p, config.sampling.max_tokens) == (24000, 0.8, 512)
    assert GenerationConfig.from_dict({"do_sample": False}).sampling.greedy
    assert GenerationConfig.from_dict({}).max_window_size == 6144


def test_environment_is_read_in_one_place(tmp_path: Path) -> None:
    env = Environment.read({"QWENRT_HOME": str(tmp_path), "HF_ENDPOINT": "http://m", "QWENRT_OFFLINE": "1"})
    assert (env.cache_dir, env.hf_endpoint, env.offline) == (tmp_path, "http://m", True)
    assert json.dumps(str(Environment.read({}).cache_dir))
    with pytest.raises(ConfigError, match="QWENRT_NUM_THREADS"):
        Environment.read({"QWENRT_NUM_THREADS": "many"})
