"""The arithmetic of the footprint against the network's own list of weights and against real packing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrt.backends.base import Backend
from qwenrt.backends.cpu import CPUBackend
from qwenrt.backends.selfcheck import random_weight
from qwenrt.config import ModelConfig, parse_model_config
from qwenrt.config.layers import is_wide, num_active_parameters, num_parameters, num_snapshots, state_bytes
from qwenrt.config.quant import rounded_group
from qwenrt.config.released import RELEASED, released_config
from qwenrt.errors import ConfigError
from qwenrt.loader.memory.footprint import (
    GIB,
    Storage,
    cache_bytes,
    codes_of,
    linears,
    memory_need,
    other_bytes,
    weight_bytes,
)
from qwenrt.loader.memory.preflight import storage_of
from qwenrt.model.qwen import Qwen

CPU = torch.device("cpu")
BF16 = Storage(2, 2)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """config.json of a tiny model of any generation."""
    model_type = draw(
        st.sampled_from(["qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"])
    )
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8, 12]))
    values: dict[str, Any] = {
        "model_type": model_type,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(1, 40)),
        "seq_length": 64,
        "rope_theta": 1e6,
        "tie_word_embeddings": draw(st.booleans()),
    }
    if model_type == "qwen":
        return values | {"no_bias": draw(st.booleans())}
    values["num_key_value_heads"] = kv_heads
    if model_type.startswith("qwen3"):
        values |= {
            "head_dim": head_dim,
            "hidden_size": draw(st.integers(3, 40)),
            "attention_bias": draw(st.booleans()),
        }
    else:
        values["qkv_bias"] = draw(st.booleans())
    if model_type in ("qwen3_next", "qwen3_5"):
        key_heads = draw(st.integers(1, 3))
        values |= {
            "num_experts": draw(st.integers(1, 5)),
            "num_experts_per_tok": 1,
            "moe_intermediate_size": draw(st.integers(1, 20)),
            "shared_expert_intermediate_size": draw(st.integers(1, 20)),
            "head_dim": 2 * head_dim,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": key_heads * draw(st.integers(1, 3)),
            "linear_key_head_dim": draw(st.integers(1, 9)),
            "linear_value_head_dim": draw(st.integers(1, 9)),
            "full_attention_interval": draw(st.integers(1, 4)),
        }
    if model_type.endswith("moe"):
        values |= {
            "num_experts": draw(st.integers(0, 5)),
            "num_experts_per_tok": 1,
            "moe_intermediate_size": draw(st.integers(1, 20)),
            "shared_expert_intermediate_size": draw(st.integers(1, 20)),
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        }
    return values


@given(configs())
@settings(max_examples=150, deadline=None)
def test_it_counts_what_the_network_lists(values: dict[str, Any]) -> None:
    config = parse_model_config(values)
    model = Qwen(config, Backend(CPU), torch.bfloat16)
    wanted = sorted(
        (spec.out_features, spec.in_features, spec.bias)
        for name, spec in model.linear_specs.items()
        if name != "lm_head"
    )
    counted = sorted(
        (linear.rows, linear.columns, linear.bias) for linear in linears(config) for _ in range(linear.number)
    )
    assert counted == wanted
    tensors = {name: dims for name, dims in model.tensor_specs.items() if name != "embed_tokens"}
    wide = sum(torch.Size(dims).numel() for name, dims in tensors.items() if is_wide(config, name))
    others = 2 * sum(torch.Size(dims).numel() for dims in tensors.values())
    assert other_bytes(config, 2) == others + 2 * wide
    assert weight_bytes(config, BF16) == 2 * num_parameters(config) + 2 * wide


def _filled(config: ModelConfig, backend: Backend, dtype: torch.dtype, bits: int, group: int) -> Qwen:
    """A model with random weights, kept as the loader keeps those of a bfloat16 checkpoint."""
    model = Qwen(config, backend, dtype)
    kept = backend.weight_dtype("bfloat16", dtype)
    for name, dims in model.tensor_specs.items():
        own = torch.float32 if is_wide(config, name) else dtype
        model.set_tensor(name, torch.ones(dims, dtype=kept if name == "embed_tokens" else own))
    for name, spec in model.linear_specs.items():
        if name == "lm_head" and config.tie_word_embeddings:
            model.set_linear(name, backend.pack_linear(_dense(model.embed_tokens), dtype))
            continue
        kept_bits, size = bits if spec.quantizable else 16, min(group, spec.in_features)
        weight = random_weight(spec.out_features, spec.in_features, kept_bits, size)
        if weight.dense is not None:
            weight = _dense(weight.dense.bfloat16())
        elif bits == 8:
            assert weight.zeros is not None and weight.zeros.numel() > 1
            weight.zeros[0, :2] = torch.tensor([3, 5])  # two values are surely there
        bias = torch.ones(spec.out_features) if spec.bias else None
        model.set_linear(name, backend.pack_linear(dataclasses.replace(weight, bias=bias), dtype))
    return model


def _dense(matrix: torch.Tensor) -> Any:
    return dataclasses.replace(random_weight(1, 1, 16, 1), dense=matrix)


@given(
    configs(),
    st.sampled_from([None, "int8", "int4"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_it_is_to_the_byte_what_packing_takes(
    values: dict[str, Any], quantize: str | None, dtype: torch.dtype, on_cpu: bool
) -> None:
    config = parse_model_config(values | {"vocab_size": 40})
    backend = CPUBackend(CPU) if on_cpu else Backend(CPU)
    bits = {None: 16, "int8": 8, "int4": 4}[quantize]
    model = _filled(config, backend, dtype, bits, rounded_group(bits))
    assert weight_bytes(config, storage_of(backend, dtype, "bfloat16"), quantize) == model.weight_bytes


def test_experts_gates_and_norms_are_in_it() -> None:
    config = released_config("Qwen1.5-MoE-A2.7B")
    assert config is not None and config.moe is not None
    assert sum(linear.number for linear in linears(config)) == 24 * (2 + 2 + 2 * 60)
    assert other_bytes(config, 2) == 2 * (24 * (2 * 2048 + 60 * 2048 + 2048) + 2048)


# Billions of parameters, and of those a token meets, as the releases' own pages give them.
PUBLISHED = {
    "Qwen-1_8B": (1.84, 1.84),
    "Qwen-72B": (72.3, 72.3),
    "Qwen1.5-0.5B": (0.62, 0.62),
    "Qwen1.5-32B": (32.5, 32.5),
    "Qwen1.5-110B": (111.2, 111.2),
    "Qwen2.5-0.5B": (0.49, 0.49),
    "Qwen2.5-1.5B": (1.54, 1.54),
    "Qwen2.5-3B": (3.09, 3.09),
    "Qwen2.5-7B": (7.61, 7.61),
    "Qwen2.5-14B": (14.7, 14.7),
    "Qwen2.5-72B": (72.7, 72.7),
    "Qwen3-8B": (8.2, 8.2),
    "Qwen3-14B": (14.8, 14.8),
    "Qwen3-32B": (32.8, 32.8),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "Qwen2-57B-A14B": (57.4, 14.2),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen3-235B-A22B": (235.0, 22.0),
    "Qwen3-Coder-480B-A35B": (480.0, 35.4),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_have_the_size_they_are_known_for(name: str) -> None:
    config = released_config(name)
    assert config is not None
    assert linears(config)
    if name in PUBLISHED:
        counts = (num_parameters(config) / 1e9, num_active_parameters(config) / 1e9)
        assert counts == pytest.approx(PUBLISHED[name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "like", "method", "positions"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B", "awq", 32768),
        ("qwen-7b-chat-int4", "Qwen-7B", "gptq", 32768),
        ("Qwen2.5-72B-Instruct-GPTQ-Int8", "Qwen2.5-72B", "gptq", 32768),
        ("Qwen3-8B-FP8", "Qwen3-8B", "fp8", 40960),
        ("Qwen2.5-Coder-7B-Instruct", "Qwen2.5-7B", None, 32768),
        ("Qwen3-Coder-30B-A3B-Instruct", "Qwen3-30B-A3B", None, 262144),
        ("Qwen3-4B-Thinking-2507", "Qwen3-4B", None, 262144),
        ("Qwen3-30B-A3B-Instruct-2507-FP8", "Qwen3-30B-A3B", "fp8", 262144),
        ("Qwen-1.8B-Chat", "Qwen-1_8B", None, 32768),
    ],
)
def test_names_of_repositories_are_understood(
    name: str, like: str, method: str | None, positions: int
) -> None:
    config, plain = released_config(name), released_config(like)
    assert config is not None and plain is not None
    assert (config.quant.method if config.quant else None) == method
    assert config.max_position_embeddings == positions
    assert dataclasses.replace(
        config, quant=None, max_position_embeddings=0, train_length=0
    ) == dataclasses.replace(plain, max_position_embeddings=0, train_length=0)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_other_names_are_no_shape(name: str) -> None:
    config = released_config(name)
    assert config is None or isinstance(config, ModelConfig)
    assert released_config("Qwen3-9B" + name) is None


def test_what_codes_linears_are_served_from() -> None:
    dense, gptq, fp8 = (released_config(f"Qwen3-8B{suffix}") for suffix in ("", "-GPTQ-Int4", "-FP8"))
    assert dense is not None and gptq is not None and fp8 is not None
    assert codes_of(dense, None) is None and codes_of(fp8, None) is None
    four, eight = codes_of(gptq, None), codes_of(fp8, "int8")
    assert four == gptq.quant == codes_of(gptq, "int4")
    assert eight is not None and (eight.bits, eight.group_size, eight.has_codes) == (8, 128, True)
    with pytest.raises(ConfigError, match="already quantised to 4 bits"):
        codes_of(gptq, "int8")
    with pytest.raises(ConfigError, match="not a known way"):
        codes_of(dense, "int3")


def test_fp8_is_counted_as_what_it_becomes() -> None:
    dense, fp8 = released_config("Qwen3-8B"), released_config("Qwen3-8B-FP8")
    assert dense is not None and fp8 is not None
    assert weight_bytes(fp8, BF16) == weight_bytes(dense, BF16)
    assert weight_bytes(fp8, BF16, "int8") == weight_bytes(dense, BF16, "int8")


def test_the_cache_is_whole_blocks_of_every_user() -> None:
    config = released_config("Qwen3-8B")
    assert config is not None
    assert memory_need(config, BF16, 17, users=3).cache == cache_bytes(config, 96, 2) == 96 * 144 * 1024


@given(
    st.sampled_from(RELEASED),
    st.integers(1, 40000),
    st.integers(1, 40),
    st.sampled_from([None, "int8", "int4"]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_more_never_takes_less(name: str, context: int, users: int, quantize: str | None, cpu: bool) -> None:
    config = released_config(name)
    assert config is not None
    storage = Storage(4, 2, kernels=True, on_host=True) if cpu else BF16
    need = memory_need(config, storage, context, users=users, quantize=quantize)
    assert memory_need(config, storage, context + 1, users=users, quantize=quantize).total >= need.total
    assert memory_need(config, storage, context, users=users + 1, quantize=quantize).total >= need.total
    assert min(need.weights, need.cache, need.workspace) > 0


def test_plain_torch_needs_room_for_a_whole_matrix() -> None:
    config = released_config("Qwen-7B")
    assert config is not None
    kernels = memory_need(config, Storage(4, 2, kernels=True, on_host=True), 512, quantize="int4")
    plain = memory_need(config, BF16, 512, quantize="int4")
    assert plain.workspace - kernels.workspace > GIB // 2
    assert plain.workspace > 15 * 22016 * 4096


def test_absurd_sizes_are_answered_at_once() -> None:
    values: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "hidden_size": 2**17,
        "num_hidden_layers": 1024,
        "num_attention_heads": 4096,
        "head_dim": 4096,
        "num_experts": 4096,
        "num_experts_per_tok": 4096,
        "moe_intermediate_size": 2**20,
        "intermediate_size": 2**20,
        "vocab_size": 2**22,
        "max_position_embeddings": 2**24,
        "rope_theta": 1e6,
    }
    with pytest.raises(ConfigError, match="no Qwen comes near"):
        parse_model_config(values)
    most = parse_model_config(
        values | {"hidden_size": 64, "num_experts": 64, "num_experts_per_tok": 1, "num_hidden_layers": 512}
    )
    assert memory_need(most, BF16, 2**24, users=4096).total > 2**60
    for name in ("hidden_size", "num_experts", "vocab_size", "num_hidden_layers"):
        with pytest.raises(ConfigError, match=name):
            parse_model_config(values | {name: 10**15})


def test_the_states_of_all_that_may_run_are_counted_and_some_beside_them() -> None:
    config = released_config("Qwen3-Next-80B-A3B")
    assert config is not None
    one, tokens = state_bytes(config, 2), cache_bytes(config, 1024, 2)
    assert one == 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)
    for sequences, states in ((1, 4), (2, 6), (16, 20)):
        assert memory_need(config, BF16, 1024, sequences=sequences).cache == tokens + states * one
        assert num_snapshots(sequences, 0) + sequences == states
    assert memory_need(config, BF16, 1024).cache == tokens + 4 * one
    assert (
        num_snapshots(16, affordable=10) == 10
        and num_snapshots(16, affordable=1000) == num_snapshots(16) == 48
    )
