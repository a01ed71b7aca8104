"""What to write instead of DeepSpeed's configuration, which the first Qwen's scripts and others train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwenrt.config import read_json
from qwenrt.errors import RequestError


def instead_of(path: Path) -> RequestError:
    """The answer to ``--deepspeed path``: options that do what is in the file. Raises ConfigError for what is no JSON
    object."""
    return RequestError(
        f"--deepspeed {path}",
        "DeepSpeed is not used here: torch's own FSDP2 does what its ZeRO stages do",
        f"Leave it out, and use {' '.join(_options(read_json(path)))}"
        " (N is the number of devices; a step's size is --batch-tokens, whatever their number).",
    )


def _options(config: dict[str, Any]) -> list[str]:
    """Values that are "auto" are the trainer's own, as they are here."""
    zero, options = _table(config, "zero_optimization"), ["--processes N"]
    stage = zero.get("stage")
    options += ["--shard all"] if stage == 3 else ["--shard optimizer"] if stage in (1, 2) else []
    offloads = (_table(zero, f"offload_{what}").get("device", "none") for what in ("optimizer", "param"))
    if any(device != "none" for device in offloads):  # for want of memory, and there is no host's here
        options += ["--moments bfloat16", "--recompute all"]
    for name, precision in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _table(config, name).get("enabled") in (True, "auto"):
            options.append(f"--precision {precision}")
            break
    optimizer = _table(_table(config, "optimizer"), "params")
    for option, value in {
        "--learning-rate": optimizer.get("lr"),
        "--weight-decay": optimizer.get("weight_decay"),
        "--max-grad-norm": config.get("gradient_clipping"),
    }.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            options.append(f"{option} {value:g}")
    return options


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}
