"""A foreign backend in a package of its own, found by its entry point: the one of docs/adding_a_backend.md, and ones
with every mistake that such a package makes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qwenrt
from qwenrt.backends import registry
from qwenrt.conformance import __main__ as table
from qwenrt.errors import BackendError

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_a_backend.md"
PLUGIN = re.findall(r"```python\n(# qwenrt_musa.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)[0]

LYING = PLUGIN.replace(
    "return super().rms_norm(x, weight, eps)", "return super().rms_norm(x, weight, eps) * 1.5"
)
FUTURE = PLUGIN.replace("api = 1", "api = 99")
RAISING = PLUGIN.replace("return None  # it is there", 'raise OSError("the driver does not answer")')
ABSENT = PLUGIN.replace("return None  # it is there", 'return "no musa device is here"')
BROKEN = "raise ImportError('libmusa.so: cannot open shared object file')"
FOREIGN = "class MusaBackend:\n    pass\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a package with an entry point where Python looks, as pip leaves it."""

    def put(source: str) -> None:
        (tmp_path / "qwenrt_musa.py").write_text(source, encoding="utf-8")
        facts = tmp_path / "qwenrt_musa-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Name: qwenrt-musa\nVersion: 1.0\n", encoding="utf-8")
        entry = "[qwenrt.backends]\nmusa = qwenrt_musa:MusaBackend\n"
        (facts / "entry_points.txt").write_text(entry, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    sys.modules.pop("qwenrt_musa", None)


def served() -> tuple[str, str]:
    """What the built-in model answers on it, and what it says of its ops."""
    options: dict[str, Any] = {"dtype": "float32", "progress": False, "max_model_len": 256}
    with qwenrt.load("demo", device="musa", **options) as llm:
        return llm.chat("What is the capital of France?", temperature=0)[0], llm.explain()


def probe() -> registry.Probe:
    (found,) = (found for found in registry.probe_all() if found.name == "musa")
    return found


def test_the_documents_plug_in_is_short_and_serves(install: Callable[[str], None]) -> None:
    install(PLUGIN)
    assert len(PLUGIN.splitlines()) <= 60
    assert probe() == registry.Probe("musa", True, "plugin qwenrt_musa:MusaBackend")
    answer, explained = served()
    assert "Paris" in answer and re.search(r"rms_norm +musa +\d+  a kernel of musa's", explained)
    assert registry.create("auto").name != "musa", "what is plugged in is asked for by name"


def test_a_kernel_that_lies_is_not_used(
    install: Callable[[str], None], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    install(LYING)
    answer, explained = served()
    assert "Paris" in answer and re.search(r"rms_norm +plain torch +\d+  self-check", explained)
    assert "the rms_norm kernel of musa is not used: self-check: differs from its definition" in caplog.text
    assert table.main(["--device", "musa", "--op", "rms_norm"]) == 1
    assert "WRONG  musa: rms_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (FUTURE, "it is written for interface 99 of backends, and this qwenrt has 1"),
        (RAISING, "OSError: the driver does not answer"),
        (ABSENT, "no musa device is here"),
        (BROKEN, "ImportError: libmusa.so: cannot open shared object file"),
        (FOREIGN, "not a subclass of qwenrt.backends.base.Backend"),
    ],
    ids=["wrong API number", "raising probe", "no device", "broken", "no backend"],
)
def test_what_is_wrong_with_a_plug_in_is_said_and_harms_nothing_else(
    source: str, said: str, install: Callable[[str], None]
) -> None:
    install(source)
    with pytest.raises(BackendError, match=re.escape(said)):
        registry.create("musa")
    assert not probe().usable and said in probe().why
    assert registry.create("auto").name == registry.create("cpu").name
