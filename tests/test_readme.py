"""What the READMEs tell people to type works, and both tell the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_the_python_in_it_runs(name: str) -> None:
    code = blocks(name, "python")
    assert len(code) == 1
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code[0]], capture_output=True, text=True, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout or "巴黎" in done.stdout


@pytest.mark.parametrize("name", READMES)
def test_the_make_targets_exist(name: str) -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks(name, "")), flags=re.MULTILINE)
    assert targets[:2] == ["chat", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("name", READMES)
def test_the_commands_exist(name: str) -> None:
    from qwenrt.cli import build_parser

    known = build_parser().format_help()
    for command in re.findall(r"\.venv/bin/qwenrt (\w+)", "\n".join(blocks(name, ""))):
        assert command in known


def test_both_languages_tell_the_same() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    assert english.count("\n## ") == chinese.count("\n## ")
    assert english.count("\n| ") == chinese.count("\n| ")

    def figures(text: str) -> list[str]:
        return re.findall(r"\d+\.\d+ ?%|\d+/\d+", text)

    assert figures(english) == figures(chinese)


def test_no_place_of_one_machine_stands_in_the_project() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split("\n")
    private = re.compile(r"/(?:work|home/\w+|root)/\w|index-url(?! https://download\.pytorch\.org)")
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".cpp", ".h", ".txt", ".json") and "golden" not in name:
            found = private.search(path.read_text(encoding="utf-8"))
            assert found is None or path == Path(__file__), f"{name}: {found and found.group()}"
