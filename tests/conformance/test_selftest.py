"""Stored digests of the built-in model: a CPU gives what its definitions gave, a model that is wrong in one way does
not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenrt.cli import main
from qwenrt.conformance import facts, selftest
from qwenrt.errors import CheckpointError
from qwenrt.model import qwen, rotary
from qwenrt.ops import reference

SHORT = (0, 1)  # texts that are quick


@pytest.fixture(scope="module")
def digests() -> dict[str, Any]:
    return selftest.kept_digests(selftest.DEMO)


def of(digests: dict[str, Any], *ways: str, texts: tuple[int, ...] = SHORT) -> dict[str, Any]:
    kept = {way: [digests["ways"][way][i] for i in texts] for way in ways}
    return {**digests, "ways": kept}


def found(digests: dict[str, Any], **options: Any) -> list[selftest.Finding]:
    return list(selftest.compare("demo", digests, device="cpu", **options))


def test_the_record_is_of_all_texts_and_ways(digests: dict[str, Any]) -> None:
    assert list(digests["ways"]) == list(selftest.WAYS)
    assert all(len(texts) == len(selftest.TEXTS) for texts in digests["ways"].values())
    assert any(ord(letter) > 0x4E00 for letter in selftest.TEXTS[1])
    assert len(digests["ways"]["as it is"][-1]["ids"]) > 512, "beyond the training length"


def test_the_cpu_gives_what_was_recorded(digests: dict[str, Any]) -> None:
    outcome = found(of(digests, *selftest.WAYS))
    assert [f.wrong for f in outcome] == [""] * 8 and max(f.error for f in outcome) < 1e-4
    (low,) = found(of(digests, "as it is", texts=(1,)), dtype="bfloat16")
    assert not low.wrong and 1e-4 < low.error < low.allowed


def with_off_by_one(right: Any) -> Any:
    def wrong(q: Any, k: Any, v: Any, kv: Any, plan: Any, *rest: Any) -> torch.Tensor:
        lens = [max(q_len, kv_len - 1) for q_len, kv_len in zip(plan.q_lens, plan.kv_lens, strict=True)]
        out: torch.Tensor = right(q, k, v, kv, dataclasses.replace(plan, kv_lens=lens), *rest)
        return out

    return wrong


def without_ntk(right: Any) -> Any:
    return lambda self, alpha, length: right(self, 1, length)


# Each where it shows: in short texts, beyond the length of training, in an int8 cache.
WRONG: dict[str, tuple[Any, str, Any, str, tuple[int, ...]]] = {
    "w1 and w2 swapped": (
        reference,
        "silu_and_mul",
        lambda right: lambda x: right(x.roll(x.shape[-1] // 2, -1)),
        "as it is",
        (0,),
    ),
    "wrong rotary half": (
        reference,
        "rotary",
        lambda right: lambda x, cos, sin: right(x, cos, -sin),
        "as it is",
        (0,),
    ),
    "LogN ignored": (qwen, "logn_scale", lambda right: lambda *_: None, "as it is", (5,)),
    "NTK ignored": (rotary.RotaryTables, "_table", without_ntk, "as it is", (5,)),
    "kv_len off by one": (reference, "attention", with_off_by_one, "as it is", (0,)),
    "zero of an int8 key forgotten": (
        reference,
        "dequantize_kv",
        lambda right: lambda c, s, z, dtype: right(c, s, 0 * z, dtype),
        "int8 cache",
        (0,),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_is_wrong_in_one_way_is_found(
    name: str, digests: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, what, wrong, way, texts = WRONG[name]
    monkeypatch.setenv("QWENRT_KERNELS", "off")
    monkeypatch.setattr(where, what, wrong(getattr(where, what)))
    assert any(finding.wrong for finding in found(of(digests, way, texts=texts)))


def test_an_answer_may_stray_where_two_tokens_are_as_likely() -> None:
    text = {"rows": [{"size": 10.0}], "tokens": [4, 5, 6], "ahead": [3.0, 1e-4, 2.0]}
    assert selftest._strayed(text, [4, 7, 9], 5e-4) == ""
    assert selftest._strayed(text, [3, 5, 6], 5e-4).startswith("token 0 of the answer is 3 in place of 4")


def test_the_command(
    digests: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = of(digests, "as it is", texts=(0,))
    selftest.write(few, tmp_path / "few.json")
    run = ["selftest", "demo", "--device", "cpu", "--digests", str(tmp_path / "few.json")]
    assert main(run) == 0 and "as it is       right" in capsys.readouterr().out
    few["ways"]["as it is"][0]["rows"][0]["best"][0][1] += 1.0
    selftest.write(few, tmp_path / "few.json")
    assert main([*run, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu" and report["packages"]["torch"] and report["findings"][0]["wrong"]
    monkeypatch.setattr(selftest, "TEXTS", ("你好",))
    monkeypatch.setattr(selftest, "WAYS", {"as it is": {}})
    assert main(["selftest", "demo", "--record", str(tmp_path / "own.json")]) == 0
    assert selftest.kept_digests(tmp_path / "own.json")["texts"] == 1
    with pytest.raises(CheckpointError, match="of another version"):
        found({"version": 0})


def test_facts_of_a_machine() -> None:
    here = facts.facts("cpu")
    assert here["backend"] == "cpu" and here["card"] is None
    assert here["packages"]["torch"] and here["date"].endswith("+00:00")
    assert facts.facts("no such device")["backend"] is None
