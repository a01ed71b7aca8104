"""What is written is read again as it was, by us and, where peft is installed, by peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwenrt
from qwenrt.config import read_model_config
from qwenrt.errors import RequestError
from qwenrt.loader.adapters import read_adapter, write_adapter
from qwenrt.ops.types import AdapterWeights, LoraPair, TokenRows
from tests.loader.adapters.peft_models import ADAPTERS, RECORDED, load_in_peft, peft_logits
from tests.loader.adapters.test_reader import SERVED, base_of, loaded, logits_of, recorded_logits

DEMO = Path(qwenrt.__file__).parent / "demo"
WRITTEN = [name for name in SERVED if ADAPTERS[name][1].get("bias", "none") == "none" and name != "router"]


def rewritten(name: str, directory: Path, **options: object) -> Path:
    """peft's adapter, read and written."""
    base = base_of(ADAPTERS[name][0])
    adapter, info = read_adapter(RECORDED / name, base.config, base=base)
    write_adapter(directory, base.config, adapter, base=base, base_name=f"/somewhere/{info.base}", **options)  # type: ignore[arg-type]
    return directory


@pytest.mark.parametrize("name", WRITTEN)
def test_read_written_read(name: str, tmp_path: Path) -> None:
    kind = ADAPTERS[name][0]
    base, model = base_of(kind), loaded(RECORDED / kind)
    for layout in ("experts", "fused") if kind == "qwen3_moe" else (None,):
        path = rewritten(name, tmp_path / str(layout), moe_layout=layout, rslora=name == "dora")
        adapter, info = read_adapter(path, base.config, base=base, strict=True)
        for made, wanted in zip(logits_of(model, adapter), recorded_logits(name), strict=True):
            assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert info.base == kind and all(t.dtype == torch.float32 for t in adapter.tensors if t.dim() > 1)
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_peft_names_and_shapes(tmp_path: Path) -> None:
    """The same names and shapes as peft's own file, and the layout that it converts to and from."""
    for name in WRITTEN:
        given = load_file(RECORDED / name / "adapter_model.safetensors")
        made = load_file(rewritten(name, tmp_path / name, moe_layout="fused") / "adapter_model.safetensors")
        expected = {n: t.shape for n, t in given.items() if ".base_layer.weight" not in n}
        assert {n: t.shape for n, t in made.items()} == expected
        if "base_layer" in str(expected):
            assert all(torch.equal(made[n], given[n]) for n in expected if "experts" in n)


def trained_experts() -> AdapterWeights:
    """Pairs as training makes them: of gate and up each its own."""

    def pair(rows: int, columns: int, first: int = 0) -> LoraPair:
        return LoraPair(torch.randn(3, columns) * 0.3, torch.randn(rows, 3) * 0.3, 2.0, first)

    linears = {"layers.0.qkv_proj": (pair(16, 16),), "layers.1.qkv_proj": (pair(16, 16),)}
    for name in [f"layers.{n}.experts.{e}" for n in range(2) for e in range(4)]:
        linears[f"{name}.gate_up_proj"] = pair(12, 16), pair(12, 16, 12)
        linears[f"{name}.down_proj"] = (pair(16, 12),)
    return AdapterWeights(linears)


def test_experts_in_both_layouts_are_the_same_pairs(tmp_path: Path) -> None:
    config, adapter = read_model_config(RECORDED / "qwen3_moe"), trained_experts()
    write_adapter(tmp_path / "each", config, adapter)
    write_adapter(tmp_path / "fused", config, adapter, moe_layout="fused")
    fused, _ = read_adapter(tmp_path / "fused", config, strict=True)
    write_adapter(tmp_path / "again", config, fused)
    each, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("each", "again"))
    assert any(".experts.3.up_proj.lora_B" in name for name in each) and len(each) == 2 * 2 * (1 + 4 * 3)
    assert each.keys() == again.keys() and all(torch.equal(each[name], again[name]) for name in each)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("each", "again")]
    assert texts[0] == texts[1]


def test_the_config_follows_the_pairs(tmp_path: Path) -> None:
    config = read_model_config(RECORDED / "qwen3_moe")

    def pair(rows: int, columns: int, rank: int, first: int = 0) -> LoraPair:
        return LoraPair(torch.randn(rank, columns), torch.randn(rows, rank), 2.0, first)

    linears = {
        "layers.0.qkv_proj": (pair(16, 16, 3), pair(8, 16, 4, 24)),
        "layers.1.qkv_proj": (pair(16, 16, 4),),
    }
    for e in range(4):
        linears[f"layers.1.experts.{e}.gate_up_proj"] = (pair(12, 16, 4), pair(12, 16, 4, 12))
    write_adapter(tmp_path / "a", config, AdapterWeights(linears), rslora=True, dropout=0.1)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["base_model_name_or_path"]) == (
        4,
        8,
        0.1,
        None,
    )
    assert said["rank_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 3}
    assert said["alpha_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 6}
    assert "q_proj" in said["target_modules"] and "model.layers.0.self_attn.v_proj" in said["target_modules"]
    assert "use_rslora" not in said  # peft doubles the ranks of single experts, which is no factor for rsLoRA
    adapter, _ = read_adapter(tmp_path / "a", config, strict=True)
    assert adapter.linears.keys() == linears.keys()
    for name, pairs in linears.items():
        for one, other in zip(pairs, adapter.linears[name], strict=True):
            assert torch.equal(one.a, other.a) and (one.scale, one.first) == (other.scale, other.first)


def test_parts_of_what_the_file_has_in_one_piece_are_one_pair(tmp_path: Path) -> None:
    """Queries, keys and values of a Qwen-1: of another rank and scale each, and none for the keys."""
    config, model = read_model_config(DEMO), loaded(DEMO)
    size = config.hidden_size
    own = [
        LoraPair(torch.randn(rank, size) * 0.3, torch.randn(size, rank) * 0.3, scale, first)
        for rank, scale, first in ((2, 1.0, 0), (3, 0.5, 2 * size))
    ]
    adapter = AdapterWeights({"layers.1.qkv_proj": tuple(own)})
    write_adapter(tmp_path / "a", config, adapter)
    read, _ = read_adapter(tmp_path / "a", config, strict=True)
    assert [len(pair.a) for pair in read.linears["layers.1.qkv_proj"]] == [5]
    for made, wanted in zip(logits_of(model, read), logits_of(model, adapter), strict=True):
        assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    scaled = LoraPair(own[0].a, own[0].b, 1.0, 0, torch.ones(size))
    with pytest.raises(RequestError, match="one module in the file"):
        write_adapter(tmp_path / "b", config, AdapterWeights({"layers.1.qkv_proj": (scaled, own[1])}))


def test_what_peft_has_no_form_for(tmp_path: Path) -> None:
    config = read_model_config(RECORDED / "qwen2")
    ids = torch.tensor([3])
    rows = TokenRows(torch.ones(1, 16), ids)
    with pytest.raises(RequestError, match="head and embedding are one"):
        write_adapter(tmp_path / "a", config, AdapterWeights({}, rows, TokenRows(torch.zeros(1, 16), ids)))
    across = LoraPair(torch.ones(2, 16), torch.ones(20, 2))
    with pytest.raises(RequestError, match=r"covers rows 0 to 20"):
        write_adapter(tmp_path / "a", config, AdapterWeights({"layers.0.qkv_proj": (across,)}))
    dora = LoraPair(torch.ones(2, 16), torch.ones(16, 2), 1.0, 0, torch.ones(16))
    with pytest.raises(RequestError, match="base="):
        write_adapter(tmp_path / "a", config, AdapterWeights({"layers.0.o_proj": (dora,)}))
    with pytest.raises(RequestError, match="one of experts, fused"):
        write_adapter(tmp_path / "a", config, AdapterWeights(), moe_layout="both")
    assert not (tmp_path / "a" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_peft_loads_it_with_our_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    kind = ADAPTERS[name][0]
    path = rewritten(name, tmp_path / "a", rslora=name == "dora")
    for made, wanted in zip(
        peft_logits(load_in_peft(RECORDED / kind, path)), recorded_logits(name), strict=True
    ):
        assert (made - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [None, "fused"])
def test_peft_loads_experts_with_our_logits(layout: str | None, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base, model, adapter = base_of("qwen3_moe"), loaded(RECORDED / "qwen3_moe"), trained_experts()
    write_adapter(tmp_path / "a", base.config, adapter, base=base, moe_layout=layout)
    made = peft_logits(load_in_peft(RECORDED / "qwen3_moe", tmp_path / "a"))
    for one, wanted in zip(made, logits_of(model, adapter), strict=True):
        assert (one - wanted).abs().max() <= 1e-5 * wanted.abs().max()
