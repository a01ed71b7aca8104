"""adapter_config.json: what is read, refused and written; patterns from files."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenrt.config.adapter import AdapterConfig, as_peft_writes, portable_base, read_adapter_config
from qwenrt.config.patterns import Pattern
from qwenrt.errors import ConfigError

Q, UP = "model.layers.3.self_attn.q_proj", "model.layers.12.mlp.experts.7.up_proj"


def read(tmp_path: Path, **content: Any) -> AdapterConfig:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", **content}), encoding="utf-8")
    return read_adapter_config(path)


def test_peft_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config == AdapterConfig(rank=8, alpha=8)
    assert config.scale_of(Q, 8) == 1.0


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"target_modules": ["q_proj"]}, {Q}),
        ({"target_modules": ["proj"]}, set()),  # the end after a dot, not of a word
        ({"target_modules": [UP]}, {UP}),
        ({"target_modules": r".*\.(q_proj|up_proj)$"}, {Q, UP}),
        ({"target_modules": r"q_proj"}, set()),  # a pattern is for the whole name
        ({"target_modules": r"^(?!.*experts).*(?:q_proj|up_proj).*"}, {Q}),
        ({"target_modules": "all-linear"}, {Q, UP}),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, {UP}),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*experts.*"}, {Q}),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [3, 7]}, {Q}),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 12}, {UP}),
        ({"target_modules": ["up_proj"], "layers_to_transform": 7, "layers_pattern": "experts"}, {UP}),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["self_attn"]}, {"lm_head"}),
    ],
)
def test_targets(tmp_path: Path, content: dict[str, Any], wanted: set[str]) -> None:
    config = read(tmp_path, **content)
    assert {module for module in (Q, UP, "lm_head") if config.is_target(module)} == wanted


def test_ranks_and_scales_by_pattern(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        r=16,
        lora_alpha=32,
        rank_pattern={"q_proj": 4, r".*\.up_proj": 64},
        alpha_pattern={r"layers\.3\.self_attn\.q_proj": 2, "_proj": 9},
        use_rslora=True,
    )
    assert [config.rank_of(module) for module in (Q, UP, "lm_head")] == [4, 64, 16]
    assert config.scale_of(Q, 4) == 1.0  # 2 / sqrt(4)
    assert config.alpha_of(UP) == 32  # a key is the end after a dot: _proj is none


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base that this has changed"),
        ({"r": 0}, "an integer from 1 to"),
        ({"r": "eight"}, "an integer from 1 to"),
        ({"lora_alpha": 0}, "above 0"),
        ({"bias": "some"}, "one of none, all, lora_only"),
        ({"target_modules": 3}, "a list of names"),
        ({"rank_pattern": [1]}, "an object"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern of adapter_config.json"),
        ({"trainable_token_indices": [1, 1]}, "each once"),
        ({"trainable_token_indices": [-1]}, "each once"),
        ({"layers_to_transform": ["a"]}, "a layer's number"),
    ],
)
def test_refused_by_name(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        read(tmp_path, **content)


def test_unknown_settings_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, brand_new=3, brand_off=False, use_qalora=False, eva_config={"rho": 2.0})
    assert "brand_new" in caplog.text and "brand_off" not in caplog.text and "eva_config" not in caplog.text


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = AdapterConfig(
        rank=4, alpha=2.5, targets=("q_proj", "up_proj"), excluded=("k_proj",), layers=(1, 2),
        rank_pattern=(("q_proj", 2),), alpha_pattern=((r".*\.up_proj", 7.0),), kept_modules=("lm_head",),
        token_rows=(("embed_tokens", (3, 5)),), rslora=True, dora=True, bias="all", base="Qwen/Qwen3-4B", tie=True,
    )  # fmt: skip
    assert read(tmp_path, **as_peft_writes(config)) == config
    plain = as_peft_writes(AdapterConfig())
    assert "use_dora" not in plain and plain["lora_alpha"] == 8 and isinstance(plain["lora_alpha"], int)


def test_base_is_named_so_that_it_can_be_moved() -> None:
    assert portable_base("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert portable_base("/models/of/mine/my-base/") == "my-base"
    assert portable_base("C:\\models\\my-base") == "my-base"
    assert portable_base("../base") == "base" and portable_base(None) is None


# ---- patterns

_atoms = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\.", r"\w", r"\d", r"\bab", "(?=a)", "(?!b)", "(?:ab|b)", "^", "$"]
)
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=6,
)  # fmt: skip


@given(_patterns, st.text("ab.1", max_size=6))
def test_patterns_mean_what_python_means(source: str, text: str) -> None:
    assert Pattern(source, "test").matches(text) == (re.fullmatch(source, text) is not None)


@pytest.mark.parametrize(
    "source",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*)*(.*)*x",
        "((((((a*)*)*)*)*)*)*b",
        "(?:a{1000}){1000}",
        "(^{1000}){1000}{1000}",
    ],
)
def test_no_pattern_runs_for_ever(source: str) -> None:
    try:
        assert not Pattern(source, "rank_pattern").matches("a" * 300 + "!")
    except ConfigError as error:
        assert "too much work" in str(error)


@pytest.mark.parametrize(
    "source",
    [
        "a" * 1001,
        "(",
        ")",
        "[a",
        "*",
        r"(a)\1",
        "(?i)a",
        "(?<=a)b",
        "a{",
        "a{3,1}",
        "a{9999}",
        "a++",
        "\\",
        "(" * 60,
    ],
)
def test_refused_patterns(source: str) -> None:
    with pytest.raises(ConfigError, match="the pattern"):
        Pattern(source, "target_modules")
