"""The released vocabulary (it ships inside the dashscope package) and a small one of our own."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwenrt.text.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer" / "golden.json"


@pytest.fixture(scope="session")
def released_vocab() -> Path:
    dashscope = pytest.importorskip("dashscope")
    return Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def released_dir(released_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("released")
    shutil.copy(released_vocab, directory / "qwen.tiktoken")
    (directory / "generation_config.json").write_text(
        '{"eos_token_id": 151643, "chat_format": "chatml"}'
    )
    return directory


@pytest.fixture(scope="session")
def tokenizer(released_dir: Path) -> Tokenizer:
    return load_tokenizer(released_dir)


@pytest.fixture(scope="session")
def golden() -> Any:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def small_ranks() -> dict[bytes, int]:
    """256 single bytes and a few merges: enough to be a vocabulary."""
    tokens = [bytes([b]) for b in range(256)]
    tokens += [
        t.encode()
        for t in ("he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "  ", "\n\n")
    ]
    tokens += [b"\xe4\xbd", "你".encode(), "好".encode()[:2], "你好".encode()]
    return {token: rank for rank, token in enumerate(tokens)}


def vocab_lines(ranks: dict[bytes, int]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return Tokenizer(small_ranks(), name="small")
