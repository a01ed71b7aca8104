"""The safetensors header: what is valid is read as the official reader reads it, all else is one kind of error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.header import MAX_HEADER_BYTES, MAX_TENSORS, read_shard

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
}


def write(path: Path, header: Any, data: bytes = bytes(32), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def changed(**changes: Any) -> dict[str, Any]:
    header: dict[str, Any] = json.loads(json.dumps(GOOD))
    for name, change in changes.items():
        header[name] = {**header.get(name, {}), **change} if isinstance(change, dict) else change
    return header


def test_a_valid_file_is_read_as_by_the_official_reader(tmp_path: Path) -> None:
    tensors = {
        "x": torch.arange(6, dtype=torch.float16).view(2, 3),
        "scalar": torch.tensor(3.0),
        "none": torch.empty(0, 4, dtype=torch.int32),
        "名": torch.ones(5, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    shard = read_shard(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as official:
        assert {e.name for e in shard.tensors} == set(official.keys())
        for entry in shard.tensors:
            part = official.get_slice(entry.name)
            assert (list(entry.shape), entry.dtype) == (part.get_shape(), part.get_dtype())
            assert entry.nbytes == tensors[entry.name].nbytes


def test_the_good_header_is_good(tmp_path: Path) -> None:
    assert [e.name for e in read_shard(write(tmp_path / "m.safetensors", GOOD)).tensors] == [
        "a",
        "b",
        "empty",
    ]
    assert (
        len(read_shard(write(tmp_path / "n.safetensors", {"__metadata__": {"k": "v"}, **GOOD})).tensors) == 3
    )
    assert len(read_shard(write(tmp_path / "null.safetensors", {"__metadata__": None, **GOOD})).tensors) == 3


BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("header too long", GOOD, {"length": MAX_HEADER_BYTES + 1}, f"at most {MAX_HEADER_BYTES}"),
    ("length 2**64-1", GOOD, {"length": 2**64 - 1}, "claims 18446744073709551615 bytes"),
    ("length beyond the file", GOOD, {"length": 5000}, "truncated or damaged"),
    ("length 0", GOOD, {"length": 0}, "claims 0 bytes"),
    ("not JSON", b'{"a":', {}, "not valid JSON"),
    ("not UTF-8", b'{"\xff":1}', {}, "not valid JSON"),
    ("not an object", b"[1, 2]", {}, "starts with"),
    ("huge integer", b'{"a":' + b"9" * 5000 + b"}", {}, "not valid JSON"),
    (
        "nested deeply",
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        {},
        "nested too deeply|not valid JSON",
    ),
    ("twice", b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":1}', {}, "'a' occurs twice"),
    ("twice in an entry", b'{"a":{"dtype":"U8","dtype":"U8"}}', {}, "'dtype' occurs twice"),
    ("entry no object", changed(a=5), {}, "'a' is not described"),
    ("dtype unknown", changed(a={"dtype": "F7"}), {}, "unknown dtype 'F7'"),
    ("dtype a list", changed(a={"dtype": ["F32"]}), {}, "unknown dtype"),
    ("dtype missing", {"a": {"shape": [1], "data_offsets": [0, 4]}}, {}, "unknown dtype"),
    ("shape missing", {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, {}, "shape None"),
    ("negative size", changed(a={"shape": [-2, -3]}), {}, r"shape \[-2, -3\]"),
    ("size no integer", changed(a={"shape": [2.0, 3]}), {}, r"shape \[2.0, 3\]"),
    ("size a bool", changed(a={"shape": [True, 6]}), {}, "shape"),
    ("size 2**63", changed(a={"shape": [2**63, 3]}), {}, "shape"),
    ("product overflows", changed(a={"shape": [2**62, 2**62]}), {}, "its data_offsets"),
    (
        "product wraps to 0",
        changed(a={"shape": [2**32, 2**32], "data_offsets": [0, 0]}),
        {},
        "its data_offsets",
    ),
    ("too many dims", changed(a={"shape": [1] * 99}), {}, "up to 16 sizes"),
    (
        "shape and bytes differ",
        changed(a={"shape": [2, 4]}),
        {},
        r"F32 of shape \[2, 4\] takes 32 bytes.*give 24",
    ),
    ("half a byte", {"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, {}, "takes 1.5 bytes"),
    ("begin after end", changed(a={"data_offsets": [24, 0]}), {}, "data_offsets"),
    ("offset negative", changed(a={"data_offsets": [-24, 0]}), {}, "not two offsets"),
    ("three offsets", changed(a={"data_offsets": [0, 12, 24]}), {}, "not two offsets"),
    ("overlap", changed(b={"data_offsets": [20, 28]}), {}, "overlaps the tensor before it"),
    ("hole", changed(b={"data_offsets": [26, 34]}), {"data": bytes(34)}, "leaves a hole"),
    (
        "hole at the start",
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
        {"data": bytes(8)},
        "hole",
    ),
    ("truncated", GOOD, {"data": bytes(20)}, r"truncated.*\(12 missing\)"),
    ("too long", GOOD, {"data": bytes(40)}, r"too long.*\(8 too many\)"),
    ("metadata no object", {"__metadata__": 5, **GOOD}, {}, "__metadata__"),
]


@pytest.mark.parametrize(("header", "how", "found"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_header_is_refused(tmp_path: Path, header: Any, how: dict[str, Any], found: str) -> None:
    path = write(tmp_path / "model.safetensors", header, **how)
    with pytest.raises(CheckpointError, match=found) as error:
        read_shard(path)
    assert "model.safetensors is not a valid safetensors file" in str(error.value)
    assert error.value.remedy


def test_a_million_tensors_are_refused(tmp_path: Path) -> None:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = b"{" + b",".join(one % i for i in range(1_000_000)) + b"}"
    path = write(tmp_path / "m.safetensors", raw, b"")
    with pytest.raises(CheckpointError, match=f"more than {MAX_TENSORS} tensors"):
        read_shard(path)


@pytest.mark.parametrize(
    ("content", "found", "remedy"),
    [
        (b"", "empty", "fetch the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n",
            "git-lfs pointer",
            "git lfs pull",
        ),
        (b"  <!DOCTYPE html><html>404</html>", "an HTML page", "fetch the file again"),
        (b'{"error":"Repository not found"}', "a JSON document", "Download the file again"),
        (b"PK\x03\x04" + bytes(60), "a zip archive", "never unpickles"),
        (b"\x80\x02}q\x00." + bytes(60), "a Python pickle", "never unpickles"),
        (b"GGUF" + bytes(60), "a GGUF file", "load it by that"),
        (b"\x01\x02", "2 bytes", "Download the file again"),
    ],
)
def test_other_files_are_recognised(tmp_path: Path, content: bytes, found: str, remedy: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_shard(path)
    assert found in error.value.found and remedy in error.value.remedy


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path: Path, length: int) -> None:
    raw = json.dumps(GOOD).encode().ljust(length)  # writers pad with spaces
    path = write(tmp_path / "m.safetensors", raw)
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")
    assert len(read_shard(path).tensors) == len(GOOD)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_shard(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_shard(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_shard(tmp_path / "none.safetensors")


@given(data=st.data())
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mutation_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, dropped and put in anywhere: a CheckpointError or entries that lie inside the file."""
    path = write(tmp_path / "m.safetensors", {"__metadata__": {"format": "pt"}, **GOOD})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"9" * 20, b"-", b"[", b"{", b'"', b"null", b"1e9"])
        )
        content[at : at + data.draw(st.integers(0, 6))] = piece
        content = content or bytearray(b"x")
    path.write_bytes(content)
    try:
        entries = read_shard(path).tensors
    except CheckpointError as error:
        assert error.remedy
    else:
        for entry in entries:
            assert 8 <= entry.begin <= entry.end <= len(content)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_entry = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "X"]) | _json,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | _json,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | _json,
    },
)


@given(header=st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), _entry | _json, max_size=4))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    path = write(tmp_path / "m.safetensors", header)
    try:
        read_shard(path)
    except CheckpointError as error:
        assert error.found
