"""Blocks on disk: what is read is what was written, or nothing."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwenrt.engine import block_files
from qwenrt.engine.block_files import BlockFiles, Label
from qwenrt.errors import ConfigError


@pytest.fixture(autouse=True, scope="module")
def backend_kind() -> None:
    """Nothing here has an engine: once instead of once for each kind of it."""


MODEL, ROOT = b"m" * 32, b"r" * 32
SIZE = 5000


def label(*ids: int, model: bytes = MODEL, before: bytes = ROOT, depth: int = 0) -> Label:
    return Label(model, before, ids, depth)


def block(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=source)


def read(files: BlockFiles, of: Label, size: int = SIZE) -> torch.Tensor | None:
    data = torch.zeros(size, dtype=torch.uint8)
    return data if files.read(of, data) else None


@pytest.fixture
def files(tmp_path: Path) -> BlockFiles:
    return BlockFiles(tmp_path / "store", 2**20)


def only_file(files: BlockFiles) -> Path:
    (path,) = files.path.glob("*.kv")
    return path


def test_what_is_read_is_what_was_written(files: BlockFiles) -> None:
    files.write(label(1, 2), block())
    assert files.holds(label(1, 2)) and torch.equal(read(files, label(1, 2)), block())
    for other in (label(1, 3), label(1, 2, model=b"n" * 32), label(1, 2, before=b"s" * 32)):
        assert not files.holds(other) and read(files, other) is None
    assert len(list(files.path.iterdir())) == 1


def test_files_are_their_owners_only(files: BlockFiles) -> None:
    files.write(label(1), block())
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(files).stat().st_mode) == 0o600


def test_a_byte_that_changed_anywhere_is_noticed(files: BlockFiles) -> None:
    files.write(label(1, 2), block())
    path = only_file(files)
    whole = path.read_bytes()
    rng = random.Random(0)
    header = len(whole) - SIZE
    for place in [*range(header), *rng.sample(range(header, len(whole)), 200), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert read(files, label(1, 2)) is None, place
        assert not path.exists(), "a bad file is removed"
    path.write_bytes(whole)
    assert read(files, label(1, 2)) is not None


def test_a_file_that_is_too_short_or_too_long_is_noticed(files: BlockFiles) -> None:
    files.write(label(1, 2), block())
    path = only_file(files)
    whole = path.read_bytes()
    rng = random.Random(1)
    for length in [0, 1, len(whole) - 1, *rng.sample(range(len(whole)), 50)]:
        path.write_bytes(whole[:length])
        assert read(files, label(1, 2)) is None and not path.exists()
    path.write_bytes(whole + b"x")
    assert read(files, label(1, 2)) is None and not path.exists()
    path.write_bytes(whole[:-100] + bytes(100))  # a page that never reached the disk
    assert read(files, label(1, 2)) is None


def test_a_block_of_another_under_its_name_is_noticed(files: BlockFiles) -> None:
    files.write(label(1, 2), block())
    only_file(files).rename(files.path / f"{label(3, 4).name.hex()}.kv")
    assert read(files, label(3, 4)) is None and not list(files.path.iterdir())


def test_links_are_not_followed(files: BlockFiles, tmp_path: Path) -> None:
    files.write(label(1), block())
    elsewhere = tmp_path / "elsewhere"
    only_file(files).rename(elsewhere)
    (files.path / f"{label(1).name.hex()}.kv").symlink_to(elsewhere)
    assert not files.holds(label(1)) and read(files, label(1)) is None
    files.write(label(1), block(1))
    assert torch.equal(read(files, label(1)), block(1)), "the link was replaced"
    assert elsewhere.exists() and elsewhere.stat().st_size > SIZE


def test_what_is_not_a_block_is_left_alone(files: BlockFiles) -> None:
    (files.path / "notes.txt").write_text("mine")
    (files.path / f"{'0' * 64}.kv").mkdir()
    os.mkfifo(files.path / f"{label(9).name.hex()}.kv")
    assert not files.holds(label(9)) and read(files, label(9)) is None
    files.limit = 1
    files.prune(10)
    assert (files.path / "notes.txt").exists() and (files.path / f"{'0' * 64}.kv").exists()


def test_the_least_lately_used_goes_first_and_ends_before_beginnings(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 10 * SIZE)
    texts = [[label(text, depth, depth=depth) for depth in range(4)] for text in range(2)]
    for used, text in enumerate(texts):
        for each in text:
            files.write(each, block(), 10**18 + used * 10**9)
    files.touch(texts[0])
    for i in range(3):
        files.write(label(50 + i), block())
        total = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert total <= files.limit
    assert all(files.holds(each) for each in texts[0])
    kept = [files.holds(each) for each in texts[1]]
    assert kept == sorted(kept, reverse=True) and kept[0] and not kept[-1]


def test_a_block_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, SIZE)
    files.write(label(1), block())
    assert not list(tmp_path.iterdir())


def test_what_was_never_finished_is_removed_when_it_is_old(files: BlockFiles) -> None:
    parts = [files.path / f".{'a' * 64}.{i:016x}.part" for i in range(2)]
    for part in parts:
        part.write_bytes(b"x")
    os.utime(parts[0], (1, 1))
    BlockFiles(files.path, 2**20)
    assert [part.exists() for part in parts] == [False, True]


def test_a_full_disk_leaves_nothing_behind(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, []

    def full(fd: int, data: memoryview) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:100])

    monkeypatch.setattr(block_files.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        files.write(label(1), block())
    assert not list(files.path.iterdir())


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_directory_that_others_can_write_in_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(ConfigError, match="others can write"):
        BlockFiles(tmp_path / "open", 2**20)


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for name in ("file", "link", "file/below"):
        with pytest.raises(ConfigError, match="prefix_store="):
            BlockFiles(tmp_path / name, 2**20)


_PROCESS = """
import sys, torch
from pathlib import Path
from tests.engine.test_block_files import *
files, mine = BlockFiles(Path(sys.argv[1]), 40 * SIZE), int(sys.argv[2])
for turn in range(60):
    for i in range(10):
        of = label(i, turn % 7)
        if not files.holds(of):
            files.write(of, block(i))
        found = read(files, of)
        assert found is None or torch.equal(found, block(i))
"""


def test_two_processes_share_a_directory(tmp_path: Path) -> None:
    """Both write, read, touch and prune the same names; each reads what was written or nothing."""
    command = [sys.executable, "-c", _PROCESS, str(tmp_path / "store")]
    running = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert all(path.suffix == ".kv" for path in (tmp_path / "store").iterdir())
