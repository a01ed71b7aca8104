"""DeepSpeed's configuration is answered with the options that do the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenrt.cli import main

SEEDS = {  # the first Qwen's ds_config_zero2.json, shortened
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "pin_memory": True}},
    "gradient_clipping": "auto",
}
LARGE = {
    "fp16": {"enabled": True},
    "optimizer": {"params": {"lr": 2e-5, "weight_decay": 0.05}},
    "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    "gradient_clipping": 0.5,
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SEEDS, "--processes N --shard optimizer --precision bfloat16 (N is"),
        (
            LARGE,
            "--processes N --shard all --moments bfloat16 --recompute all --precision float16 "
            "--learning-rate 2e-05 --weight-decay 0.05 --max-grad-norm 0.5 (N is",
        ),
        ({"zero_optimization": [1]}, "--processes N (N is"),
    ],
)
def test_its_options_are_named(config, options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config))
    words = ["finetune", "demo", "talks.jsonl", "out", "--deepspeed", str(tmp_path / "ds.json")]
    assert main(words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "DeepSpeed is not used here" in said and f"use {options}" in said


def test_a_file_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "demo", "talks.jsonl", "out", "--deepspeed", str(tmp_path / "ds.json")]) == 1
    assert "ds.json" in capsys.readouterr().err
