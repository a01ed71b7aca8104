"""qwenrt list, show and rm, over caches as other tools leave them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenrt.cli import listing, removal
from qwenrt.cli.terminal import readable_bytes
from qwenrt.loader.hub import removal as deleting
from tests.conftest import GOLDEN
from tests.loader.hub.caches import COMMIT, SECOND, into_huggingface, into_modelscope, sharded_model

Qwenrt = Callable[..., Any]
REPO = "Qwen/Qwen3-1.7B"
DAY = 86400


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_model(tmp_path_factory.mktemp("model") / "qwen3")


@pytest.fixture
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with qwenrt's place in own/, HuggingFace's cache in hf/ and ModelScope's in ms/, all empty."""
    monkeypatch.setenv("QWENRT_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    return tmp_path


# ---- list


def test_list(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    into_huggingface(here / "own" / "huggingface", "someone/their-model", model)
    snapshot = into_huggingface(here / "hf", REPO, model, without=[SECOND])
    into_modelscope(here / "ms", REPO, model)
    bert = into_huggingface(here / "hf", "someone/bert", model)
    (bert / "config.json").unlink()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    for path in snapshot.iterdir():
        os.utime(path, (time.time() - 3 * DAY, time.time() - 4 * DAY))
    done = qwenrt("list")
    assert done.code == 0
    size = readable_bytes(sum(path.stat().st_size for path in model.iterdir()) + len(COMMIT))
    head, *rows = (re.split(r"  +", line) for line in done.out.splitlines())
    assert head == ["NAME", "FROM", "ARCHITECTURE", "PARAMS", "WEIGHTS", "SIZE", "LAST USED"]
    assert [row[:2] + row[4:5] for row in rows] == [
        ["demo", "built in", "bfloat16"],
        ["someone/their-model", "qwenrt", "bfloat16"],
        ["Qwen3-1.7B", "huggingface", "not complete"],
        ["Qwen3-1.7B", "modelscope", "bfloat16"],
    ]
    assert rows[1][2:] == ["qwen3", "0.04 M", "bfloat16", size, "today"]
    assert rows[2][6] == "3 days ago"
    assert f"Qwen3-1.7B (huggingface) is not complete: 1 of 2 files are missing: {SECOND}" in done.err
    assert "1 model of other kinds" in done.err and "listed twice" in done.err
    everything = qwenrt("list", "--all")
    assert "someone/bert" in everything.out and "other kinds" not in everything.err


def test_list_as_json(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    into_huggingface(here / "hf", REPO, model, without=[SECOND])
    directory = into_modelscope(here / "ms", REPO, model)
    demo, broken, whole = json.loads(qwenrt("list", "--json").out)
    assert demo["name"] == "demo" and demo["from"] == "built in" and demo["loaded"]
    assert broken["revisions"] == [COMMIT] and not broken["complete"] and SECOND in broken["lacks"]
    assert not broken["loaded"] and whole["loaded"] and whole["directory"] == str(directory)
    assert (
        whole["repository"] == REPO
        and whole["weights"] == "bfloat16"
        and whole["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", whole["last_used"])


@pytest.mark.parametrize("columns", [40, 80])
def test_nothing_is_wider_than_the_terminal(
    columns: int, here: Path, model: Path, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    into_huggingface(here / "hf", "someone/Qwen3-1.7B-my-finetune", model)
    monkeypatch.setattr(listing, "width", lambda: columns)
    monkeypatch.setattr("qwenrt.cli.details.width", lambda: columns)
    listed = qwenrt("list").out
    assert "someone/Qwen3-1.7B-my-finetune\n  qwen3, 0.04 M, bfloat16, " in listed
    assert max(map(len, listed.splitlines())) <= columns
    shown = qwenrt("show", "someone/qwen3-1.7b-my-finetune").out
    assert max(len(line) for line in shown.splitlines()) <= columns


@pytest.mark.parametrize(
    ("days", "words"),
    [
        (0, "today"),
        (1, "yesterday"),
        (2, "2 days ago"),
        (59, "59 days ago"),
        (60, "2 months ago"),
        (800, "2 years ago"),
    ],
)
def test_how_long_ago(days: int, words: str) -> None:
    assert listing.how_long_ago(time.time() - days * DAY) == words


# ---- show


def test_show(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    snapshot = into_huggingface(here / "hf", REPO, model)
    done = qwenrt("show", "qwen3:1.7b")
    assert (done.code, done.err) == (0, "")
    said = dict(
        re.split(r"  +", line, maxsplit=1)
        for line in done.out.splitlines()
        if line[0] != " " and "  " in line
    )
    assert done.out.startswith("Qwen3-1.7B\n")
    assert said == {
        "from": "HuggingFace's cache",
        "directory": str(snapshot),
        "complete": "yes",
        "last used": "today",
        "licence": "Apache License Version 2.0, January 2004",
        "network": "qwen3, 0.04 M parameters",
        "layers": "1, 32 wide",
        "heads": "4, 2 of keys and values, 8 wide",
        "context": "4096 tokens",
        "vocabulary": "1024 tokens",
        "weights": "bfloat16",
        "talks": "yes",
        "thinks": "yes, can be switched off",
        "tools": "no",
        "sampling": "temperature 0.6, top_p 0.95, top_k 20",
        "memory": said["memory"],
        "files": said["files"],
    }
    assert said["memory"].startswith("for 4096 tokens on ") and "--quantize int4 " in done.out
    assert f"KiB  {SECOND}" in done.out and said["files"].startswith("8 files, ")


def test_show_as_json(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    told = json.loads(qwenrt("show", str(model), "--json").out)
    assert (told["layers"], told["heads"], told["kv_heads"], told["context"]) == (1, 4, 2, 4096)
    assert told["chat"] and told["thinking"] == "optional" and not told["tools"] and told["complete"]
    assert [way["quantize"] for way in told["memory"]] == [None, "int8", "int4"]
    assert told["sampling"]["top_k"] == 20
    assert {"name": SECOND, "bytes": (model / SECOND).stat().st_size} in told["files"]


def test_show_the_demo_and_a_base_model(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    demo = qwenrt("show", "demo")
    assert demo.code == 0 and "beyond 512 stretched by dynamic NTK" in demo.out and "the package" in demo.out
    into_huggingface(here / "hf", "Qwen/Qwen3-1.7B-Base", model)
    assert (
        "is a base model, which continues texts; Qwen3-1.7B answers" in qwenrt("show", "qwen3-1.7b-base").out
    )


def test_show_what_is_incomplete_and_what_is_of_another_kind(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    snapshot = into_huggingface(here / "hf", REPO, model, without=[SECOND])
    done = qwenrt("show", REPO)
    assert done.code == 1 and re.search(f"complete +no: 1 of 2 files are missing: {SECOND}", done.out)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    done = qwenrt("show", REPO)
    assert done.code == 1 and re.search("network +none that qwenrt runs: .*bert", done.out)


def test_show_what_is_not_here(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    into_huggingface(here / "hf", "someone/my-model", model)
    done = qwenrt("show", "Qwen3-4B")
    assert done.code == 1 and "it is not on this machine" in done.err and "qwenrt pull Qwen3-4B" in done.err
    assert "Did you mean someone/my-model" in qwenrt("show", "someone/my-modle").err


# ---- rm


def test_rm_deletes_its_own_with_all_that_belongs_to_it(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    own = here / "own" / "huggingface"
    snapshot = into_huggingface(own, REPO, model)
    other = into_huggingface(own, "Qwen/Qwen3-4B", model)
    blob = (snapshot / SECOND).resolve().name
    for path in (
        own / "parts" / "models--Qwen--Qwen3-1.7B" / "00.part",
        own / "parts" / "models--Qwen--Qwen3-4B" / "11.part",
        own / ".locks" / "models--Qwen--Qwen3-1.7B" / "00.lock",
        own / "verified" / blob,
        own / "verified" / "of-another",
        here / "own" / "packed" / f"{COMMIT}-0123.safetensors",
        here / "own" / "packed" / "another-0123.safetensors",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    size = readable_bytes(sum(path.stat().st_size for path in model.iterdir()) + len(COMMIT) + 3 * 5)
    tried = qwenrt("rm", "qwen3:1.7b", "--dry-run")
    assert tried.code == 0 and "nothing was deleted" in tried.err and snapshot.exists()
    assert "Qwen/Qwen3-1.7B in qwenrt's own place" in tried.out and "use these files too" not in tried.out
    done = qwenrt("rm", "qwen3:1.7b", "--yes")
    assert done.code == 0 and done.out.endswith(f"deleted; {size} are free again\n")
    left = sorted(str(path.relative_to(here / "own")) for path in (here / "own").rglob("*") if path.is_file())
    left = [name for name in left if "models--Qwen--Qwen3-4B/" not in name]
    assert left == ["huggingface/verified/of-another", "packed/another-0123.safetensors"]
    assert (other / SECOND).read_bytes() == (model / SECOND).read_bytes()
    assert "it is not on this machine" in qwenrt("rm", "qwen3:1.7b", "--yes").err


@pytest.mark.parametrize("layout", ["hub/models", "hub", "snapshots"])
def test_rm_from_modelscopes_cache(here: Path, model: Path, qwenrt: Qwenrt, layout: str) -> None:
    into_modelscope(here / "ms", REPO, model, layout)
    into_modelscope(here / "ms", "Qwen/Qwen3-4B", model, layout)
    done = qwenrt("rm", "Qwen3-1.7B", "-y")
    assert done.code == 0 and "ms-swift and other programs use these files too" in done.out
    left = [path.name for path in (here / "ms").rglob("*Qwen3*")]
    # the link with a dot went as well
    assert left == (["Qwen--Qwen3-4B"] if layout == "snapshots" else ["Qwen3-4B"])


def test_rm_of_several_copies_asks_which(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    into_huggingface(here / "own" / "huggingface", REPO, model)
    theirs = into_huggingface(here / "hf", REPO, model)
    done = qwenrt("rm", REPO, "--yes")
    assert done.code == 1 and "Say which: --from qwenrt or --from huggingface." in done.err
    assert qwenrt("rm", REPO, "--yes", "--from", "qwenrt").code == 0 and theirs.exists()
    assert "there is no such copy" in qwenrt("rm", REPO, "--from", "modelscope").err


def test_rm_tells_what_another_cache_keeps(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    own = into_huggingface(here / "own" / "huggingface", REPO, model)
    theirs = into_huggingface(here / "hf", REPO, model)
    blob = (own / SECOND).resolve()
    blob.unlink()
    os.link((theirs / SECOND).resolve(), blob)
    done = qwenrt("rm", REPO, "--yes", "--from", "qwenrt")
    kept = (model / SECOND).stat().st_size
    assert f"{kept / 1024:.1f} KiB of it stay, as another cache has them too" in done.out
    assert (theirs / SECOND).read_bytes() == (model / SECOND).read_bytes()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("Yes\n", 0), ("n\n", 1), ("\n", 1), ("", 1)])
def test_rm_asks(
    answer: str, code: int, here: Path, model: Path, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = into_huggingface(here / "hf", REPO, model)
    refused = qwenrt("rm", REPO, stdin=answer)
    assert refused.code == 1 and "stdin is no terminal. Add --yes." in refused.err and snapshot.exists()
    monkeypatch.setattr(removal, "is_tty", lambda stream: True)
    done = qwenrt("rm", REPO, stdin=answer)
    assert done.code == code and "Delete it? [y/N]" in done.out and snapshot.exists() == bool(code)


def test_rm_follows_no_link(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    elsewhere = into_huggingface(here / "elsewhere", REPO, model)
    (here / "hf").mkdir()
    (here / "hf" / "models--Qwen--Qwen3-1.7B").symlink_to(here / "elsewhere" / "models--Qwen--Qwen3-1.7B")
    done = qwenrt("rm", REPO, "--yes")
    assert done.code == 1 and "links are not followed" in done.err and elsewhere.exists()
    (here / "ms" / "models" / "Qwen").mkdir(parents=True)
    (here / "ms" / "models" / "Qwen" / "Qwen3-4B").symlink_to(model)
    done = qwenrt("rm", "Qwen3-4B", "--yes")
    assert done.code == 1 and "outside" in done.err and (model / "config.json").exists()
    inside = into_huggingface(here / "hf", "Qwen/Qwen3-8B", model)
    (inside / "out").symlink_to(model)
    assert qwenrt("rm", "Qwen3-8B", "--yes").code == 0 and (model / "config.json").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux who has a file open")
def test_rm_leaves_what_is_in_use(here: Path, model: Path, qwenrt: Qwenrt) -> None:
    snapshot = into_huggingface(here / "hf", REPO, model)
    code = (
        "import mmap, sys; file = open(sys.argv[1], 'rb'); held = mmap.mmap(file.fileno(), 0, access=1)\n"
        "file.close(); print('mapped', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(snapshot / SECOND)], stdin=-1, stdout=-1)
    assert child.stdout is not None and child.stdout.readline() == b"mapped\n"
    done = qwenrt("rm", REPO, "--yes")
    child.communicate(timeout=200)
    assert done.code == 1 and f"process {child.pid}" in done.err and snapshot.exists()
    assert qwenrt("rm", REPO, "--yes").code == 0


def test_rm_leaves_what_is_being_downloaded(
    here: Path, model: Path, qwenrt: Qwenrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    own = here / "own" / "huggingface"
    snapshot = into_huggingface(own, REPO, model, without=[SECOND])
    parts = own / "parts" / "models--Qwen--Qwen3-1.7B"
    parts.mkdir(parents=True)
    monkeypatch.setattr(deleting, "_PROC", here / "no-proc")
    with FileLock(parts / "00.part.lock"):
        done = qwenrt("rm", REPO, "--yes")
        assert done.code == 1 and "a download of it is running (00.part.lock is locked)" in done.err
    assert snapshot.exists() and qwenrt("rm", REPO, "--yes").code == 0


def test_rm_of_what_is_no_ones(here: Path, qwenrt: Qwenrt) -> None:
    assert "it is a part of the package" in qwenrt("rm", "demo").err
    assert "Did you mean" in qwenrt("rm", "Qwen3-4C", "--yes").err


def test_each_file_of_a_gguf_repository_is_a_model(here: Path, qwenrt: Qwenrt) -> None:
    snapshot = here / "hf" / "models--Qwen--Qwen3-4B-GGUF" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for tag, golden in {"Q4_K_M": "legacy", "Q8_0": "kquants"}.items():
        shutil.copy(GOLDEN / "gguf" / golden / "model.gguf", snapshot / f"Qwen3-4B-{tag}.gguf")
    said, name = qwenrt("list").out, "Qwen/Qwen3-4B-GGUF"
    assert f"{name}:Q4_K_M" in said and f"{name}:Q8_0" in said and "gguf" in said
    shown = qwenrt("show", f"{name}:q8_0")
    assert shown.out.startswith(f"{name}:Q8_0\n") and "gguf" in shown.out
    kept = qwenrt("rm", f"{name}:Q8_0", "--yes")
    assert kept.code != 0 and f"has 2 GGUF models: {name}:Q4_K_M, {name}:Q8_0" in kept.err
    (snapshot / "Qwen3-4B-Q8_0.gguf").unlink()
    assert qwenrt("rm", f"{name}:Q4_K_M", "--yes").code == 0 and not snapshot.exists()
