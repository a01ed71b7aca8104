"""Beginnings that outlive their process: the same tokens, computed or read."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from qwenrt.engine import block_files, prefix_store
from qwenrt.engine.engine import Engine
from qwenrt.engine.prefix_store import fingerprint
from qwenrt.errors import ConfigError
from qwenrt.sampling_params import SamplingParams
from tests.engine.conftest import golden_model, last, make_engine, run, tokens

PROMPT = [(7 * i + i * i) % 199 for i in range(60)]
PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=6)


def started(directory: Path, name: str = "plain", **settings: Any) -> Engine:
    return make_engine(name, **{"block_size": 4, "prefix_store": directory, "num_blocks": 64, **settings})


def asked(
    engine: Engine, prompt: list[int] = PROMPT, params: SamplingParams = PARAMS
) -> tuple[list[int], int]:
    """The tokens of an answer, and how many of the prompt were in the cache."""
    name = engine.add(prompt, params)
    outputs = run(engine)[name]
    usage = last(outputs).usage
    assert usage is not None
    return tokens(outputs), usage.cached_tokens


def kept(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.kv"))


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_new_process_reads_what_an_old_one_computed(tmp_path: Path, cache: str) -> None:
    first = started(tmp_path, kv_cache_dtype=cache)
    wanted = [asked(first)[0], asked(first)[0], asked(first, PROMPT[:50])[0]]
    first.close()
    assert wanted[0] == wanted[1] and len(kept(tmp_path)) == 14
    second = started(tmp_path, kv_cache_dtype=cache)
    assert asked(second) == (wanted[0], 56)
    assert second.stats()["stored_blocks_read"] == 14
    assert asked(second, PROMPT[:50]) == (wanted[2], 48)
    assert second.stats()["stored_blocks_read"] == 14, "what is in memory is not read again"
    second.close()


def test_what_only_one_request_had_is_not_kept(tmp_path: Path) -> None:
    engine = started(tmp_path)
    asked(engine)
    asked(engine, [*PROMPT[:20], 3, 4, 5, 6, 7, 8])
    engine.close()
    assert len(kept(tmp_path)) == 5


def test_blocks_are_written_between_steps_and_when_idle(tmp_path: Path) -> None:
    engine = started(tmp_path)
    asked(engine)
    asked(engine)
    while engine.tend():
        pass
    assert engine.stats()["stored_blocks_written"] == 14
    engine.close()


def test_the_rest_of_a_prompt_is_computed(tmp_path: Path) -> None:
    longer = [*PROMPT, *range(30)]
    engine = started(tmp_path)
    asked(engine)
    asked(engine)
    engine.close()
    fresh = make_engine("plain", block_size=4)
    again = started(tmp_path)
    assert asked(again, longer) == (asked(fresh, longer)[0], 60 // 4 * 4 - 4)
    again.close()


@pytest.mark.parametrize("damage", ["first", "middle", "all"])
def test_a_damaged_block_is_computed(tmp_path: Path, damage: str) -> None:
    engine = started(tmp_path)
    wanted, _ = asked(engine)[0], asked(engine)
    engine.close()
    files = sorted(kept(tmp_path), key=lambda path: -path.stat().st_mtime_ns)  # beginnings count as later
    chosen = {"first": files[:1], "middle": files[5:6], "all": files}[damage]
    for path in chosen:
        whole = bytearray(path.read_bytes())
        whole[-9] ^= 4
        path.write_bytes(whole)
    again = started(tmp_path)
    assert asked(again) == (wanted, {"first": 0, "middle": 20, "all": 0}[damage])
    again.close()
    assert not any(path.exists() for path in chosen[:1])


def test_what_depends_on_something_else_is_not_read(tmp_path: Path) -> None:
    engine = started(tmp_path)
    asked(engine)
    asked(engine)
    engine.close()
    for settings in ({"kv_cache_dtype": "int8"}, {"name": "big_base"}, {"block_size": 8}):
        other = started(tmp_path, **settings)
        asked(other)
        assert other.stats()["stored_blocks_read"] == 0, settings
        other.close()


def test_another_root_is_another_beginning(tmp_path: Path) -> None:
    """The NTK factor depends on the length of the whole prompt."""
    engine = started(tmp_path, "ntk_logn")
    longer = [*PROMPT, *range(120)]
    asked(engine)
    asked(engine)
    engine.close()
    again, fresh = started(tmp_path, "ntk_logn"), make_engine("ntk_logn", block_size=4)
    assert asked(again, longer) == asked(fresh, longer)
    assert again.stats()["stored_blocks_read"] == 0
    again.close()


def test_another_salt_is_another_beginning(tmp_path: Path) -> None:
    engine = started(tmp_path)
    for _ in range(2):
        asked(engine, params=PARAMS.with_(cache_salt="a"))
    engine.close()
    again = started(tmp_path)
    for salt in ("", "b"):
        assert asked(again, params=PARAMS.with_(cache_salt=salt))[1] == 0
    assert asked(again, params=PARAMS.with_(cache_salt="a"))[1] == 56
    again.close()


def test_a_full_disk_turns_it_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_files.os, "write", full)
    engine = started(tmp_path)
    with caplog.at_level(logging.WARNING, "qwenrt"):
        first = asked(engine)[0]
        for _ in range(3):
            assert asked(engine)[0] == first
            while engine.tend():
                pass
        engine.close()
    assert len([r for r in caplog.records if "no longer kept" in r.message]) == 1
    assert not list(tmp_path.iterdir())


def test_a_request_that_ends_while_it_is_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_store, "_ALONE", 0.0)
    engine = started(tmp_path)
    wanted, _ = asked(engine)[0], asked(engine)
    engine.close()
    now = [0.0]

    def clock() -> float:  # each look at it is a moment later: one block is read in a step
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(prefix_store, "_ALONE", 1.5)
    monkeypatch.setattr(prefix_store, "_BESIDE", 1.5)
    again = started(tmp_path)
    assert again.store is not None
    again.store._clock = clock
    name = again.add(PROMPT, PARAMS)
    for _ in range(4):
        again.step()
    assert 0 < again.stats()["stored_blocks_read"] < 14
    beside = again.add([5, 6, 7], PARAMS)
    told = [output for _ in range(3) for output in again.step()]
    assert beside in {output.request_id for output in told}, "others are served meanwhile"
    assert again.stats()["stored_blocks_read"] < 14
    again.abort(name)
    run(again)
    assert again.blocks.num_free == again.blocks.num_blocks
    assert asked(again) == (wanted, 56)
    again.close()


def test_two_that_begin_alike_read_it_once(tmp_path: Path) -> None:
    engine = started(tmp_path)
    for _ in range(2):
        asked(engine, PROMPT * 3)
    engine.close()
    again = started(tmp_path, num_blocks=128)
    names = [again.add([*PROMPT * 3, i], PARAMS) for i in range(3)]
    outputs = run(again)
    usages = [last(outputs[name]).usage for name in names]
    assert [usage and usage.cached_tokens for usage in usages] == [176, 180, 180]
    assert again.stats()["stored_blocks_read"] == 44
    again.close()


def test_a_directory_that_others_can_write_in_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="prefix_store="):
        started(tmp_path)


def test_every_weight_is_in_the_fingerprint() -> None:
    engine = make_engine("plain")
    model, cache = engine.runner.model, engine.runner.cache
    base = fingerprint(model, cache)
    assert base == fingerprint(model, cache)
    assert base != fingerprint(model, cache, activations="int8")
    assert base != fingerprint(golden_model("ntk_only"), cache)
    for name in (*model.tensor_specs, *model.linear_specs):
        value = model.get(name)
        tensor = value if not hasattr(value, "data") or name in model.tensor_specs else value.data["weight"]
        flat = tensor.view(-1)
        kept = flat[-1].clone()
        flat[-1] += 1
        assert fingerprint(model, cache) != base, name
        flat[-1] = kept
    assert fingerprint(model, cache) == base
