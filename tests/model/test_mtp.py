"""The head that guesses the token after next: recorded logits, however the checkpoint is packaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenrt.backends.base import Backend
from qwenrt.config import Environment, ModelConfig, read_model_config
from qwenrt.config.layers import num_parameters
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.loader.checkpoint.as_stored import as_stored
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from tests.conftest import GOLDEN

NAME = "qwen3_5_vl"  # the recorded checkpoint that has one


def config_of(directory: Path) -> ModelConfig:
    config = dataclasses.replace(read_model_config(directory), with_mtp=True)
    return as_stored(config, open_checkpoint(directory))


def load(directory: Path, quantize: str | None = None) -> Qwen:
    config, backend = config_of(directory), Backend(torch.device("cpu"))
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, progress=False, quantize=quantize)
    model.bind()
    return model


def guessed(model: Qwen, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Its logits after a recorded prompt and its first token, and those recorded."""
    golden = load_file(GOLDEN / NAME / "golden.safetensors")
    ids = torch.cat((golden[f"{key}.ids"].long(), golden[f"{key}.new_tokens"].long()[:1]))
    plan = StepPlan([len(ids) - 1], [len(ids) - 1])
    hidden = model.forward(ids[:-1], plan, [1])
    return model.logits(model.guess(ids[1:], hidden, plan, [1])), golden[f"mtp.{key}.logits"]


def with_tensors(directory: Path, change: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(GOLDEN / NAME, directory)
    save_file(change, directory / "model.safetensors")
    return directory


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
