"""Quantised checkpoints with layers of linear attention: each gives what the matrices that its codes mean give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenrt
from qwenrt.config import read_model_config
from qwenrt.config.layers import num_parameters
from qwenrt.errors import CheckpointError
from qwenrt.sampling_params import SamplingParams
from tests.conftest import GOLDEN
from tests.ops.quantised_checkpoints import awq_config, awq_state, fp8_state, gptq_config, gptq_state

LEFT_DENSE = ("in_proj_a", "in_proj_b", "in_proj_ba", "conv1d", "gate", "embed", "lm_head", "norm")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    **{
        "bits": 4,
        "group_size": 16,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
    },
    "extra_config": {
        "model.layers.3.self_attn.o_proj": {"bits": 8, "group_size": 32},
        "model.layers.0.linear_attn.in_proj_a": {"bits": 16, "data_type": "float"},
    },
}


def quantised(
    name: str, how: str, directory: Path, mtp_too: bool = False, rates_too: bool = False
) -> tuple[Path, Path]:
    """(a recorded checkpoint in a quantised form, the same with the matrices that it stands for)."""
    left = ("model.visual.",) if mtp_too else ("mtp.", "model.visual.")
    source = GOLDEN / name
    dense = load_file(source / "model.safetensors")
    modules = [
        key.removesuffix(".weight")
        for key, tensor in dense.items()
        if key.endswith(".weight") and tensor.dim() == 2 and not key.startswith(left)
    ]
    left_dense = tuple(n for n in LEFT_DENSE if "in_proj" not in n) if rates_too else LEFT_DENSE
    modules = [m for m in modules if not m.rpartition(".")[2].startswith(left_dense) or "gate_proj" in m]
    modules = [m for m in modules if dense[f"{m}.weight"].shape[1] % 16 == 0]
    modules = [m for m in modules if dense[f"{m}.weight"].shape[0] % 8 == 0]
    if how == "fp8":
        (state, exact), quant = fp8_state(dense, modules, (16, 16)), FP8
        exact = {name: matrix.bfloat16().float() for name, matrix in exact.items()}  # as it is served
    elif how == "awq":
        (state, exact), quant = awq_state(dense, modules, 16), awq_config(16)
    elif (
        how == "auto-round"
    ):  # as AutoRound leaves it: rates and the shared expert dense, one module in another form
        some = [m for m in modules if m.endswith("o_proj")]
        (state, exact), quant = gptq_state(dense, [m for m in modules if m not in some], 4, 16), AUTO_ROUND
        bytes_, more = gptq_state({k: v for k, v in dense.items() if k[: k.rindex(".")] in some}, some, 8, 32)
        state = {k: v for k, v in state.items() if k[: k.rindex(".")] not in some} | bytes_
        exact |= {k: v for k, v in more.items() if k in exact}
    else:
        bits = int(how[-1])
        (state, exact), quant = gptq_state(dense, modules, bits, 16), gptq_config(bits, 16)
    found = []
    for kind, tensors, setting in (("codes", state, quant), ("exact", dense | exact, None)):
        target = directory / kind
        shutil.copytree(source, target)
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
        if setting is not None:
            config["quantization_config"] = setting
        (target / "config.json").write_text(json.dumps(config))
        save_file({k: v.contiguous() for k, v in tensors.items()}, target / "model.safetensors")
        found.append(target)
    return found[0], found[1]


def logits(directory: Path, **settings: Any) -> torch.Tensor:
    ids = load_file(GOLDEN / "qwen3_5" / "golden.safetensors")["1.ids"].tolist()
    with qwenrt.load(str(directory), progress=False, activations="exact", dtype="float32", **settings) as llm:
        return llm.logits(ids)


@pytest.mark.parametrize("how", ["gptq4", "gptq8", "awq", "fp8", "auto-round"])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_codes_give_what_they_stand_for(name: str, how: str, tmp_path: Path) -> None:
    codes, exact = quantised(name, how, tmp_path)
    wanted = logits(exact)
    torch.testing.assert_close(logits(codes), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


def test_rates_in_codes_as_some_quantisers_leave_them(tmp_path: Path) -> None:
    codes, exact = quantised("qwen3_next", "gptq4", tmp_path, rates_too=True)
    assert "model.layers.0.linear_attn.in_proj_ba.qweight" in load_file(codes / "model.safetensors")
    wanted = logits(exact)
    torch.testing.assert_close(logits(codes), wanted, atol=1e-3 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_decides_what_is_remembered_is_not_rounded_at_load(quantize: str) -> None:
    with qwenrt.load(str(GOLDEN / "qwen3_next"), progress=False, quantize=quantize) as llm:
        model = llm._assembled.model
        assert model.get("layers.0.rates_proj").bits == 16  # type: ignore[union-attr]
        assert model.get("layers.0.in_proj").bits == int(quantize[-1])  # type: ignore[union-attr]
        said = llm.generate(
            prompt_token_ids=[1, 2, 3],
            sampling_params=SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
        )
        assert len(said.token_ids) == 4


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5", "qwen3_5_vl", "qwen3_5_moe"])
def test_parameters_are_those_in_the_file(name: str) -> None:
    tensors = load_file(GOLDEN / name / "model.safetensors")
    there = sum(
        t.numel() for k, t in tensors.items() if not k.startswith(("mtp.", "model.visual.", "model.mtp."))
    )
    config = read_model_config(GOLDEN / name)
    assert num_parameters(config) == there


def test_a_projection_that_is_there_twice_is_named(tmp_path: Path) -> None:
    """Whole and in parts: neither is passed over."""
    shutil.copytree(GOLDEN / "qwen3_next", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    packed = tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    tensors["model.layers.0.linear_attn.in_proj_z.weight"] = packed[:64].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 unexpected: model\.layers\.0\.linear_attn\.in_proj_z\.weight"
    ):
        qwenrt.load(str(tmp_path / "m"), progress=False)
