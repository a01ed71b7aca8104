"""Models that other tools keep on this machine: found, checked, used as they are, and completed elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenrt.config import Environment
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.loader.hub import downloads
from qwenrt.loader.hub.resolve import resolve
from qwenrt.loader.hub.stores import copies, stores, what_lacks
from tests.loader.hub.caches import COMMIT, FIRST, SECOND, into_huggingface, into_modelscope, sharded_model
from tests.loader.hub.stand_in_hub import Hub

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
REPO = "Qwen/Qwen3-1.7B"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    return environment(tmp_path, NOWHERE)


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub = Hub(REPO, files).start()
    yield hub
    hub.stop()


def environment(tmp_path: Path, url: str) -> Environment:
    return Environment(
        cache_dir=tmp_path / "own",
        hf_endpoint=url,
        modelscope_endpoint=url,
        hf_cache=tmp_path / "hf",
        modelscope_cache=tmp_path / "ms",
    )


def state(directory: Path) -> list[tuple[str, int, int]]:
    """Everything below a directory, by name, size and time of change."""
    found = []
    for path in sorted(directory.rglob("*")):
        info = path.lstat()
        found.append((str(path), info.st_size, info.st_mtime_ns))
    return found


# ---- found


@pytest.mark.parametrize("layout", ["models", "hub/models", "hub", "", "snapshots"])
def test_each_layout_of_modelscope(tmp_path: Path, model: Path, env: Environment, layout: str) -> None:
    directory = into_modelscope(tmp_path / "ms", REPO, model, layout)
    before = state(tmp_path / "ms")
    assert resolve("qwen3:1.7b", env=env, offline=True) == directory
    assert resolve(REPO.upper(), "modelscope", env=env, progress=False) == directory  # no socket is needed
    assert [copy.repo for copy in copies(env)] == [REPO]
    assert state(tmp_path / "ms") == before
    with pytest.raises(CheckpointError, match="no copy of it"):
        resolve(REPO, "huggingface", env=env, offline=True)
    with pytest.raises(CheckpointError, match="no copy of it"):
        resolve(REPO, revision="v9", env=env, offline=True)


def test_huggingface(tmp_path: Path, model: Path, env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = into_huggingface(tmp_path / "hf", REPO, model)
    before = state(tmp_path / "hf")
    monkeypatch.setattr(socket, "socket", None)
    for revision in (None, "main", COMMIT):
        assert resolve("Qwen3-1.7B", env=env, revision=revision, progress=False) == snapshot
    assert resolve("Qwen3-1.7B", env=env, offline=True, weights=False) == snapshot
    assert state(tmp_path / "hf") == before and not (tmp_path / "own").exists()


def test_without_a_note_of_the_main_branch_the_newest_snapshot_serves(
    tmp_path: Path, model: Path, env: Environment
) -> None:
    old = into_huggingface(tmp_path / "hf", REPO, model, commit="1" * 40)
    new = into_huggingface(tmp_path / "hf", REPO, model, commit="0" * 40)
    (tmp_path / "hf" / "models--Qwen--Qwen3-1.7B" / "refs" / "main").unlink()
    os.utime(old, (1, 1))
    assert resolve(REPO, env=env, offline=True) == new
    assert resolve(REPO, env=env, offline=True, revision="1" * 40) == old


def test_qwenrts_own_place_comes_first(tmp_path: Path, model: Path, env: Environment) -> None:
    into_huggingface(tmp_path / "hf", REPO, model)
    into_modelscope(tmp_path / "ms", REPO, model)
    own = into_huggingface(tmp_path / "own" / "huggingface", REPO, model)
    assert resolve(REPO, env=env, offline=True) == own
    assert [copy.store.whose for copy in copies(env)] == ["qwenrt", "huggingface", "modelscope"]
    (own / SECOND).unlink()
    assert resolve(REPO, env=env, offline=True).is_relative_to(tmp_path / "hf")


def test_one_directory_by_two_settings_is_one_store(tmp_path: Path) -> None:
    env = Environment(cache_dir=tmp_path, hf_cache=tmp_path / "huggingface", modelscope_cache=tmp_path / "ms")
    assert [store.whose for store in stores(env)] == ["qwenrt", "qwenrt", "modelscope"]


def test_what_is_no_model_is_passed_over(tmp_path: Path, env: Environment) -> None:
    for name in ("models--", "datasets--a--b", "models--a--b", ".locks", "x"):
        (tmp_path / "hf" / name).mkdir(parents=True)
    (tmp_path / "hf" / "version.txt").write_text("1")
    for name in ("models/Qwen", "hub/datasets/a/b", "hub/models", "hub/._____temp/a/b"):
        (tmp_path / "ms" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "ms" / "credentials").mkdir()
    assert [(copy.repo, copy.directory()) for copy in copies(env)] == [("a/b", None)]
    (tmp_path / "hf" / "models--a--b" / "refs" / "deep").mkdir(parents=True)
    os.mkfifo(tmp_path / "hf" / "models--a--b" / "refs" / "deep" / "fifo")  # is not waited for
    (tmp_path / "hf" / "models--a--b" / "refs" / "main").write_bytes(b"\xff" * 5000)
    (found,) = copies(env)
    assert found.named == {}


def test_the_variables_of_other_tools(tmp_path: Path) -> None:
    home = {"QWENRT_HOME": str(tmp_path)}
    caches = [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ]
    for variables, place in caches:
        assert str(Environment.read(home | variables).hf_cache) == place
    assert Environment.read(home | {"MODELSCOPE_CACHE": "~/m"}).modelscope_cache == Path.home() / "m"
    assert Environment.read(home).modelscope_cache == Path.home() / ".cache" / "modelscope"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", none)
    env = Environment.read({"QWENRT_HOME": str(tmp_path)})
    assert env.hf_cache is env.modelscope_cache is None and list(copies(env)) == []
    with pytest.raises(ConfigError, match="Set it to a directory for downloads"):
        Environment.read({})


# ---- checked


def test_what_lacks(tmp_path: Path, model: Path) -> None:
    assert what_lacks(model) == ""
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    assert "the tokenizer" in what_lacks(copy) and what_lacks(copy, tokenizer=False) == ""
    data = (copy / SECOND).read_bytes()
    (copy / SECOND).write_bytes(data[:-10])
    assert "truncated" in what_lacks(copy, tokenizer=False)
    assert what_lacks(copy, tokenizer=False, headers=False) == ""
    (copy / SECOND).unlink()
    (copy / SECOND).symlink_to("../../blobs/none")
    assert "a link that leads nowhere" in what_lacks(copy, tokenizer=False, headers=False)
    (copy / SECOND).unlink()
    for headers in (True, False):
        assert f"1 of 2 files are missing: {SECOND}" in what_lacks(copy, tokenizer=False, headers=headers)
    assert what_lacks(copy, weights=False, tokenizer=False) == ""
    (copy / "config.json").unlink()
    assert what_lacks(copy) == "config.json"


def test_an_incomplete_copy_offline(tmp_path: Path, model: Path, env: Environment) -> None:
    into_huggingface(tmp_path / "hf", REPO, model, without=[SECOND])
    into_huggingface(tmp_path / "hf", "Qwen/Qwen3-4B", model)
    into_huggingface(tmp_path / "hf", "Qwen/Qwen3-8B", model, without=[SECOND])  # nor is this one of use
    other = into_huggingface(tmp_path / "hf", "someone/bert", model)
    (other / "config.json").unlink()
    (other / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError) as error:
        resolve(REPO, env=env, offline=True)
    assert (
        f"the copy in HuggingFace's cache is not complete: 1 of 2 files are missing: {SECOND}"
        in error.value.found
    )
    assert error.value.found.endswith("there is: Qwen3-4B")
    assert resolve(REPO, env=env, offline=True, weights=False).is_relative_to(tmp_path / "hf")


def test_without_a_tokenizer_a_copy_serves_only_where_no_hub_may_be_asked(
    tmp_path: Path, model: Path, env: Environment
) -> None:
    snapshot = into_huggingface(tmp_path / "hf", REPO, model, without=["tokenizer.json"])
    assert resolve(REPO, env=env, offline=True) == snapshot
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve(REPO, "huggingface", env=env, progress=False)


# ---- completed


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("whose", ["huggingface", "modelscope"])
def test_only_what_is_missing_is_fetched(
    tmp_path: Path, model: Path, hub: Hub, source: str, whose: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A copy of the same hub's tools; that of the other hub's is looked at too where the source is not chosen."""
    if whose == "huggingface":
        into_huggingface(tmp_path / "hf", REPO, model, without=[SECOND])
    else:
        (into_modelscope(tmp_path / "ms", REPO, model) / SECOND).unlink()
    before = state(tmp_path / ("hf" if whose == "huggingface" else "ms"))
    env = environment(tmp_path, hub.url)
    directory = resolve(REPO, source, env=env, progress=True)
    said = capfd.readouterr().err
    assert directory.is_relative_to(tmp_path / "own") and what_lacks(directory) == ""
    assert SECOND in hub.sent and (FIRST in hub.sent) == (whose != source)
    assert f"trying {hub.url.removeprefix('http://')} ..." in said
    if whose == source:
        assert f"cache has {REPO} incomplete: 1 of 2 files are missing: {SECOND}" in said
    after = state(tmp_path / ("hf" if whose == "huggingface" else "ms"))
    assert after == before  # another name of a file is no change of it
    assert resolve(REPO, source, env=env, offline=True) == directory


def test_a_file_that_is_another_than_the_hubs_is_not_taken(tmp_path: Path, model: Path, hub: Hub) -> None:
    snapshot = into_huggingface(tmp_path / "hf", REPO, model, without=[SECOND])
    blob = (snapshot / FIRST).resolve()
    blob.write_bytes(bytes(blob.stat().st_size))
    directory = resolve(REPO, "huggingface", env=environment(tmp_path, hub.url), progress=False)
    assert (directory / FIRST).read_bytes() == (model / FIRST).read_bytes() and FIRST in hub.sent


def test_on_another_disk_it_is_copied(
    tmp_path: Path, model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*args: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    snapshot = into_huggingface(tmp_path / "hf", REPO, model, without=[SECOND])
    directory = resolve(REPO, "huggingface", env=environment(tmp_path, hub.url), progress=False)
    assert (directory / FIRST).read_bytes() == (model / FIRST).read_bytes() and FIRST not in hub.sent
    assert (directory / FIRST).stat().st_ino != (snapshot / FIRST).stat().st_ino


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(tmp_path: Path, hub: Hub) -> None:
    hub.files["config.json"] = b'{"model_type": "llama"}'
    for source in ("huggingface", "modelscope"):
        with pytest.raises(ConfigError, match="llama"):
            resolve(REPO, source, env=environment(tmp_path, hub.url), progress=False)
    assert not {FIRST, SECOND} & set(hub.sent)


def test_pull_asks_for_the_newest_of_its_own(tmp_path: Path, model: Path, hub: Hub) -> None:
    env = environment(tmp_path, hub.url)
    directory = resolve(REPO, "huggingface", env=env, progress=False)
    asked = len(hub.requests)
    assert resolve(REPO, "huggingface", env=env, progress=False) == directory and len(hub.requests) == asked
    assert resolve(REPO, "huggingface", env=env, progress=False, newest=True) == directory
    assert len(hub.requests) > asked
    shutil.rmtree(tmp_path / "own")
    snapshot = into_huggingface(tmp_path / "hf", REPO, model)
    assert resolve(REPO, env=env, progress=False, newest=True) == snapshot


# ---- said meanwhile


def test_who_is_asked_is_said_before_anybody_answers(
    tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        env = replace(environment(tmp_path, f"http://{where}"), modelscope_endpoint=hub.url)
        directory = resolve("qwen3:1.7b", env=env, progress=True)
    said = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith(("qwen3", "trying", "no "))
    ]
    assert said[0].startswith("qwen3:1.7b is Qwen/Qwen3-1.7B; others of this size: Qwen3-1.7B-Base")
    assert said[1] == f"trying {where} ..." and re.fullmatch(
        f"no answer from {where} after [0-9]+ s", said[2]
    )
    assert said[3] == f"trying {hub.url.removeprefix('http://')} ..."
    assert directory.is_relative_to(tmp_path / "own" / "modelscope")


def test_the_nearest_names_where_a_hub_does_not_know_one(tmp_path: Path, model: Path, hub: Hub) -> None:
    into_huggingface(tmp_path / "hf", "someone/my-finetune", model)
    env = environment(tmp_path, hub.url)
    for source in ("huggingface", "modelscope"):
        with pytest.raises(CheckpointError) as error:
            resolve("Qwen3-4C", source, env=env, progress=False)
        assert (
            "there is no such repository" in error.value.found
            and "Did you mean Qwen3-4B, " in error.value.remedy
        )
    with pytest.raises(CheckpointError) as error:
        resolve("me/my-finetune", "huggingface", env=env, progress=False)
    assert "Did you mean someone/my-finetune" in error.value.remedy
    with pytest.raises(CheckpointError) as error:
        # a name that is right: no others are offered
        resolve("Qwen3-4B", "huggingface", env=env, progress=False)
    assert "Did you mean" not in error.value.remedy


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_full_disk_is_seen_before_the_weights_are_fetched(
    tmp_path: Path, hub: Hub, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        CheckpointError, match=r"GiB are still to be fetched, .* Free some space \(qwenrt list"
    ):
        resolve(REPO, source, env=environment(tmp_path, hub.url), progress=False)
    assert not {FIRST, SECOND} & set(hub.sent)
