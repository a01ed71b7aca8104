"""A model directory's files as one checkpoint: what belongs together, what is missing, what leads astray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.checkpoint import (
    INDEX,
    TensorReader,
    check_file_name,
    open_checkpoint,
)

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
A, B = torch.arange(6, dtype=torch.float32).view(2, 3), torch.ones(4, dtype=torch.bfloat16)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor as a view of its file, each released once it was read."""
    checkpoint = open_checkpoint(directory)
    reader, tensors = TensorReader(checkpoint), {}
    for name in checkpoint.tensors:
        tensors[name] = reader.tensor(name)
        reader.release(name)
    return tensors


def sharded(directory: Path, **index: Any) -> Path:
    """A checkpoint in two files; ``index`` replaces parts of its index."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": A}, directory / ONE)
    save_file({"b": B}, directory / TWO)
    content = {"metadata": {"total_size": 32}, "weight_map": {"a": ONE, "b": TWO}, **index}
    (directory / INDEX).write_text(json.dumps(content))
    return directory


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert error.value.remedy


# ---- what is read


@pytest.mark.parametrize("name", ["plain", "gptq_int4", "big_base"])
def test_tensors_equal_the_official_readers(golden_dir: Path, name: str) -> None:
    official = load_file(golden_dir / name / "model.safetensors")
    ours = read_all(golden_dir / name)
    assert ours.keys() == official.keys()
    assert all(torch.equal(ours[k], official[k]) and ours[k].dtype == official[k].dtype for k in ours)


def test_shards_without_and_with_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]
    assert open_checkpoint(tmp_path).nbytes == 32
    (tmp_path / INDEX).unlink()
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_one_file_of_any_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize("name", ["with space", "中文目录", "v1.0.1", "a'b\"c"])
def test_paths_of_all_kinds(tmp_path: Path, name: str) -> None:
    assert read_all(sharded(tmp_path / name))["a"].tolist() == A.tolist()


def test_a_read_only_directory(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    for path in (tmp_path / "m").iterdir():
        path.chmod(0o444)
    (tmp_path / "m").chmod(0o555)
    assert len(read_all(tmp_path / "m")) == 2
    (tmp_path / "m").chmod(0o755)


def test_the_index_may_have_windows_line_ends(tmp_path: Path) -> None:
    sharded(tmp_path)
    text = json.dumps(json.loads((tmp_path / INDEX).read_text()), indent=1)
    (tmp_path / INDEX).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(open_checkpoint(tmp_path).tensors) == 2


def test_tensors_are_views_that_writes_do_not_carry_to_the_file(tmp_path: Path) -> None:
    save_file({"a": A, "none": torch.empty(0, 3)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    reader = TensorReader(open_checkpoint(tmp_path))
    tensor = reader.tensor("a")
    assert reader.tensor("a").data_ptr() == tensor.data_ptr()
    assert reader.tensor("none").shape == (0, 3)
    tensor += 1
    assert torch.equal(tensor, A + 1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_view_outlives_the_reader_and_a_release(tmp_path: Path) -> None:
    big = torch.arange(100_000, dtype=torch.int64)
    save_file({"big": big}, tmp_path / "model.safetensors")
    tensor = read_all(tmp_path)["big"]
    assert torch.equal(tensor, big)


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    raw += b" " * ((1 - len(raw)) % 4)
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + A.numpy().tobytes())
    assert torch.equal(read_all(tmp_path)["a"], A.view(-1))


def test_a_dtype_torch_has_not(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(3))
    with pytest.raises(CheckpointError, match="its dtype is F6_E2M3"):
        read_all(tmp_path)


def test_a_file_that_changes_after_it_was_checked(tmp_path: Path) -> None:
    sharded(tmp_path)
    reader = TensorReader(open_checkpoint(tmp_path))
    reader.tensor("a")
    os.truncate(tmp_path / ONE, 40)
    with pytest.raises(CheckpointError, match=r"changed while it was loaded.*40 now"):
        reader.tensor("a")
    reader.tensor("b")
    (tmp_path / TWO).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        reader.tensor("b")


def test_an_empty_tensor_whose_other_sizes_overflow(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F32","shape":[0,4611686018427387904,4],"data_offsets":[0,0]}}'
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError, match=r"tensor 'a'.*shape \[0, 4611686018427387904, 4\]"):
        read_all(tmp_path)


# ---- names in the index


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        ".hidden.safetensors",
    ],
)
def test_a_name_outside_the_directory(tmp_path: Path, name: str) -> None:
    refused(sharded(tmp_path, weight_map={"a": name}), repr(name)[1:-1], "only plain names of files")


@pytest.mark.parametrize("name", ["", None, 5, ["x"], "a\nb.safetensors", "\0.safetensors", "x" * 300])
def test_not_a_name(tmp_path: Path, name: object) -> None:
    refused(sharded(tmp_path, weight_map={"a": name}), "not a file name")


def test_a_download_address_in_a_name(tmp_path: Path) -> None:
    refused(
        sharded(tmp_path, weight_map={"a": ONE, "b": TWO + "?download=true"}),
        "the end of a download address was kept in the name",
        f"Rename the file to '{TWO}'",
    )


@given(name=st.text(max_size=30) | st.text("./\\~:ab", max_size=12).map(lambda s: s + ".safetensors"))
@example("..safetensors")
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_accepted_name_stays_in_the_directory(tmp_path: Path, name: str) -> None:
    try:
        check_file_name(name)
    except CheckpointError as error:
        assert error.remedy
    else:
        assert (tmp_path / name).parent == tmp_path and name.endswith(".safetensors")


@pytest.mark.parametrize(
    "index", [b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": [1]}', b"{", b"\xff\xfe"]
)
def test_an_index_that_is_none(tmp_path: Path, index: bytes) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(index)
    refused(tmp_path, INDEX)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"<html>proxy</html>", "an HTML page"),
        (b"", "an empty file"),
    ],
)
def test_an_index_that_is_something_else(tmp_path: Path, index: bytes, words: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_bytes(index)
    refused(tmp_path, words)


# ---- links


def test_a_link_out_of_the_directory(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m")
    (model / TWO).rename(tmp_path / "elsewhere.safetensors")
    (model / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(model, f"{TWO} is a link that leads out of the model directory", str(tmp_path / "elsewhere"))


def test_a_link_inside_and_a_linked_directory(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m")
    (model / TWO).rename(model / "data")
    (model / TWO).symlink_to("data")
    (tmp_path / "alias").symlink_to(model)
    assert len(open_checkpoint(tmp_path / "alias").tensors) == 2


def test_the_layout_of_a_download_cache(tmp_path: Path) -> None:
    snapshot = sharded(tmp_path / "models--Qwen--X" / "snapshots" / "abc")
    blobs = tmp_path / "models--Qwen--X" / "blobs"
    blobs.mkdir()
    (snapshot / TWO).rename(blobs / "0123")
    (snapshot / TWO).symlink_to("../../blobs/0123")
    assert len(open_checkpoint(snapshot).tensors) == 2
    (snapshot / ONE).rename(tmp_path / "x")
    (snapshot / ONE).symlink_to("../../../x")
    refused(snapshot, "leads out of the model directory")


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    model = sharded(tmp_path / "m")
    (model / TWO).unlink()
    (model / TWO).symlink_to(model / "gone")
    refused(model, f"cannot read {TWO}: it is a link that leads nowhere")
    (model / TWO).unlink()
    (model / TWO).symlink_to(model / TWO)
    refused(model, f"cannot read {TWO}: it is a link that leads in a circle")


# ---- files that are missing, extra, or do not fit


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / TWO).unlink()
    refused(tmp_path, "is incomplete", f"1 of 2 files are missing: {TWO}", "qwenrt pull")
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "is incomplete", TWO)


def test_a_missing_shard_under_another_name(tmp_path: Path) -> None:
    (sharded(tmp_path) / TWO).rename(tmp_path / (TWO + "?download=true"))
    refused(tmp_path, f"there is {TWO}?download=true", "rename it")


def test_only_a_file_with_a_download_address(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors?download=true")
    refused(tmp_path, "the end of a download address", "'model.safetensors'")


@pytest.mark.parametrize("extra", ["model-00001-of-00008.safetensors", "model.safetensors"])
def test_files_of_another_version(tmp_path: Path, extra: str) -> None:
    save_file({"c": A}, sharded(tmp_path) / extra)
    refused(tmp_path, "files of another version", extra, "Delete the files")


def test_an_index_that_was_left_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One file in place of all that it names, as tools for merging leave it; transformers takes the file as well."""
    sharded(tmp_path)
    for name in (ONE, TWO):
        (tmp_path / name).unlink()
    save_file({"c": A}, tmp_path / "model.safetensors")
    assert torch.equal(read_all(tmp_path)["c"], A)
    assert (
        f"{INDEX} of {tmp_path} names files of which none is there: model.safetensors serves" in caplog.text
    )


def test_two_sets_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    save_file({"c": A}, tmp_path / "model-00001-of-00003.safetensors")
    refused(tmp_path, f"3 safetensors files and no {INDEX}")


def test_a_tensor_in_two_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"a": A, "b": B}, sharded(tmp_path) / ONE)
    assert torch.equal(read_all(tmp_path)["b"], B)
    assert f"'b' is in {ONE} and, the same, in {TWO}" in caplog.text
    for other in (B + 1, B.float(), B[:2]):
        save_file({"a": A, "b": other}, sharded(tmp_path) / ONE)
        refused(tmp_path, f"tensor 'b' is in {ONE} and, different, in {TWO}")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": TWO, "b": ONE}}, "2 tensors are in another file than it says: a, b"),
        ({"weight_map": {"a": ONE, "x": TWO}}, "1 tensors that it names are in no file: x"),
        ({"weight_map": {"a": ONE, "x": TWO}}, "1 tensors are not in it: b"),
        ({"metadata": {"total_size": 40}}, "its total_size is 40, and they hold 32 bytes"),
        ({"metadata": {"total_size": 10**400}}, "its total_size is 1000"),
        ({"metadata": {"total_size": float("inf")}}, "its total_size is inf"),
    ],
)
def test_an_index_that_tells_other_things_than_the_headers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, index: dict[str, Any], said: str
) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path, **index))
    assert list(checkpoint.tensors) == ["a", "b"] and checkpoint.nbytes == 32
    assert said in caplog.text and len(caplog.records) == 1


def test_an_index_that_agrees_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for metadata in ({}, {"total_size": 32.0}, {"total_size": "32"}, None):
        assert open_checkpoint(sharded(tmp_path, metadata=metadata)).nbytes == 32
    assert not caplog.records


def test_names_that_would_steer_the_terminal_or_fill_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_checkpoint(sharded(tmp_path, weight_map={"\x1b[2J\ud800": ONE, "x" * 10_000: TWO}))
    text = caplog.text
    assert "\x1b" not in text and r"\x1b[2J" in text and len(text) < 2000
    text.encode()


def test_a_numbered_set_of_none_is_a_file_of_any_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model-00000-of-00000.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_an_empty_shard_and_a_pointer(tmp_path: Path) -> None:
    (sharded(tmp_path) / TWO).write_bytes(b"")
    refused(tmp_path, f"{TWO} is not a valid safetensors file", "empty")
    (tmp_path / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    refused(tmp_path, TWO, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-00001-of-00008.bin"]
)
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n(S'touch pwned'\ntR.")
    refused(tmp_path, "pickled files, which are refused", name, "any code", "safe_serialization=True")
    refused(sharded(tmp_path / "m", weight_map={"a": name}), "pickled files")
    assert not (tmp_path / "pwned").exists()


def test_no_model_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "none of its 0 files is a safetensors file")
    refused(tmp_path / "none", "No such file")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "it is a file", str(tmp_path))
    save_file({"a": A}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "a LoRA adapter, not a model")
