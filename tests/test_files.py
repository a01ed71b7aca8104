"""The one door to files: what lies in the place of any file of a checkpoint becomes a typed error, at once."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwenrt.config import GenerationConfig, read_model_config
from qwenrt.config.fields import MAX_JSON_VALUES, has_more_values, read_json
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError
from qwenrt.files import is_there, opened, read
from qwenrt.loader.checkpoint.checkpoint import TensorReader, open_checkpoint
from qwenrt.loader.packed_cache.file import Damaged, open_file
from qwenrt.text.chat import conversations
from qwenrt.text.chat.formats import load_chat_format
from qwenrt.text.entries import read_entries
from qwenrt.text.tokenizer.tokenizer import Tokenizer
from tests.text.bpe_vocab import (
    FIRST,
    MERGES,
    RANKS,
    merges_txt,
    small_json,
    tokenizer_config,
    vocab_json,
    write,
)

PACKAGE = Path(__file__).parents[1] / "qwenrt"
NOBODY = 65534


def whole(directory: Path) -> Path:
    """A directory with every file that this package looks for in one of a later generation."""
    config = {"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    write(
        directory,
        config_json={**config, "intermediate_size": 16, "rope_theta": 1e4},
        quantize_config_json={"bits": 4, "group_size": 8},
        generation_config_json={"eos_token_id": FIRST},
        tokenizer_json=small_json(),
        tokenizer_config_json=tokenizer_config(FIRST),
        chat_template_jinja="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    save_file({"a": torch.ones(4)}, directory / "model.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "model.safetensors"}}
    write(directory, **{"model.safetensors.index_json": index})
    for file in directory.iterdir():
        file.chmod(0o644)
    return directory


def read_all(directory: Path) -> None:
    read_model_config(directory)
    GenerationConfig.from_dir(directory)
    checkpoint = open_checkpoint(directory)
    reader = TensorReader(checkpoint)
    for name in checkpoint.tensors:
        reader.tensor(name)
    Tokenizer.from_dir(directory)
    load_chat_format(directory, "qwen2")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def directory(path: Path) -> None:
    path.mkdir()


def nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def circle(path: Path) -> None:
    path.symlink_to(path)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


FILES = (
    *("config.json", "quantize_config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "model.safetensors", "model.safetensors.index.json"),
)


@pytest.mark.parametrize("put", [fifo, device, terminal, directory, nowhere, circle, endless])
@pytest.mark.parametrize("name", FILES)
def test_anything_in_the_place_of_a_file(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    model = whole(tmp_path / "m")
    read_all(model)
    (model / name).unlink()
    put(model / name)
    with pytest.raises(QwenrtError, match=re.escape(name)) as caught:
        read_all(model)
    assert caught.value.found and caught.value.remedy


@pytest.mark.parametrize("put", [fifo, device, directory, nowhere, circle, endless])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json", "qwen.tiktoken"])
def test_anything_in_the_place_of_a_file_of_an_older_tokenizer(
    tmp_path: Path, name: str, put: Callable[[Path], None]
) -> None:
    if name != "qwen.tiktoken":
        write(tmp_path, vocab_json=vocab_json(RANKS), merges_txt=merges_txt(MERGES), added_tokens_json={})
        (tmp_path / name).unlink()
    put(tmp_path / name)
    with pytest.raises(QwenrtError, match=re.escape(name)):
        Tokenizer.from_dir(tmp_path)


@contextlib.contextmanager
def as_a_stranger() -> Iterator[None]:
    """Without the rights of the user who runs the tests, who may be root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", FILES)
def test_closed_files_and_links_into_closed_directories(tmp_path: Path, name: str) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:  # pytest's own are for this user alone
        parent.chmod(0o755)
    model = whole(tmp_path / "m")
    (model / name).chmod(0)
    with as_a_stranger(), pytest.raises(QwenrtError, match="this user may not read it"):
        read_all(model)
    closed = tmp_path / "closed"
    closed.mkdir()
    (model / name).chmod(0o644)
    (model / name).rename(closed / name)
    (model / name).symlink_to(closed / name)
    closed.chmod(0)
    try:
        with (
            as_a_stranger(),
            pytest.raises(QwenrtError, match="a place that this user may not read") as caught,
        ):
            read_all(model)
        assert "again" not in caught.value.remedy  # the file is there: fetching it helps nobody
    finally:
        closed.chmod(0o755)


def test_a_closed_directory_is_not_an_empty_one(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    model = whole(tmp_path / "m")
    model.chmod(0)
    try:
        with as_a_stranger():
            for reader in (read_model_config, GenerationConfig.from_dir, open_checkpoint, Tokenizer.from_dir):
                with pytest.raises(QwenrtError, match=r"may not read it|Permission denied"):
                    reader(model)
    finally:
        model.chmod(0o755)


@pytest.mark.parametrize("put", [fifo, device, directory, nowhere])
def test_conversations_training_data_and_packed_files(tmp_path: Path, put: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    put(path)
    with pytest.raises(RequestError, match=r"regular file|leads nowhere"):
        conversations.load(path)
    with pytest.raises(RequestError, match=r"regular file|leads nowhere"):
        read_entries(path)
    with pytest.raises(Damaged, match=r"regular file|leads nowhere"):
        open_file(path, {})


def test_names_that_no_file_can_have() -> None:
    for name in ("a\0b", "a" * 5000, "\ud800"):
        for use in (is_there, opened):
            with pytest.raises(ConfigError, match="it cannot be read"):
                use(Path(name), ConfigError)


def test_what_vanishes_or_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    real = os.stat(path)
    path.unlink()
    monkeypatch.setattr("qwenrt.files.os.stat", lambda _: real)
    with pytest.raises(ConfigError, match="no such file"):
        read(path, 100, ConfigError)
    os.mkfifo(path)  # another file by the time it is opened
    with pytest.raises(ConfigError, match="a FIFO"):
        read(path, 100, ConfigError)
    path.unlink()
    path.write_bytes(b"x" * 100)
    assert read(path, 100, ConfigError) == b"x" * 100
    with pytest.raises(ConfigError, match="more than 99 bytes"):
        read(path, 99, ConfigError)


def test_an_open_file_is_closed_when_it_is_refused(tmp_path: Path) -> None:
    fifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(8):
        with pytest.raises(CheckpointError):
            opened(tmp_path / "pipe", CheckpointError)
    assert not before or len(os.listdir("/proc/self/fd")) == before


# ---- JSON


@pytest.mark.parametrize(
    "piece", [b"[],", b"{},", b'{"":0},', b"0,", b'"",', b'"\\"",', b"[[[[[[],1],1],1],1],1],"]
)
def test_a_bomb_is_refused_before_it_is_parsed(
    tmp_path: Path, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_bytes(
        b'{"a":[' + piece * ((60 if piece == b"[]," else 24) * 2**20 // len(piece)) + b"0]}"
    )
    monkeypatch.setattr("qwenrt.config.fields.json.loads", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(ConfigError, match=f"more than {MAX_JSON_VALUES} values"):
        read_json(tmp_path / "config.json")


def test_punctuation_in_texts_counts_for_nothing() -> None:
    assert not has_more_values(b'{"a":"' + rb",:[{\"\\" * 1000 + b'"}', 8)
    assert has_more_values(b"[" + b"1," * 9 + b"1]", 8)
    assert not has_more_values(b'"' + rb"\"," * 1000, 8)  # a string without an end is for the parser


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"]
)
def test_nesting(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ConfigError, match="nested too deeply"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "answer",
    [
        '{"error": "Entry not found"}',
        '{"error":"Invalid username or password."}',
        '{"message": "Not Found", "documentation_url": "https://docs.example"}',
        '{"detail":"Not Found"}',
        '{"Code":10010205001,"Message":"the file does not exist","RequestId":"x","Success":false}',
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_servers_answer_under_the_name_of_a_file(tmp_path: Path, name: str, answer: str) -> None:
    model = whole(tmp_path / "m")
    (model / name).write_text(answer)
    with pytest.raises(QwenrtError, match=f"{name}: a server's answer instead of the file: '") as caught:
        read_all(model)
    assert caught.value.remedy == "Delete it and fetch the file again."


def test_settings_are_no_servers_answer(tmp_path: Path) -> None:
    for text in ("{}", '{"type": "a"}', '{"error": null}', '{"eos_token_id": 1, "error": "x"}'):
        (tmp_path / "a.json").write_text(text)
        read_json(tmp_path / "a.json")


# ---- nobody goes around the door

_OTHER_WAYS = re.compile(
    r"""\.open\("r|read_text\(|(?<!_)read_bytes\(|\.exists\(\)|\.is_file\(\)|\bopen\([^)]*"rb?"|os\.open\((?!directory)"""
)
_NOT_A_MODELS = {
    # the system's own files, this package's and this user's, and the prefix store's, within a directory it holds open
    "engine/block_files.py",
    *("cli/keeping.py", "load_test/server_process.py", "loader/hub/names.py", "server/page/__init__.py"),
    "loader/hub/removal.py",  # deletes, and reads what the system says of open files
    *("backends/cpu/resources.py", "backends/cpu/library.py", "loader/memory/device.py", "cli/machine.py"),
    *("cli/doctor.py", "cli/__init__.py", "files.py", "backends/dcu/software.py"),
    *(
        "conformance/facts.py",
        "conformance/gpu/report.py",
        "conformance/gpu/phases.py",
        "conformance/gpu/driver.py",
    ),
    *("backends/ascend/calls.py", "backends/ascend/software.py"),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_opened_through_the_door(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) not in _NOT_A_MODELS:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if _OTHER_WAYS.search(line)]
        assert not found
