"""Checkpoints as tools and people leave them: what the file holds decides, module by module, and oddities load.

Each is built with transformers, changed as some writer changes it, and compared with the same network in float32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwenrt.backends.cpu.kernels import Kernels
from qwenrt.cli import main
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import INDEX, open_checkpoint
from qwenrt.loader.memory.footprint import weight_bytes
from qwenrt.loader.memory.preflight import storage_of
from qwenrt.ops.types import Packed
from tests.kernel_sets import needs_kernels
from tests.model.tiny_models import (
    MOE,
    PROMPT,
    QWEN2_MOE,
    build,
    error_against,
    linears,
    load,
    reloaded,
    rewrite,
    set_weights,
    weights,
)
from tests.ops.quantised_checkpoints import (
    awq_config,
    awq_state,
    fp8_config,
    fp8_state,
    gptq_config,
    gptq_state,
)

WIDE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
EXPERTS = {**MOE, "num_experts": 8, "moe_intermediate_size": 32, "norm_topk_prob": True}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("tied")
    return build("Qwen2", {"tie_word_embeddings": True}, directory), directory


def copy_of(source: Path, target: Path, tensors: State | None = None, **config: Any) -> None:
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    rewrite(target, weights(source) if tensors is None else tensors, **config)


# ---- head and embedding


def test_a_tied_head_shares_memory_with_the_embedding(tied: tuple[Any, Path], tmp_path: Path) -> None:
    oracle, source = tied
    tensors = weights(source)
    assert HEAD not in tensors and error_against(oracle, source) <= 1e-4
    # its own copy; what sharded training leaves
    for head in (tensors[EMBEDDING].clone(), torch.empty(0, 48)):
        copy_of(source, tmp_path, {**tensors, HEAD: head})
        assert error_against(oracle, tmp_path) <= 1e-4
        with load(tmp_path) as llm:
            model = llm._assembled.model
            assert model.lm_head.data["weight"].data_ptr() == model.embed_tokens.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_its_own_serves_whatever_the_flag_says(
    tied: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    """A merged adapter leaves a trained head beside the flag; one value in the last row tells the two apart."""
    oracle, source = tied
    tensors = weights(source)
    head = tensors[EMBEDDING].clone()
    head[-1, -1] += 3
    copy_of(source, tmp_path, {**tensors, HEAD: head.to(dtype)})
    with torch.no_grad():
        hidden = oracle.model(torch.tensor([PROMPT])).last_hidden_state[0]
    with load(tmp_path) as llm:
        assert float((llm.logits(PROMPT) - hidden @ head.to(dtype).float().t()).abs().max()) <= 1e-4
        assert not llm._assembled.config.tie_word_embeddings
    assert "tie_word_embeddings" in caplog.text and "the file's own head serves" in caplog.text


def test_a_head_without_an_embedding_is_both_where_they_are_tied(
    tied: tuple[Any, Path], tmp_path: Path
) -> None:
    oracle, source = tied
    tensors = weights(source)
    only_head = {(HEAD if name == EMBEDDING else name): tensor for name, tensor in tensors.items()}
    copy_of(source, tmp_path, only_head)
    assert error_against(oracle, tmp_path) <= 1e-4
    rewrite(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 missing: model.embed_tokens.weight") as caught:
        load(tmp_path)
    assert "ownload" not in str(caught.value)


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_flags_on_two_levels_mean_tied_where_either_says_so(
    tied: tuple[Any, Path], tmp_path: Path, outer: bool | None, inner: bool | None
) -> None:
    oracle, source = tied
    text = json.loads((source / "config.json").read_text()) | {"model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
    del text["tie_word_embeddings"]
    nested: dict[str, Any] = {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 32}}
    nested["text_config"] = text if inner is None else {**text, "tie_word_embeddings": inner}
    if outer is not None:
        nested["tie_word_embeddings"] = outer
    named = {k.replace("model.", "model.language_model.", 1): v for k, v in weights(source).items()}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    rewrite(tmp_path, named)
    if outer or inner:
        assert error_against(oracle, tmp_path) <= 1e-4
    else:
        with load(tmp_path) as llm, pytest.raises(RequestError, match="no lm_head"):
            llm.logits(PROMPT)


def test_untied_and_without_a_head_a_model_embeds_and_does_not_write(
    tied: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Released embedding models are so: names without the outer module, a flag that says untied, and no head."""
    oracle, source = tied
    inner = {name.removeprefix("model."): tensor for name, tensor in weights(source).items()}
    copy_of(source, tmp_path, inner, tie_word_embeddings=False)
    with torch.no_grad():
        wanted = oracle.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
    with load(tmp_path) as llm:
        got = llm._assembled.engine.pooled([PROMPT], lambda states: states[-1])[0]
        assert float((got - wanted).abs().max()) <= 1e-4
        for ask in (
            lambda: llm.generate(prompt_token_ids=PROMPT, max_tokens=2),
            lambda: llm.logits(PROMPT),
            lambda: llm._assembled.engine.last_logits([PROMPT], [1]),
        ):
            with pytest.raises(RequestError, match=r"has no lm_head.*It makes embeddings"):
                ask()
        with load(source) as whole:
            assert llm._assembled.model.weight_bytes == whole._assembled.model.weight_bytes
    assert "texts can be embedded, not written" in caplog.text


# ---- zeros of a symmetric GPTQ file


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_symmetric_zero_is_the_middle_code_however_it_is_stored(
    tmp_path: Path, bits: int, form: str
) -> None:
    oracle = build("Qwen3", WIDE, tmp_path)
    state, exact = gptq_state(weights(tmp_path), linears(weights(tmp_path)), bits, 32)
    set_weights(oracle, exact)
    config = gptq_config(bits, 32) | {"checkpoint_format": form}
    middle = 2 ** (bits - 1)
    for stored in (middle - 1, middle):
        word = sum(stored << (bits * i) for i in range(32 // bits))
        word -= 2**32 if word >= 2**31 else 0
        zeros = {k: torch.full_like(v, word) for k, v in state.items() if k.endswith("qzeros")}
        rewrite(tmp_path, {**state, **zeros}, quantization_config=config)
        assert error_against(oracle, tmp_path) <= 1e-3
    zeros = {k: torch.zeros_like(v) for k, v in zeros.items()}
    rewrite(tmp_path, {**state, **zeros}, quantization_config=config)
    found = (
        rf"every stored zero is 0, and sym: true means {middle}, which is stored as {middle - 1} or {middle}"
    )
    with pytest.raises(CheckpointError, match=found):
        load(tmp_path)


# ---- each linear in its own form


@pytest.mark.parametrize("kind", ["Qwen3Moe", "Qwen2Moe"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_a_quantised_router_is_the_matrix_its_codes_mean(tmp_path: Path, kind: str, method: str) -> None:
    shape = {**WIDE, **EXPERTS, **({"shared_expert_intermediate_size": 32} if kind == "Qwen2Moe" else {})}
    oracle = build(kind, shape, tmp_path)
    tensors = weights(tmp_path)
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith("mlp.gate.weight")]
    names = [*linears(tensors), *routers]
    assert len(routers) == 3
    if method == "gptq":
        state, exact = gptq_state(tensors, names, 4, 32)
        config = gptq_config(4, 32)
    elif method == "awq":
        state, dense = awq_state(tensors, names, 32)
        exact, config = {**tensors, **dense}, awq_config(32)
    else:
        state, dense = fp8_state(tensors, names, (16, 32))
        exact, config = {**tensors, **dense}, fp8_config((16, 32))
        exact |= {k: v.bfloat16().float() for k, v in dense.items() if ".mlp.gate." not in k}
    rewrite(tmp_path, state, quantization_config=config)
    oracle = reloaded(oracle, exact, tmp_path)
    assert error_against(oracle, tmp_path) <= 1e-3


def test_gptq_whose_modules_have_other_bits_and_groups_or_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``dynamic`` of GPTQModel: its patterns are not matched, the file tells; a pattern could match for ever."""
    oracle = build("Qwen2", WIDE, tmp_path)
    tensors = weights(tmp_path)
    forms: dict[Callable[[str], bool], tuple[int, int] | None] = {
        lambda name: "q_proj" in name: (8, 16),
        lambda name: "v_proj" in name or name.startswith("model.layers.1.mlp"): None,
        lambda name: "down_proj" in name: (4, 24),
        lambda name: True: (4, 32),
    }
    state, exact = dict(tensors), dict(tensors)
    left = set(linears(tensors))
    for matches, form in forms.items():
        names = [name for name in sorted(left) if matches(name)]
        left -= set(names)
        if form is not None:
            one, dense = gptq_state(
                {k: v for k, v in tensors.items() if k[: k.rindex(".")] in names}, names, *form
            )
            state = {k: v for k, v in state.items() if k[: k.rindex(".")] not in names} | one
            exact |= dense
    rules = {"-:(a+)+v_proj.*": {}, "+:.*q_proj": {"bits": 8, "group_size": 16}, ".*down": {"group_size": 24}}
    rewrite(tmp_path, state, quantization_config=gptq_config(4, 32) | {"dynamic": rules})
    set_weights(oracle, exact)
    with torch.no_grad():
        size = float(oracle(torch.tensor([PROMPT])).logits.abs().max())
    assert error_against(oracle, tmp_path) <= 1e-4 * size
    with load(tmp_path) as llm:
        model, config, backend = llm._assembled.model, llm._assembled.config, llm._assembled.backend
        qkv, down = model.get("layers.0.qkv_proj"), model.get("layers.0.down_proj")
        assert [p.bits for p in qkv.data["parts"]] == [8, 4, 16] and (down.bits, down.group_size) == (4, 24)
        assert model.get("layers.1.down_proj").kind.startswith("dense")
        counted = weight_bytes(config, storage_of(backend, torch.float32, "float32"))
        assert abs(counted - model.weight_bytes) <= 0.02 * model.weight_bytes
        assert "float32 and int4 and int8 weights" in llm.summary
        sizes = [line.split(" weights")[0] for line in llm.explain().splitlines() if " weights: " in line]
        assert {"int8", "int4", "float32"} == set(sizes)
    assert main(["estimate", str(tmp_path), "--device", "cpu", "--memory", "1"]) == 0
    said = "gptq int4 in groups of 32 and int4 in groups of 24 and int8 in groups of 16, the rest"
    assert said in capsys.readouterr().out
    # without g_idx the groups that the config names must tell
    for name in [k for k in state if k.endswith("g_idx")]:
        del state[name]
    rewrite(tmp_path, state)
    assert error_against(oracle, tmp_path) <= 1e-4 * size
    rewrite(tmp_path, quantization_config=gptq_config(4, 32) | {"dynamic": {"x": {"group_size": 24}}})
    with pytest.raises(CheckpointError, match=r"q_proj.scales \[4, 64\], expected \[2, 64\]") as caught:
        load(tmp_path)
    assert "ownload" not in str(caught.value)


@needs_kernels
def test_the_check_at_load_looks_at_each_form_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at those that config.json does not name: here the kernel of 8 bits is wrong, of which one part is made."""
    build("Qwen2", WIDE, tmp_path)
    tensors = weights(tmp_path)
    eights = [name for name in linears(tensors) if "layers.1" in name and "k_proj" in name]
    fours = [name for name in linears(tensors) if name not in eights]
    state = gptq_state({k: v for k, v in tensors.items() if k[: k.rindex(".")] not in eights}, fours, 4, 32)[
        0
    ]
    wide = {k: v for k, v in tensors.items() if k[: k.rindex(".")] in eights}
    state |= gptq_state(wide, eights, 8, 16)[0]
    rewrite(tmp_path, state, quantization_config=gptq_config(4, 32))
    with load(tmp_path) as llm:
        assert not llm.backend.demoted
        wanted = llm.logits(PROMPT)
    multiply = Kernels.quant_linear

    def wrong(self: Kernels, x: torch.Tensor, w: Packed, how: Any) -> torch.Tensor | None:
        y = multiply(self, x, w, how)
        return y if y is None or w.bits == 4 else y * 1.01

    monkeypatch.setattr(Kernels, "quant_linear", wrong)
    with load(tmp_path) as llm:
        assert llm.backend.demoted.keys() == {"linear"}
        assert torch.allclose(llm.logits(PROMPT), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def test_codes_of_bits_that_are_not_read_are_named(tmp_path: Path) -> None:
    build("Qwen3", WIDE, tmp_path)
    state, _ = gptq_state(weights(tmp_path), linears(weights(tmp_path)), 4, 32)
    name = "model.layers.1.self_attn.o_proj"
    state[f"{name}.qweight"] = torch.zeros(6, 64, dtype=torch.int32)
    state[f"{name}.qzeros"] = torch.zeros(2, 6, dtype=torch.int32)
    rewrite(tmp_path, state, quantization_config=gptq_config(4, 32))
    found = rf"1 in a format that is not supported: {name} \(codes of 3 bits; those of 4 and 8 are read\)"
    with pytest.raises(CheckpointError, match=found) as caught:
        load(tmp_path)
    assert "ownload" not in str(caught.value)


def test_awq_with_modules_left_dense(tmp_path: Path) -> None:
    """All of a layer, one part of a merged linear, single experts: whatever modules_to_not_convert says."""
    oracle = build("Qwen3Moe", {**WIDE, **EXPERTS}, tmp_path)
    tensors = weights(tmp_path)
    kept = ("layers.0.", "k_proj", "experts.3.up_proj", "experts.5.down_proj")
    names = [name for name in linears(tensors) if not any(part in name for part in kept)]
    state, dense = awq_state(tensors, names, 32)
    rewrite(tmp_path, state, quantization_config=awq_config(32) | {"modules_to_not_convert": ["layers.9"]})
    assert error_against(reloaded(oracle, {**tensors, **dense}, tmp_path), tmp_path) <= 1e-3


CACHE_SCALES = (
    "k_proj.k_scale",
    "v_proj.v_scale",
    "kv_scale",
    "attn.k_scale",
    "k_proj.output_scale",
    "q_scale",
)


@pytest.mark.parametrize("strategy", ["block", "channel", "tensor"])
def test_fp8_beside_dense_modules_and_scales_of_a_cache(tmp_path: Path, strategy: str) -> None:
    """As compressed-tensors writes it, scales of a calibrated cache included, which has its own here."""
    oracle = build("Qwen3", WIDE, tmp_path)
    tensors = weights(tmp_path)
    names = [name for name in linears(tensors) if "v_proj" not in name and "layers.2.mlp" not in name]
    grid = {"block": (16, 32), "channel": None, "tensor": (4096, 4096)}[strategy]
    state, dense = fp8_state(tensors, names, grid)
    if strategy != "channel":
        state = {k.replace("weight_scale_inv", "weight_scale"): v for k, v in state.items()}
    if strategy == "tensor":
        state = {k: v.reshape(()) if k.endswith("weight_scale") else v for k, v in state.items()}
    for layer in range(3):
        state |= {f"model.layers.{layer}.self_attn.{name}": torch.ones(1) for name in CACHE_SCALES}
    config = fp8_config(None)
    kind = {"strategy": strategy} | ({"block_structure": [16, 32]} if strategy == "block" else {})
    config["config_groups"]["group_0"]["weights"] |= kind
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    rewrite(tmp_path, state, quantization_config=config)
    set_weights(oracle, {**tensors, **{k: v.bfloat16().float() for k, v in dense.items()}})
    assert error_against(oracle, tmp_path) <= 1e-4
    with load(tmp_path, quantize="int8") as llm:
        model = llm._assembled.model
        for name in ("layers.0.qkv_proj", "layers.2.down_proj", "layers.0.down_proj"):
            linear = model.get(name)
            assert {p.bits for p in linear.data.get("parts", [linear])} == {8}, name
        got = llm.logits(PROMPT)
    with torch.no_grad():
        wanted = oracle(torch.tensor([PROMPT])).logits[0]
    assert float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min()) > 0.98


@pytest.mark.parametrize("others", [torch.bfloat16, torch.float16])
def test_a_float32_part_beside_16_bits_keeps_its_values(tmp_path: Path, others: torch.dtype) -> None:
    """Neither rounded to the first part's dtype nor infinite beside float16."""
    oracle = build("Qwen2", WIDE, tmp_path)
    tensors = {k: v.to(others) for k, v in weights(tmp_path).items()}
    big = {k: v.float() * 1e5 for k, v in weights(tmp_path).items() if "v_proj" in k}
    back = {k: (v.float() * 1e-5) for k, v in tensors.items() if "o_proj" in k}
    mixed = {**tensors, **big, **back}
    rewrite(tmp_path, mixed)
    set_weights(oracle, {k: v.float() for k, v in mixed.items()})
    with torch.no_grad():
        size = float(oracle(torch.tensor([PROMPT])).logits.abs().max())
    assert error_against(oracle, tmp_path) <= 1e-5 * size
    with load(tmp_path, quantize="int8") as llm:
        assert bool(torch.isfinite(llm.logits(PROMPT)).all())
    with pytest.raises(
        CheckpointError, match=r"qkv_proj.*in float16: it has values of up to .*dtype=.bfloat16"
    ):
        load(tmp_path, dtype="float16")


def test_a_dequantised_file_under_a_config_that_says_quantised_is_dense(
    tied: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle, source = tied
    copy_of(source, tmp_path, quantization_config=gptq_config(4, 32))
    assert error_against(oracle, tmp_path) <= 1e-4
    assert "all of its weights are dense" in caplog.text
    with load(tmp_path, quantize="int8") as llm:
        assert llm._assembled.model.get("layers.0.qkv_proj").bits == 8


# ---- what an index says


def sharded(directory: Path, tensors: State, **changes: Any) -> None:
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[:12], names[12:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({k: tensors[k].contiguous() for k in part}, directory / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(v.nbytes for v in tensors.values())}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize("count", ["bytes", "tensors", "parameters", "words", "nothing"])
def test_a_total_size_that_counts_something_else(
    tied: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, count: str
) -> None:
    oracle, source = tied
    tensors = weights(source)
    totals = {
        "bytes": sum(v.nbytes for v in tensors.values()),
        "tensors": len(tensors),
        "parameters": sum(v.numel() for v in tensors.values()),
        "words": "12 GB",
    }
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    sharded(tmp_path, tensors, metadata={"total_size": totals[count]} if count in totals else {})
    with caplog.at_level(logging.WARNING):
        assert error_against(oracle, tmp_path) <= 1e-4
    warned = [r for r in caplog.records if "its total_size" in r.getMessage()]
    assert len(warned) == (1 if count in ("tensors", "parameters") else 0)


def test_an_index_that_still_names_a_head_that_was_dropped(
    tied: tuple[Any, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle, source = tied
    tensors = weights(source)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    sharded(tmp_path, tensors)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][HEAD] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert error_against(oracle, tmp_path) <= 1e-4
    assert f"1 tensors that it names are in no file: {HEAD}" in caplog.text
    lost = "model.layers.1.mlp.up_proj.weight"
    sharded(tmp_path, {k: v for k, v in tensors.items() if k != lost})
    with pytest.raises(CheckpointError, match=f"incomplete: layers.1.gate_up_proj lacks {lost}"):
        load(tmp_path)


def test_the_config_of_what_is_stored_is_settled(tied: tuple[Any, Path]) -> None:
    """A second look changes nothing, so that whoever asks may ask again."""
    _, source = tied
    with load(source) as llm:
        config = llm._assembled.config
    assert as_stored(config, open_checkpoint(source)) == config


def test_shared_experts_gates_are_read_like_routers(tmp_path: Path) -> None:
    oracle = build("Qwen2Moe", QWEN2_MOE, tmp_path)
    assert error_against(oracle, tmp_path) <= 1e-4
    gate = "model.layers.0.mlp.shared_expert_gate.weight"
    rewrite(tmp_path, {**weights(tmp_path), gate: torch.ones(2, 48)})
    with pytest.raises(CheckpointError, match=r"shared_expert_gate.weight \[2, 48\], expected \[1, 48\]"):
        load(tmp_path)
