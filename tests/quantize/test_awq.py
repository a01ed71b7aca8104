"""AWQ: factors that change no output before rounding, that lower the error after it, and files that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qwenrt.errors import RequestError
from qwenrt.ops.types import CanonicalWeight
from qwenrt.ops.weights import dequantize
from qwenrt.quantize import awq
from qwenrt.quantize.awq import search
from qwenrt.quantize.run import Quantizer
from qwenrt.quantize.solver import Grid, relative_error, rounded
from tests.model import tiny_models
from tests.quantize.test_quantize import TEXTS, divergence, logits, made

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}


def test_weights_of_large_inputs_are_rounded_finer() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    x[:, [3, 40]] *= 30
    weight, hessian = torch.randn(96, 64), x.t() @ x
    factors = search([(weight, hessian)], Grid(4, 32, sym=False))
    assert factors[[3, 40]].min() > factors[torch.arange(64) != 40].median() * 2
    plain = dequantize(rounded(weight, Grid(4, 32, sym=False)), torch.float32)
    scaled = dequantize(rounded(weight * factors, Grid(4, 32, sym=False)), torch.float32) / factors
    assert relative_error(weight, scaled, hessian) < 0.7 * relative_error(weight, plain, hessian)


def test_inputs_that_never_come_leave_the_weights() -> None:
    assert search([(torch.randn(8, 32), torch.zeros(32, 32))], Grid(4, 32)).tolist() == [1.0] * 32


MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": {"num_key_value_heads": 4},  # values' factors go into v_proj and its bias
    "Qwen3": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3Moe": {**tiny_models.MOE, "moe_intermediate_size": 32},
}


def built(kind: str, directory: Path) -> Path:
    tiny_models.build(kind, {**SIZES, **MODELS[kind], "initializer_range": 0.1}, directory)
    return directory


@pytest.mark.parametrize("kind", [*MODELS, "plain", "qwen3_5_moe", "qwen3_next"])
def test_factors_change_nothing_but_the_rounding(
    kind: str, golden_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With codes of so many bits that rounding is nothing, the model is the same: what was multiplied in weights is
    divided where their inputs come from, by just as much."""
    source = golden_dir / kind
    if kind in MODELS:
        source = built(kind, tmp_path / "source")
    seen: list[list[torch.Tensor]] = []
    effect = Quantizer.effect

    def noted(self: Quantizer) -> Any:
        seen.append([torch.cat(stream.states) for stream in self._measured.values()])
        return effect(self)

    own: dict[int, tuple[CanonicalWeight, torch.Tensor]] = {}  # what codes were made of, by their id

    def noting(weight: torch.Tensor, grid: Grid, diagonal: torch.Tensor | None = None) -> CanonicalWeight:
        codes = rounded(weight, grid, diagonal)
        own[id(codes)] = codes, weight
        return codes

    def not_rounded(weight: CanonicalWeight, dtype: torch.dtype) -> torch.Tensor:
        return own[id(weight)][1] if id(weight) in own else dequantize(weight, dtype)

    factors: list[torch.Tensor] = []

    def random_factors(linears: Any, grid: Grid) -> torch.Tensor:
        factors.append(
            torch.exp(torch.randn(linears[0][0].shape[1], generator=torch.manual_seed(len(factors))))
        )
        return factors[-1]

    monkeypatch.setattr(Quantizer, "effect", noted)
    monkeypatch.setattr(awq, "rounded", noting)
    monkeypatch.setattr(awq, "search", random_factors)
    monkeypatch.setattr("qwenrt.quantize.run.search", random_factors)
    monkeypatch.setattr("qwenrt.quantize.layer.dequantize", not_rounded)
    texts = [[token % 120 for token in text] for text in TEXTS]
    made(source, tmp_path / "out", method="awq", calibration=texts)
    of_source, _, result = seen[0]
    assert len(factors) >= 4
    assert (result - of_source).norm() < 2e-3 * of_source.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_its_files_are_read_and_are_nearer_than_rounding(kind: str, tmp_path: Path) -> None:
    source = built(kind, tmp_path / "source")
    report = made(source, tmp_path / "out", method="awq")
    assert {linear.method for linear in report.linears} == {"awq"}
    assert sum(linear.error or 0 for linear in report.linears) <= sum(
        linear.rounding_error or 0 for linear in report.linears
    )
    made(source, tmp_path / "rounded", method="rtn", sym=False)
    assert divergence(tmp_path / "out", source) < 1.05 * divergence(tmp_path / "rounded", source)
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["version"], about["zero_point"]) == ("awq", "gemm", True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.self_attn.o_proj"
        assert file.get_slice(f"{name}.qweight").get_shape() == [64, 64 // 8]
        assert file.get_slice(f"{name}.scales").get_dtype() == "F16"
        router = "model.layers.0.mlp.gate"
        assert (router in (about["modules_to_not_convert"] or [])) == (kind == "Qwen3Moe")
    assert torch.isfinite(logits(tmp_path / "out", TEXTS[0])).all()


def test_it_has_four_bits(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="4 bits"):
        made(tmp_path, tmp_path / "out", method="awq", bits=8)
