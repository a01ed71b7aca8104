"""The head that guesses the token after next: recorded logits, however the checkpoint is packaged."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwenrt
from benchmarks.forced_drafts import Knowing
from qwenrt.backends.base import Backend
from qwenrt.config import Environment, ModelConfig, read_model_config
from qwenrt.config.layers import (
    mtp_linears,
    mtp_tensors,
    num_parameters,
    num_trail_states,
    state_bytes,
    with_mtp,
)
from qwenrt.config.released import released_config
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.memory.footprint import Storage, memory_need
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import Packed
from qwenrt.sampling_params import SamplingParams
from tests.conftest import GOLDEN
from tests.model.test_hybrid_checkpoints import quantised

NAME = "qwen3_5_vl"  # the recorded checkpoint that has one


def config_of(directory: Path) -> ModelConfig:
    config = dataclasses.replace(read_model_config(directory), with_mtp=True)
    return as_stored(config, open_checkpoint(directory))


def released(name: str) -> ModelConfig:
    config = released_config(name)
    assert config is not None
    return config


def load(directory: Path) -> Qwen:
    config, backend = config_of(directory), Backend(torch.device("cpu"))
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False)
    model.bind()
    return model


def guessed(model: Qwen, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Its logits after a recorded prompt and its first token, and those recorded."""
    golden = load_file(GOLDEN / NAME / "golden.safetensors")
    ids = torch.cat((golden[f"{key}.ids"].long(), golden[f"{key}.new_tokens"].long()[:1]))
    plan = StepPlan([len(ids) - 1], [len(ids) - 1])
    hidden = model.forward(ids[:-1], plan, [1])
    return model.logits(model.guess(ids[1:], hidden, plan, [1])), golden[f"mtp.{key}.logits"]


@pytest.mark.parametrize("key", ["1", "batch.2"])
@torch.inference_mode()
def test_logits_are_the_recorded_ones(key: str) -> None:
    logits, recorded = guessed(load(GOLDEN / NAME), key)
    torch.testing.assert_close(logits, recorded, atol=2e-4, rtol=0)


@torch.inference_mode()
def test_out_of_a_gguf_file(tmp_path: Path) -> None:
    file = GOLDEN / "gguf" / NAME / "model.gguf"
    directory = resolve(file, env=Environment(cache_dir=tmp_path))
    assert read_model_config(directory).mtp_layers == 1
    for key in ("1", "batch.2"):
        logits, recorded = guessed(load(directory), key)
        torch.testing.assert_close(logits, recorded, atol=2e-4, rtol=0)


# ---- how files have it


def changed(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The recorded checkpoint with other tensors."""
    directory = tmp_path / "m"
    shutil.copytree(GOLDEN / NAME, directory)
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")
    return directory


@torch.inference_mode()
def test_below_the_prefix_of_the_model(tmp_path: Path) -> None:
    directory = changed(
        tmp_path, lambda t: {f"model.{k}" if k.startswith("mtp.") else k: v for k, v in t.items()}
    )
    logits, recorded = guessed(load(directory), "1")
    torch.testing.assert_close(logits, recorded, atol=2e-4, rtol=0)


def test_it_is_loaded_only_where_it_is_asked_for() -> None:
    tensors = load_file(GOLDEN / NAME / "model.safetensors")
    own = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("mtp."))
    plain, config = read_model_config(GOLDEN / NAME), config_of(GOLDEN / NAME)
    assert plain.mtp_layers == 1 and plain.num_mtp_layers == 0
    assert num_parameters(config) - num_parameters(plain) == own
    assert not any(
        name.startswith("mtp.")
        for name in Qwen(plain, Backend(torch.device("cpu")), torch.float32).tensor_specs
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if "mtp" not in k}, ConfigError, "has no MTP head: among its 76"),
        (lambda t: t | {"mtp.layers.1.input_layernorm.weight": torch.ones(32)}, ConfigError, "has several layers"),
        (lambda t: {k: v for k, v in t.items() if k != "mtp.norm.weight"}, CheckpointError, "1 missing: mtp.norm"),
        (lambda t: t | {"mtp.embed_tokens.weight": torch.ones(128, 32)}, CheckpointError, "1 unexpected: mtp.embed_t"),
        (lambda t: t | {"mtp.fc.weight": torch.ones(32, 32)}, CheckpointError, r"mtp.fc.weight \[32, 32\], expected"),
    ],
)  # fmt: skip
def test_what_is_no_head_is_refused(change: Any, error: type[Exception], match: str, tmp_path: Path) -> None:
    directory = changed(tmp_path, change)
    with pytest.raises(error, match=match):
        qwenrt.load(str(directory), draft="mtp", progress=False)
    qwenrt.load(str(directory), progress=False).close()  # where it is not asked for


def test_other_models_have_none() -> None:
    for draft in ("demo", str(GOLDEN / "qwen3_5")):
        with pytest.raises(ConfigError, match=r'draft="mtp".* has no MTP head'):
            qwenrt.load(draft, draft="mtp", progress=False)
    with pytest.raises(ConfigError, match="Qwen3-4B has no MTP head"):
        with_mtp(released("Qwen3-4B"), "mtp", "Qwen3-4B")
    assert with_mtp(released("Qwen3.5-4B"), "mtp", "x").num_paged_layers == 9


@pytest.mark.parametrize("how", ["gptq4", "fp8", "awq"])
@torch.inference_mode()
def test_in_codes(how: str, tmp_path: Path) -> None:
    """All of the model's linears in codes, or all but the head's, as official releases leave it."""
    for mtp_too in (True, False):
        codes, exact = quantised(NAME, how, tmp_path / str(mtp_too), mtp_too=mtp_too)
        found = []
        for directory in (codes, exact):
            with qwenrt.load(
                str(directory), draft="mtp", progress=False, activations="exact", dtype="float32"
            ) as llm:
                found.append(guessed(llm._assembled.model, "1")[0])
                kind = llm._assembled.model.get("mtp.layers.0.o_proj")
                assert isinstance(kind, Packed)
                assert (kind.bits < 16) == (mtp_too and how != "fp8" and directory is codes)
        torch.testing.assert_close(*found, atol=1e-3 * float(found[1].abs().max()), rtol=0)


def test_rounded_at_load() -> None:
    with qwenrt.load(str(GOLDEN / NAME), draft="mtp", quantize="int8", progress=False) as llm:
        model = llm._assembled.model
        assert model.get("mtp.fc").bits == model.get("mtp.layers.0.gate_up_proj").bits == 8  # type: ignore[union-attr]


def moe_head(config: ModelConfig, stacked: bool) -> dict[str, torch.Tensor]:
    """A head of experts, as a file has it."""
    table, made = table_for(config.model_type, with_mtp=True), {}
    source = torch.Generator().manual_seed(4)
    for name, shape in mtp_tensors(config).items():
        made[table.source(name)] = torch.randn(shape, generator=source) * 0.2
    for spec in mtp_linears(config):
        for part, rows in spec.parts:
            name = table.source(spec.name, part if part in table.parts(spec.name) else "")
            made[name] = torch.randn(rows, spec.in_features, generator=source) * spec.in_features**-0.5
    if stacked:
        prefix, count = "mtp.layers.0.mlp.experts", config.moe.num_experts if config.moe else 0
        own = [
            {w: made.pop(f"{prefix}.{e}.{w}_proj.weight") for w in ("gate", "up", "down")}
            for e in range(count)
        ]
        made[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat((e["gate"], e["up"])) for e in own])
        made[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in own])
    return made


@torch.inference_mode()
def test_of_experts(tmp_path: Path) -> None:
    """Single or stacked they are the same, and more than nothing."""
    found = []
    config = dataclasses.replace(read_model_config(GOLDEN / "qwen3_5_moe"), mtp_layers=1, with_mtp=True)
    for stacked in (False, True):
        directory = tmp_path / str(stacked)
        shutil.copytree(GOLDEN / "qwen3_5_moe", directory)
        tensors = load_file(directory / "model.safetensors") | moe_head(config, stacked)
        save_file(tensors, directory / "model.safetensors")
        model = load(directory)
        ids, plan = torch.arange(9), StepPlan([8], [8])
        found.append(model.guess(ids[1:], model.forward(ids[:-1], plan, [1]), plan, [1]))
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert float(found[0].abs().max()) > 0.01


# ---- what it takes


def test_its_memory_is_counted() -> None:
    config = released("Qwen3.5-9B")
    both = [
        memory_need(each, Storage(2, 2), 4096, users=4, draft_tokens=2)
        for each in (config, with_mtp(config, "mtp", ""))
    ]
    weights = num_parameters(with_mtp(config, "mtp", "")) - num_parameters(config)
    assert both[1].weights - both[0].weights == pytest.approx(2 * weights, rel=1e-3)
    pages, states = 4 * 4096 * 2 * 4 * 256 * 2, num_trail_states(4, 2) * state_bytes(config, 2)
    assert both[1].cache - both[0].cache == pages + states and num_trail_states(4, 2) == 8


def test_an_engine_takes_what_was_counted() -> None:
    with qwenrt.load(str(GOLDEN / NAME), draft="mtp", draft_tokens=2, max_num_seqs=3, progress=False) as llm:
        engine, config = llm._assembled.engine, llm._assembled.config
        assert engine.stats()["cache_bytes"] > 0
    assert num_trail_states(3, 2) == 6 and num_trail_states(100, 1) == 8 and config.num_mtp_layers == 1


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_answers_are_the_same_with_it(quantize: Any) -> None:
    """With the kernels of this machine, whose steps of several tokens round otherwise in the last bits; where weights
    are codes, steps without guesses are one call."""
    said, prompt = [], [5, 6, 7, 8]
    rules = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)
    for draft in (None, "mtp"):
        with qwenrt.load(
            str(GOLDEN / NAME),
            draft=draft,
            draft_tokens=2,
            quantize=quantize,
            activations="exact",
            progress=False,
        ) as llm:
            drafts = llm._assembled.engine._alive().drafts
            if drafts.head is not None:
                drafts.head._worth = 0.0  # type: ignore[attr-defined]  # it never rests
                drafts.head = Knowing(drafts.head, lambda seq: [*prompt, *said[0].token_ids], 0.7)
            said.append(llm.generate(prompt_token_ids=prompt, sampling_params=rules))
    assert said[0].token_ids == said[1].token_ids
    assert said[0].timing is not None and said[0].timing.drafted_tokens == 0
    assert said[1].timing is not None and 5 < said[1].timing.accepted_tokens < said[1].timing.drafted_tokens
