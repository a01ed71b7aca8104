"""The header of a GGUF file: what is valid is read as the package reads it, all else is one kind of error."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.gguf import reader
from qwenrt.loader.checkpoint.gguf.reader import read_gguf
from tests.conftest import GOLDEN
from tests.loader.gguf.gguf_files import raw_file

U32, STRING, ARRAY = 4, 8, 9
F32, Q4_0 = 0, 2
LONG_STRING = struct.pack("<IQQQ", STRING, 2, 0, 127)  # the second of two


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


NAMED = [(b"general.architecture", STRING, text(b"qwen2"))]
GOOD = raw_file(
    [
        *NAMED,
        (b"n", U32, struct.pack("<I", 7)),
        (b"a", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"")),
    ],
    [(b"w", (32, 4), Q4_0, 0), (b"v", (3,), F32, 96)],
    bytes(96 + 12),
)


def refused(tmp_path: Path, raw: bytes, match: str) -> CheckpointError:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=match) as error:
        read_gguf(path)
    assert error.value.remedy
    return error.value


@pytest.mark.parametrize("name", ["kquants", "legacy"])
def test_a_file_is_read_as_by_the_package(name: str) -> None:
    path = GOLDEN / "gguf" / name / "model.gguf"
    official = gguf.GGUFReader(path)
    found = read_gguf(path)
    fields = {key: field.contents() for key, field in official.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata.keys() == fields.keys()
    for key, value in fields.items():
        ours = found.metadata[key]
        if isinstance(value, str):
            assert ours == value.encode()
        elif isinstance(value, list) and isinstance(value[0], str):
            assert ours == [each.encode() for each in value]
        else:
            assert ours == value
    wanted = {
        (t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.data_offset, int(t.n_bytes))
        for t in official.tensors
    }
    assert wanted == {(e.name, e.dtype, e.shape, e.begin, e.nbytes) for e in found.shard.tensors}


def test_the_good_file_is_good(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(GOOD)
    file = read_gguf(tmp_path / "m.gguf")
    assert file.metadata == {"general.architecture": b"qwen2", "n": 7, "a": [b"x", b""]}
    assert [(e.name, e.dtype, e.shape, e.nbytes) for e in file.shard.tensors] == [
        ("w", "Q4_0", (4, 32), 72),
        ("v", "F32", (3,), 12),
    ]


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(CheckpointError):
            read_gguf(path)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html>", "HTML page"),
        (b"PK\x03\x04" + bytes(60), r"begins with b'PK"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), f"{2**63} tensors; at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1000, 0), "1000 tensors, and 8 bytes are left"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 4000) + bytes(9), "4000 keys, and 9 bytes are left"),
        (raw_file([*NAMED, *NAMED], [], b""), "'general.architecture' occurs twice"),
        (raw_file([(b"k", 99, b"")], [], b""), "has type 99"),
        (raw_file([(b"k", 7, b"\x02")], [], b""), "is 2, not true or false"),
        (raw_file([(b"\xff", U32, bytes(4))], [], b""), "is not UTF-8"),
        (raw_file([(b"k", STRING, struct.pack("<Q", 2**62))], [], b""), r"claims \d+ bytes"),
        (raw_file([(b"k", ARRAY, struct.pack("<IQ", U32, 2**61))], [], b""), "elements in the value of 'k'"),
        (raw_file([(b"k", ARRAY, LONG_STRING)], [], b""), "a string in .* claims 127"),
        (raw_file([(b"k", ARRAY, struct.pack("<IQ", 77, 0))], [], b""), "an array of type 77"),
        (raw_file([(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 40)], [], b""), "nested more than 2 deep"),
        (raw_file([(b"general.alignment", U32, struct.pack("<I", 33))], [], b""), "not a power of two"),
        (raw_file([], [(b"t", (4,), F32, 0), (b"t", (4,), F32, 32)], bytes(64)), "tensor 't' occurs twice"),
        (raw_file([], [(b"t", (4,), F32, 0), (b"u", (4,), F32, 0)], bytes(64)), "overlaps the tensor before it"),
        (raw_file([], [(b"t", (4,), F32, 64)], bytes(99)), "leaves a hole"),
        (raw_file([], [(b"t", (4,), F32, 0)], bytes(15)), r"truncated: .*\(1 missing\)"),
        (raw_file([], [(b"t", (2**40,), F32, 0)], b""), "truncated"),
        (raw_file([], [(b"t", (2**40, 2**40), F32, 0)], b""), "has the sizes"),
        (raw_file([], [(b"t", (4, 0), F32, 0)], b""), "has the sizes"),
        (raw_file([], [(b"t", (1,) * 5, F32, 0)], b""), "has 5 sizes, not 1 to 4"),
        (raw_file([], [(b"t", (48,), Q4_0, 0)], bytes(99)), "rows of 48 values, and Q4_0 has blocks of 32"),
        (raw_file([], [(b"t", (256,), 18, 0)], bytes(99)), "type IQ3_XXS: .*tables"),
        (raw_file([], [(b"t", (256,), 31, 0)], bytes(99)), "type Q4_0_4_4: no program writes it"),
        (raw_file([], [(b"t", (256,), 1000, 0)], bytes(99)), "type 1000, which is unknown"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, raw: bytes, match: str) -> None:
    refused(tmp_path, raw, match)


def test_arrays_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ELEMENTS", 10)
    array = struct.pack("<IQ", 0, 6) + bytes(6)
    refused(
        tmp_path, raw_file([(b"a", ARRAY, array), (b"b", ARRAY, array)], [], b""), "at most 4 are allowed"
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=0, max_size=9)), min_size=1, max_size=4
    )
)
def test_damage_is_found_or_does_no_harm(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    raw = bytearray(GOOD)
    for at, put in changes:
        raw[at : at + len(put)] = put
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        shard = read_gguf(path).shard
    except CheckpointError:
        return
    assert all(0 <= e.begin <= e.end <= len(raw) for e in shard.tensors)
