"""The figures of the preflight against known sizes and real packing, and its refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenrt.assembly import _longest_that_fits, assemble
from qwenrt.backends.base import Backend
from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import Environment, ModelConfig, parse_model_config, read_model_config
from qwenrt.config.layers import least_state_bytes, num_snapshots, state_bytes
from qwenrt.config.released import released_config
from qwenrt.errors import CapacityError
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.memory.footprint import GIB, Storage, cache_bytes, memory_need, weight_bytes
from qwenrt.loader.memory.preflight import preflight, storage_of
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import LayerState
from tests.conftest import GOLDEN

CPU = torch.device("cpu")


def released(layers: int, hidden: int, heads: int, intermediate: int, vocab: int) -> ModelConfig:
    return parse_model_config(
        {
            "model_type": "qwen",
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "kv_channels": 128,
            "intermediate_size": intermediate,
            "vocab_size": vocab,
            "seq_length": 8192,
        }
    )


SEVEN = released(32, 4096, 32, 22016, 151936)


@pytest.mark.parametrize(
    ("config", "nbytes"),
    [
        (released(24, 2048, 16, 11008, 151936), 3_673_657_344),
        (SEVEN, 15_442_649_088),
        (released(40, 5120, 40, 27392, 152064), 28_334_581_760),
        (released(80, 8192, 64, 49152, 152064), 144_575_840_256),
    ],
)
def test_weights_of_the_released_models(config: ModelConfig, nbytes: int) -> None:
    assert weight_bytes(config, Storage(2, 2)) == nbytes
    assert weight_bytes(config, Storage(4, 4)) == 2 * nbytes


def test_cache() -> None:
    assert cache_bytes(SEVEN, 8192, 2) == 4 * GIB
    assert cache_bytes(SEVEN, 8192, 2, "int8") == 4 * GIB * 136 // 256


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("plain", None),
        ("plain", "int8"),
        ("plain", "int4"),
        ("gptq_int4", None),
        ("gptq_int8", None),
        ("gptq_int4_act_order", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("backend", [Backend(CPU), CPUBackend(CPU)], ids=["plain torch", "cpu"])
def test_the_estimate_is_what_packing_takes(
    golden_dir: Path, name: str, quantize: str | None, dtype: torch.dtype, backend: Backend
) -> None:
    checkpoint = open_checkpoint(golden_dir / name)
    stored = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[
        checkpoint.tensors["transformer.wte.weight"].dtype
    ]
    config = read_model_config(golden_dir / name)
    model = Qwen(config, backend, dtype)
    load_weights(model, checkpoint, config, backend, dtype, quantize=quantize)
    estimated = weight_bytes(config, storage_of(backend, dtype, stored), quantize)
    assert estimated == pytest.approx(model.weight_bytes, rel=0.005)


def test_the_arithmetic_needs_no_torch() -> None:
    memory = ("preflight", "footprint", "fit", "device")
    others = ("qwenrt.loader.hub.resolve", "qwenrt.loader.checkpoint.as_stored")
    modules = ", ".join([*(f"qwenrt.loader.memory.{n}" for n in memory), *others])
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class _Small(Backend):
    """A device with 9 GiB, of which 8 are free, and no kernels of its own."""

    room = (8 * GIB, 9 * GIB)

    def memory(self) -> tuple[int, int]:
        return self.room


def test_it_refuses_with_figures_and_what_would_fit() -> None:
    with pytest.raises(CapacityError) as error:
        preflight(SEVEN, _Small(CPU), torch.bfloat16, max_model_len=2048)
    text = str(error.value)
    assert "weights 14.38 GiB, cache 1.00 GiB" in text and "8.00 GiB of 9.00 GiB are free" in text
    assert "with 2048 tokens of cache" in text
    assert 'quantize="int4" with max_model_len=' in text


def test_every_remedy_it_offers_does_fit() -> None:
    for room in (4, 6, 7, 8, 9, 12, 16, 18):
        backend = _Small(CPU)
        backend.room = (room * GIB, 32 * GIB)
        with pytest.raises(CapacityError) as error:
            preflight(SEVEN, backend, torch.bfloat16, max_model_len=8192)
        remedy = error.value.remedy
        if remedy.startswith("No setting"):
            assert room < 8
            continue
        for offer in remedy.removeprefix("This would fit: ").rstrip(".").split("; "):
            changes = dict(part.split("=") for part in offer.split(" with "))
            length = int(changes.pop("max_model_len", 8192))
            settings = {key: value.strip('"') for key, value in changes.items()}
            need = preflight(SEVEN, backend, torch.bfloat16, max_model_len=length, **settings)  # type: ignore[arg-type]
            assert need.total <= room * GIB


def test_it_says_when_nothing_helps() -> None:
    backend = _Small(CPU)
    backend.room = (GIB, GIB)
    with pytest.raises(CapacityError, match=r"No setting makes this model fit here. Use a smaller model"):
        preflight(SEVEN, backend, torch.bfloat16, max_model_len=8192)


def test_what_fits_passes() -> None:
    need = preflight(SEVEN, _Small(CPU), torch.bfloat16, quantize="int4", max_model_len=256)
    assert need.total == need.weights + need.cache + need.workspace < 8 * GIB
    assert memory_need(SEVEN, Storage(2, 2, on_host=True), 256, quantize="int4") == need


def _roomy() -> Backend:
    backend = _Small(CPU)
    backend.room = (12 * GIB, 16 * GIB)
    return backend


def test_several_users_are_counted() -> None:
    one, two = (
        preflight(SEVEN, _roomy(), torch.bfloat16, quantize="int4", max_model_len=256, users=users)
        for users in (1, 2)
    )
    assert two.cache == 2 * one.cache


def test_states_of_idle_sequences_count_and_fewer_are_offered() -> None:
    """They are set up whether or not so many ever run."""
    config = released_config("Qwen3.5-4B")
    assert config is not None
    backend = _roomy()
    one = preflight(config, backend, torch.bfloat16, max_model_len=512, sequences=1)
    backend.room = (one.total, 16 * GIB)
    assert preflight(config, backend, torch.bfloat16, max_model_len=512) == one
    with pytest.raises(CapacityError, match=r"the states of 16 sequences.*would fit: max_num_seqs=1\b"):
        preflight(config, backend, torch.bfloat16, max_model_len=512, sequences=16)
    backend.room = (one.total - 1, 16 * GIB)
    with pytest.raises(CapacityError) as error:
        preflight(config, backend, torch.bfloat16, max_model_len=512, sequences=16)
    assert "max_num_seqs" not in str(error.value)


class _Filled(Backend):
    """A device that the weights fill: nothing is free once operations are bound."""

    def memory(self) -> tuple[int, int]:
        return (0 if self.bindings else GIB, GIB)


def test_an_engine_sets_up_no_more_states_than_were_counted() -> None:
    """Where memory is short: with room for more, more are kept."""
    options = LoadOptions(max_num_seqs=5, max_model_len=64, progress=False)
    with LLM(assemble(str(GOLDEN / "qwen3_next"), options, Environment.read(), _Filled(CPU))) as llm:
        cache = llm._assembled.engine._engine.runner.cache
        states = [layer.delta.shape[0] for layer in cache.layers if isinstance(layer, LayerState)]
    assert states == [5 + num_snapshots(5, 0)] * 3


def test_the_context_that_is_chosen_leaves_room_for_the_states() -> None:
    config = released_config("Qwen3.5-4B")
    assert config is not None
    backend, options = _roomy(), LoadOptions(max_num_seqs=16)
    states = least_state_bytes(config, 2, 16)
    assert states == 20 * state_bytes(config, 2)
    per_token = backend.kv_bytes_per_token(
        config.num_kv_layers, config.num_kv_heads, config.head_dim, torch.bfloat16, False
    )
    backend.room = (2 * (states + 4096 * per_token), 64 * GIB)
    assert _longest_that_fits(config, backend, torch.bfloat16, options) == 4096
    backend.room = (states, 64 * GIB)
    assert _longest_that_fits(config, backend, torch.bfloat16, options) == 256


def test_fp8_may_be_rounded_further() -> None:
    config = released_config("Qwen3-8B-FP8")
    assert config is not None
    with pytest.raises(CapacityError, match='This would fit: quantize="int8"'):
        preflight(config, _roomy(), torch.bfloat16, max_model_len=512)


def test_a_kernel_that_was_demoted_does_not_count() -> None:
    backend = CPUBackend(CPU)
    if backend.kernels is None:
        pytest.skip(backend.unavailable)
    kept = Storage(4, 2, 2, kernels=True, on_host=True, twelve=backend.kernels.serves12)
    assert storage_of(backend, torch.float32, "bfloat16") == kept
    backend.demoted["linear"] = "wrong"
    assert storage_of(backend, torch.float32, "bfloat16") == Storage(4, 4, 2, on_host=True)
