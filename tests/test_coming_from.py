"""docs/coming_from.md in both languages: its code runs, its commands are parsed, its tables leave nothing out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import qwenrt
from qwenrt.other_names import OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = ("docs/coming_from.md", "docs/coming_from_zh.md")
VARIABLES = "## Environment variables", "## 环境变量"
# Words in capitals that are no variables: the beginning of setup.py's macros.
NO_VARIABLES = {"QWENRT_WITH_"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_the_code_runs(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block with one model, loaded once: how it is loaded is checked by the types of the call."""
    with qwenrt.load("demo", progress=False) as llm:

        def load(model: str, **options: object) -> qwenrt.LLM:
            qwenrt.LoadOptions(**options)  # type: ignore[arg-type]
            assert model == "demo"
            return llm

        monkeypatch.setattr("qwenrt.loading.load", load)
        blocks = re.findall(r"```python\n(.*?)```", text_of(page), flags=re.DOTALL)
        assert len(blocks) == 4
        for block in blocks:
            exec(compile(block, page, "exec"), {})
    assert "巴黎" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_are_commands(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    from qwenrt.cli import build_parser

    parser = build_parser()
    commands = [line for line in re.findall(r"`(qwenrt [^`]+)`", text_of(page)) if " " in line]
    assert len(commands) > 12
    for command in commands:
        words = [*shlex.split(command)[1:], *(["--help"] if len(command.split()) == 2 else [])]
        try:
            parser.parse_args(words)
        except SystemExit as left:
            assert left.code == 0, f"{command}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_is_in_the_table(page: str) -> None:
    text = text_of(page)
    table = text[max(text.find(title) for title in VARIABLES) :]
    read = set(re.findall(r'"([A-Z][A-Z_]{3,})"', (ROOT / "qwenrt/config/environment.py").read_text()))
    read |= named_in("setup.py", "Makefile", "qwenrt", "scripts", "benchmarks") - NO_VARIABLES
    missing = {name for name in read if f"`{name}" not in table}
    assert not missing, f"{page} does not say what these are: {sorted(missing)}"
    told = set(re.findall(r"`(QWENRT_[A-Z_]+)", text)) - named_in("tests")
    assert told <= read, f"{page} names variables that nothing reads: {sorted(told - read)}"


def named_in(*places: str) -> set[str]:
    """The names of our variables in files and in the Python of directories."""
    files = [
        file for place in places for file in [ROOT / place, *(ROOT / place).rglob("*.py")] if file.is_file()
    ]
    return {
        name for file in files for name in re.findall(r"QWENRT_[A-Z_]+", file.read_text(encoding="utf-8"))
    }


def test_both_languages_tell_the_same() -> None:
    english, chinese = map(text_of, PAGES)
    assert english.count("\n| ") == chinese.count("\n| ") and english.count("\n## ") == chinese.count("\n## ")

    def code(text: str) -> list[str]:
        return [
            re.sub(r"\s*#.*", "", line)
            for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            for line in b.split("\n")
        ]

    assert code(english) == code(chinese)


def test_common_names_are_explained() -> None:
    text = text_of(PAGES[0])
    for name in (
        "torch_dtype",
        "max_new_tokens",
        "do_sample",
        "device_map",
        "load_in_4bit",
        "trust_remote_code",
        "n_ctx",
    ):
        assert name in text and name in OPTIONS
    for name in (
        "use_dynamic_ntk",
        "use_logn_attn",
        "use_flash_attn",
        "use_cache_quantization",
        "model_name_or_path",
    ):
        assert name in text and name in OPTIONS
