"""Qwen/Qwen3-4B-GGUF:Q4_K_M: which file that is, how it is fetched, and what is said where it is not clear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwenrt.config import Environment, read_model_config
from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.hub.gguf_files import chosen, is_tag, models
from qwenrt.loader.hub.names import understand
from qwenrt.loader.hub.resolve import resolve
from tests.conftest import GOLDEN
from tests.loader.hub.stand_in_hub import Hub

REPO = "Qwen/Qwen3-4B-GGUF"
FILES = {
    "Qwen3-4B-Q8_0.gguf": (GOLDEN / "gguf" / "kquants" / "model.gguf").read_bytes(),
    "Qwen3-4B-Q4_K_M.gguf": (GOLDEN / "gguf" / "legacy" / "model.gguf").read_bytes(),
    "Qwen3-4B-UD-Q4_K_XL.gguf": b"",
    "mmproj-F16.gguf": b"",
    "README.md": b"",
}
SPLIT = [f"qwen2.5-7b-instruct-q4_k_m-0000{i}-of-00002.gguf" for i in (1, 2)]


# ---- which file


def test_models_are_told_by_what_their_names_end_with() -> None:
    found = models([*FILES, *SPLIT, "BF16/Qwen3-4B-BF16.gguf", "model.gguf", "Other-Q8_0.gguf", "x-f16.gguf"])
    assert found == {
        "Qwen3-4B-Q8_0.gguf": ["Qwen3-4B-Q8_0.gguf"],
        "Other-Q8_0.gguf": ["Other-Q8_0.gguf"],
        "UD-Q4_K_XL": ["Qwen3-4B-UD-Q4_K_XL.gguf"],
        "Qwen3-4B-Q4_K_M.gguf": ["Qwen3-4B-Q4_K_M.gguf"],
        "qwen2.5-7b-instruct-q4_k_m.gguf": SPLIT,
        "model.gguf": ["model.gguf"],
        "F16": ["x-f16.gguf"],
    }
    assert models(SPLIT) == {"Q4_K_M": SPLIT} and models(["README.md", "a/b-Q8_0.gguf"]) == {}


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "Qwen3-4B-Q4_K_M.gguf"),
        ("q8_0", "Qwen3-4B-Q8_0.gguf"),
        ("ud-q4_k_xl", "Qwen3-4B-UD-Q4_K_XL.gguf"),
        ("qwen3-4b-q8_0.gguf", "Qwen3-4B-Q8_0.gguf"),
    ],
)
def test_a_tag_is_read_in_any_case(tag: str, file: str) -> None:
    assert is_tag(tag) and chosen(FILES, tag, REPO, "x") == [file]


def test_all_parts_belong_to_a_model_and_have_to_be_there() -> None:
    assert chosen(SPLIT, "Q4_K_M", REPO, "x") == chosen(SPLIT, SPLIT[1], REPO, "x") == SPLIT
    with pytest.raises(CheckpointError, match=r"x: 1 of the 2 parts of Q4_K_M are there"):
        chosen(SPLIT[1:], "Q4_K_M", REPO, "x")


@pytest.mark.parametrize(
    ("tag", "found"),
    [
        (
            "Q4_K_S",
            rf"none of its 3 GGUF models is Q4_K_S: Q4_K_M, Q8_0, UD-Q4_K_XL. Did you mean {REPO}:Q4_K_M",
        ),
        ("F32", rf"none of its 3 GGUF models is F32: .*Say which file, as {REPO}:Q4_K_M"),
    ],
)
def test_a_tag_that_is_not_there_gets_the_nearest(tag: str, found: str) -> None:
    with pytest.raises(CheckpointError, match=found):
        chosen(FILES, tag, REPO, "x")
    with pytest.raises(
        CheckpointError, match=f"it has no GGUF files beside its README. Load {REPO} without :{tag}"
    ):
        chosen(["model.safetensors"], tag, REPO, "x")


def test_names_with_a_tag_are_told_from_those_of_ollama() -> None:
    for name, repo in {REPO: REPO, "Qwen3-4B-GGUF": REPO, "bartowski/Qwen_Qwen3-4B-GGUF": None}.items():
        meant = understand(f"{name}:Q4_K_M")
        assert (meant.repo, meant.gguf, meant.note) == (repo or name, "Q4_K_M", "")
    assert understand("qwen/qwen3-4b-gguf:q8_0", [REPO]).repo == REPO
    assert understand("qwen3:4b").gguf == ""
    with pytest.raises(CheckpointError, match=r"quantisation of GGUF files.*Qwen/Qwen3-4B-GGUF:Q4_K_M"):
        understand("qwen3:4b-q4_K_M")


# ---- through the clients of two hubs on loopback


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub(REPO, dict(FILES)).start()
    yield running
    running.stop()


@pytest.fixture(params=["huggingface", "modelscope"])
def fetch(request: pytest.FixtureRequest, tmp_path: Path, hub: Hub) -> Callable[..., Path]:
    env = Environment(cache_dir=tmp_path / "cache", hf_endpoint=hub.url, modelscope_endpoint=hub.url)
    return lambda name, **how: resolve(name, request.param, env=env, progress=False, **how)


def test_one_file_is_fetched_and_is_then_here(fetch: Callable[..., Path], hub: Hub) -> None:
    directory = fetch(f"{REPO}:Q4_K_M")
    assert read_model_config(directory).quant is not None and open_checkpoint(directory).tensors
    assert hub.gets("Q4_K_M.gguf") and not hub.gets("Q8_0.gguf") and not hub.gets("UD-")
    asked = len(hub.requests)
    assert fetch(f"{REPO}:q4_k_m") == fetch(f"{REPO}:Q4_K_M", offline=True) == directory
    assert fetch(f"{REPO}:Q4_K_M", weights=False) == directory and len(hub.requests) == asked
    with pytest.raises(CheckpointError, match="offline, and there is no copy of it on this machine"):
        fetch(f"{REPO}:Q8_0", offline=True)
    assert fetch(f"{REPO}:Q8_0") != directory and hub.gets("Q8_0.gguf")
    assert fetch(f"{REPO}:Q4_K_M", newest=True) == directory


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            REPO,
            rf"it has GGUF files, and no others: Q4_K_M, Q8_0, UD-Q4_K_XL. Say which file, as {REPO}:Q4_K_M",
        ),
        (f"{REPO}:Q4_K_S", rf"is Q4_K_S: .* Did you mean {REPO}:Q4_K_M"),
        ("Qwen/Qwen3-40B-GGUF:Q4_K_M", "there is no such repository"),
    ],
)
def test_nothing_is_fetched_where_it_is_not_clear_what(
    fetch: Callable[..., Path], hub: Hub, name: str, found: str
) -> None:
    with pytest.raises(CheckpointError, match=found):
        fetch(name)
    assert not hub.gets(".gguf")
