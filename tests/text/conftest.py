"""The released vocabulary (it ships inside the dashscope package) and a small one of our own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from tests.text.small_vocab import small_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer" / "golden.json"


@pytest.fixture(scope="session")
def released_vocab() -> Path:
    spec = importlib.util.find_spec("dashscope")  # importing it would take a second
    if spec is None or spec.origin is None:
        pytest.skip("dashscope, which carries the released vocabulary, is not installed")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def released_dir(released_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("released")
    shutil.copy(released_vocab, directory / "qwen.tiktoken")
    (directory / "generation_config.json").write_text('{"eos_token_id": 151643, "chat_format": "chatml"}')
    return directory


@pytest.fixture(scope="session")
def tokenizer(released_dir: Path) -> ChatTokenizer:
    return ChatTokenizer.from_dir(released_dir)


@pytest.fixture(scope="session")
def golden() -> Any:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def small() -> ChatTokenizer:
    return ChatTokenizer(small_ranks(), name="small")
