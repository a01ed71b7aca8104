"""Loading: every tensor in its place or in the one error, merged, packed, and no more memory than it takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenrt.backends.base import Backend
from qwenrt.config import parse_model_config, read_model_config
from qwenrt.errors import CapacityError, CheckpointError, ConfigError
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.weights import LoadReport, load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.reference import linear
from qwenrt.ops.types import Packed

CONFIG = {
    "model_type": "qwen",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "intermediate_size": 96,
    "seq_length": 64,
}
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def tensors_of(dtype: torch.dtype = torch.float32) -> Tensors:
    d, i, v = 32, 48, 96
    shapes = {"transformer.wte.weight": (v, d), "lm_head.weight": (v, d), "transformer.ln_f.weight": (d,)}
    for n in range(2):
        at = f"transformer.h.{n}."
        shapes |= {at + "ln_1.weight": (d,), at + "ln_2.weight": (d,), at + "attn.c_attn.weight": (3 * d, d)}
        shapes |= {at + "attn.c_attn.bias": (3 * d,), at + "attn.c_proj.weight": (d, d)}
        shapes |= {
            at + "mlp.w1.weight": (i, d),
            at + "mlp.w2.weight": (i, d),
            at + "mlp.c_proj.weight": (d, i),
        }
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def load(
    directory: Path,
    tensors: Tensors,
    dtype: torch.dtype = torch.float32,
    *,
    quantize: str | None = None,
    **config: object,
) -> tuple[Qwen, LoadReport]:
    save_file(tensors, directory / "model.safetensors")
    parsed = parse_model_config({**CONFIG, **config})
    model = Qwen(parsed, Backend(CPU), dtype)
    return model, load_weights(
        model, directory, parsed, model.backend, dtype, quantize=quantize, progress=False
    )


def packed(model: Qwen, name: str) -> Packed:
    value = model.get(name)
    assert isinstance(value, Packed)
    return value


# ---- everything in its place


def test_each_tensor_lands_where_it_belongs(tmp_path: Path) -> None:
    source = tensors_of()
    model, report = load(tmp_path, source)
    assert not report.ignored
    at = "transformer.h.1."
    gate_up = packed(model, "layers.1.gate_up_proj")
    assert torch.equal(
        gate_up.data["weight"], torch.cat([source[at + "mlp.w2.weight"], source[at + "mlp.w1.weight"]])
    )
    assert gate_up.bias is None
    qkv = packed(model, "layers.1.qkv_proj")
    assert torch.equal(qkv.data["weight"], source[at + "attn.c_attn.weight"])
    assert qkv.bias is not None and torch.equal(qkv.bias, source[at + "attn.c_attn.bias"])
    assert torch.equal(packed(model, "layers.1.down_proj").data["weight"], source[at + "mlp.c_proj.weight"])
    assert torch.equal(packed(model, "lm_head").data["weight"], source["lm_head.weight"])
    assert torch.equal(model.get("layers.1.post_norm"), source[at + "ln_2.weight"])
    assert torch.equal(model.embed_tokens, source["transformer.wte.weight"])


def test_dense_tensors_stay_mapped_where_nothing_is_merged_or_converted(tmp_path: Path) -> None:
    model, _ = load(tmp_path, tensors_of())
    mapped = _mapped_ranges(tmp_path / "model.safetensors")

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in mapped)

    assert is_mapped(model.embed_tokens) and is_mapped(packed(model, "lm_head").data["weight"])
    for name in ("qkv_proj", "o_proj", "down_proj"):
        assert is_mapped(packed(model, f"layers.0.{name}").data["weight"])
    assert not is_mapped(packed(model, "layers.0.gate_up_proj").data["weight"])
    converted, _ = load(tmp_path, tensors_of(), torch.bfloat16)
    assert converted.embed_tokens.dtype == torch.bfloat16


def _mapped_ranges(path: Path) -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]


def test_training_in_place_leaves_the_file_alone(tmp_path: Path) -> None:
    model, _ = load(tmp_path, tensors_of())
    before = (tmp_path / "model.safetensors").read_bytes()
    for _, tensor in model.tensors():
        tensor.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_file_is_let_go_with_the_model(tmp_path: Path) -> None:
    source = tensors_of()
    for _ in range(20):
        model, _ = load(tmp_path, source)
        assert _mapped_ranges(tmp_path / "model.safetensors")
        del model
        assert not _mapped_ranges(tmp_path / "model.safetensors")


def test_a_bar_is_shown_on_request(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, _ = load(tmp_path, tensors_of())
    assert capfd.readouterr().err == ""
    load_weights(model, tmp_path, model.config, model.backend, torch.float32, progress=True)
    assert "loading weights" in capfd.readouterr().err


def test_names_without_the_outer_module_and_old_buffers(tmp_path: Path) -> None:
    source = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of().items()}
    source["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    source["h.0.attn.rotary_emb.inv_freq"] = torch.ones(4)
    _, report = load(tmp_path, source)
    assert sorted(report.ignored) == ["h.0.attn.masked_bias", "h.0.attn.rotary_emb.inv_freq"]


def test_tied_embeddings(tmp_path: Path) -> None:
    source = tensors_of()
    del source["lm_head.weight"]
    model, _ = load(tmp_path, source, tie_word_embeddings=True)
    assert packed(model, "lm_head").data["weight"].data_ptr() == model.embed_tokens.data_ptr()


def test_biases_where_the_config_says_so(tmp_path: Path) -> None:
    source = tensors_of()
    for n in range(2):
        for name, rows in (("attn.c_proj", 32), ("mlp.w1", 48), ("mlp.w2", 48), ("mlp.c_proj", 32)):
            source[f"transformer.h.{n}.{name}.bias"] = torch.full((rows,), 0.0 if name == "mlp.w2" else 2.0)
    model, _ = load(tmp_path, source, no_bias=False)
    bias = packed(model, "layers.0.gate_up_proj").bias
    assert bias is not None and bias.tolist() == [0.0] * 48 + [2.0] * 48
    with pytest.raises(CheckpointError, match=r"8 unexpected: transformer.h.0.attn.c_proj.bias"):
        load(tmp_path, source)


# ---- rounded at load, and read as GPTQ wrote it


@pytest.mark.parametrize(("quantize", "kind", "error"), [("int8", "w8a16", 0.01), ("int4", "w4a16", 0.12)])
def test_quantize_at_load(tmp_path: Path, quantize: str, kind: str, error: float) -> None:
    source = tensors_of()
    model, _ = load(tmp_path, source, quantize=quantize)
    assert packed(model, "lm_head").kind == "dense"
    gate_up = packed(model, "layers.0.gate_up_proj")
    assert gate_up.kind == kind and packed(model, "layers.0.qkv_proj").bias is not None
    x = torch.eye(32)
    exact = torch.cat([source["transformer.h.0.mlp.w2.weight"], source["transformer.h.0.mlp.w1.weight"]])
    assert float((linear(x, gate_up) - exact.t()).norm() / exact.norm()) < error


def test_quantize_says_no(tmp_path: Path, golden_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize='int3'.*Use None"):
        load(tmp_path, tensors_of(), quantize="int3")
    config = read_model_config(golden_dir / "gptq_int4")
    model = Qwen(config, Backend(CPU), torch.float32)
    with pytest.raises(ConfigError, match="already quantised to 4 bits"):
        load_weights(model, golden_dir / "gptq_int4", config, model.backend, torch.float32, quantize="int8")
    load_weights(model, golden_dir / "gptq_int4", config, model.backend, torch.float32, quantize="int4")


def gptq(
    directory: Path, golden_dir: Path, name: str, change: Callable[[Tensors], None] | None = None
) -> Qwen:
    source = load_file(golden_dir / name / "model.safetensors")
    if change is not None:
        change(source)
    save_file(source, directory / "model.safetensors")
    config = read_model_config(golden_dir / name)
    model = Qwen(config, Backend(CPU), torch.float32)
    load_weights(model, directory, config, model.backend, torch.float32)
    return model


def test_gptq_is_packed_and_its_phantom_biases_dropped(tmp_path: Path, golden_dir: Path) -> None:
    model = gptq(tmp_path, golden_dir, "gptq_int4")
    assert packed(model, "layers.0.gate_up_proj").kind == "w4a16"
    assert packed(model, "layers.0.gate_up_proj").bias is None
    assert packed(model, "layers.0.qkv_proj").bias is not None


def test_a_phantom_bias_that_is_not_zero_counts(tmp_path: Path, golden_dir: Path) -> None:
    def change(source: Tensors) -> None:
        source["transformer.h.0.mlp.w1.bias"] += 1

    bias = packed(gptq(tmp_path, golden_dir, "gptq_int4", change), "layers.0.gate_up_proj").bias
    assert bias is not None and bias[:384].eq(0).all() and bias[384:].eq(1).all()


def test_parts_with_different_orders_stay_apart(tmp_path: Path, golden_dir: Path) -> None:
    names = [f"transformer.h.0.mlp.{w}.g_idx" for w in ("w1", "w2")]

    def change(source: Tensors) -> None:
        source[names[0]] = source[names[0]].flip(0).contiguous()

    model = gptq(tmp_path, golden_dir, "gptq_int4_act_order", change)
    gate_up = packed(model, "layers.0.gate_up_proj")
    assert gate_up.kind == "parts" and [p.out_features for p in gate_up.data["parts"]] == [384, 384]
    x = torch.randn(2, 256)
    whole = torch.cat([linear(x, part) for part in gate_up.data["parts"]], dim=-1)
    assert torch.equal(linear(x, gate_up), whole)


def test_gptq_with_a_linear_left_dense(tmp_path: Path, golden_dir: Path) -> None:
    def change(source: Tensors) -> None:
        for kind in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            del source[f"transformer.h.1.mlp.w1.{kind}"]
        source["transformer.h.1.mlp.w1.weight"] = torch.ones(384, 256)

    gate_up = packed(gptq(tmp_path, golden_dir, "gptq_int4", change), "layers.1.gate_up_proj")
    assert [p.kind for p in gate_up.data["parts"]] == ["w4a16", "dense"]


@pytest.mark.parametrize(
    ("kind", "tensor", "found"),
    [
        (
            "qweight",
            torch.zeros(16, 256, dtype=torch.int32),
            r"c_proj.qweight \[16, 256\], expected \[32, 256\]",
        ),
        ("qweight", torch.zeros(32, 256), r"c_proj.qweight F32, expected I32"),
        ("qzeros", torch.zeros(4, 32, dtype=torch.int32), r"c_proj.qzeros \[4, 32\], expected \[2, 32\]"),
        ("scales", torch.ones(2, 255), r"c_proj.scales \[2, 255\]"),
        ("g_idx", torch.full((256,), 7, dtype=torch.int32), "groups 7 to 7"),
        ("scales", torch.full((2, 256), float("nan")), "NaN or infinite"),
    ],
)
def test_gptq_tensors_that_do_not_fit(
    tmp_path: Path, golden_dir: Path, kind: str, tensor: torch.Tensor, found: str
) -> None:
    def change(source: Tensors) -> None:
        source[f"transformer.h.0.attn.c_proj.{kind}"] = tensor

    with pytest.raises(CheckpointError, match=found):
        gptq(tmp_path, golden_dir, "gptq_int4", change)


def test_gptq_tensors_without_a_config_that_says_so(golden_dir: Path) -> None:
    config = dataclasses.replace(read_model_config(golden_dir / "gptq_int4"), quant=None)
    model = Qwen(config, Backend(CPU), torch.float32)
    with pytest.raises(CheckpointError, match=r"config.json has no quantization_config"):
        load_weights(model, golden_dir / "gptq_int4", config, model.backend, torch.float32)


# ---- everything that is wrong, in one error


def problems(tmp_path: Path, source: Tensors, **config: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load(tmp_path, source, **config)  # type: ignore[arg-type]
    assert "are not the model that config.json describes" in error.value.asked and error.value.remedy
    return error.value.found


def test_one_error_lists_all(tmp_path: Path) -> None:
    source = tensors_of()
    del source["transformer.h.0.ln_1.weight"]
    del source["transformer.h.1.mlp.w1.weight"]
    source["transformer.h.5.ln_1.weight"] = torch.ones(32)
    source["model.stray"] = torch.ones(1)
    source["lm_head.weight"] = torch.ones(95, 32)
    source["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int32)
    found = problems(tmp_path, source)
    assert "1 missing: transformer.h.0.ln_1.weight" in found
    assert "2 unexpected: " in found and "model.stray" in found and "transformer.h.5.ln_1.weight" in found
    assert "1 incomplete: layers.1.gate_up_proj lacks transformer.h.1.mlp.w1.weight" in found
    assert "2 of the wrong shape or dtype: " in found
    assert "lm_head.weight [95, 32], expected [96, 32] (config.json says vocab_size 96)" in found
    assert "transformer.ln_f.weight I32, expected F16 or BF16" in found


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    found = problems(tmp_path, {"x": torch.ones(1)})
    assert found.count("transformer.") == 10 and "19 missing" in found and found.count("...") == 1


def test_two_tensors_for_one_place(tmp_path: Path) -> None:
    source = tensors_of()
    source["ln_f.weight"] = torch.ones(32)
    assert "the same as" in problems(tmp_path, source)


def test_vocabulary_of_another_size(tmp_path: Path) -> None:
    found = problems(tmp_path, tensors_of(), vocab_size=100)
    assert "transformer.wte.weight [96, 32], expected [100, 32] (config.json says vocab_size 100)" in found


def test_nothing_is_set_when_the_files_do_not_fit(tmp_path: Path) -> None:
    source = tensors_of()
    del source["lm_head.weight"]
    save_file(source, tmp_path / "model.safetensors")
    config = parse_model_config(CONFIG)
    model = Qwen(config, Backend(CPU), torch.float32)
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight"):
        load_weights(model, open_checkpoint(tmp_path), config, model.backend, torch.float32)
    assert not model.weights


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["transformer.h.0.ln_1.weight", "transformer.h.0.mlp.w1.weight", "lm_head.weight"]
)
def test_values_that_are_not_finite(tmp_path: Path, name: str, value: float) -> None:
    source = tensors_of(torch.float16)
    source[name].view(-1)[17] = value
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is damaged: 1 of .* NaN or infinite"):
        load(tmp_path, source)


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> Packed:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Backend, "pack_linear", full)
    with pytest.raises(CapacityError, match=r"memory ran out.*you tried to allocate 9 bytes"):
        load(tmp_path, tensors_of())


# ---- memory

_MEASURE = """
import json, sys, torch
from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig, parse_model_config, read_model_config
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen

def status(key):
    line = next(l for l in open("/proc/self/status") if l.startswith(key))
    return int(line.split()[1]) * 1024

torch.set_num_threads(1)
directory, figures = sys.argv[1], {}
config = read_model_config(directory)
for dtype in (torch.bfloat16, torch.float32):
    model = Qwen(config, Backend(torch.device("cpu")), dtype)
    torch.isfinite(torch.ones(8, dtype=dtype)).sum()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before, anonymous = status("VmRSS"), status("RssAnon")
    load_weights(model, directory, config, model.backend, dtype)
    figures[str(dtype)] = {"peak": status("VmHWM") - before, "anonymous": status("RssAnon") - anonymous,
                           "weights": model.weight_bytes}
    del model
print(json.dumps(figures))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Weights, one tensor and one merge buffer; in the file's own dtype only merged weights take memory."""
    d, i, v, layers = 1024, 2816, 4096, 4
    config = {
        **CONFIG,
        "hidden_size": d,
        "num_attention_heads": 8,
        "kv_channels": 128,
        "intermediate_size": 2 * i,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "vocab_size": v, "num_hidden_layers": layers})
    )

    def half(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    source = {
        "transformer.wte.weight": half(v, d),
        "lm_head.weight": half(v, d),
        "transformer.ln_f.weight": half(d),
    }
    for n in range(layers):
        at = f"transformer.h.{n}."
        source |= {
            at + "ln_1.weight": half(d),
            at + "ln_2.weight": half(d),
            at + "attn.c_attn.bias": half(3 * d),
        }
        source |= {at + "attn.c_attn.weight": half(3 * d, d), at + "attn.c_proj.weight": half(d, d)}
        source |= {at + "mlp.w1.weight": half(i, d), at + "mlp.w2.weight": half(i, d)}
        source |= {at + "mlp.c_proj.weight": half(d, i)}
    save_file(source, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        # glibc gives freed blocks back at once, so that the figures are the loader's and not the allocator's
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    half_figures, full = json.loads(done.stdout).values()
    largest, merged, slack = v * d * 2, 2 * i * d * 2, 24 * 2**20  # the allocator keeps up to 16 MiB
    assert half_figures["anonymous"] < layers * merged + slack  # the rest are pages of the file
    assert half_figures["peak"] < half_figures["weights"] + largest + slack
    assert full["weights"] * 0.9 < full["anonymous"] < full["weights"] + slack
    assert full["peak"] < full["weights"] + largest + 2 * merged + slack
