"""A config.json with absurd sizes is refused before anything of its size is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.cli import main
from qwenrt.config import read_model_config
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.checkpoint.inventory import check_size
from tests.conftest import GOLDEN, write_tiny_checkpoint

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "rope_theta": 1e4,
}  # fmt: skip
_EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4096, "moe_intermediate_size": 4}
ABSURD = {
    "key-value heads": {"num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 128, "hidden_size": 4096},
    "experts": {**_EXPERTS, "num_hidden_layers": 64},
    "experts of a layer": {**_EXPERTS, "num_experts_per_tok": 4096},
    "width": {"intermediate_size": 2**20, "hidden_size": 4096},
    "layers": {"num_hidden_layers": 1024},
    "everything": {"head_dim": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096, "hidden_size": 2**17},
    "a long list": {**_EXPERTS, "num_hidden_layers": 1024, "mlp_only_layers": [1023] * 10**6},
}  # fmt: skip


@pytest.mark.parametrize("changes", ABSURD.values(), ids=ABSURD)
def test_nothing_is_made(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_checkpoint(tmp_path / "m")
    (model / "config.json").write_text(json.dumps(_QWEN3 | changes))
    for name in ("Qwen", "preflight", "load_weights", "_longest_that_fits"):
        monkeypatch.setattr(f"qwenrt.assembly.{name}", lambda *_, **__: pytest.fail("something was made"))
    with pytest.raises((CheckpointError, ConfigError), match=r"cannot be in|no Qwen comes near") as caught:
        qwenrt.load(model)
    assert "memory" not in str(caught.value) and "download" not in caught.value.remedy.lower()
    assert main(["estimate", str(model), "--memory", "1"]) in (0, 1)


@pytest.mark.parametrize("name", ["plain", "gptq_int4", "gptq_int8"])
def test_real_files_are_large_enough(name: str) -> None:
    check_size(open_checkpoint(GOLDEN / name), read_model_config(GOLDEN / name))
