"""What is installed, from which torch to what an index shows: looks at the files, and one slow build of it all."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


set_up = module("scripts/set_up.py")
build = module("setup.py")


# ---- which torch

CPU = set_up.CPU_INDEX


@pytest.mark.parametrize(
    ("wish", "platform", "vendors", "reached", "index", "said"),
    [
        ("auto", "linux", [], True, CPU, "CPU build (no NVIDIA GPU is seen)"),
        ("auto", "linux", [], False, None, "does not answer within 5 s"),
        ("auto", "linux", ["NVIDIA"], True, None, "CUDA build"),
        ("cpu", "linux", ["NVIDIA"], True, CPU, "CPU build (as asked)"),
        ("auto", "linux", ["Ascend"], True, CPU, "for Ascend devices install their vendor's torch"),
        ("auto", "linux", ["AMD or DCU"], True, CPU, "for AMD or DCU devices"),
        ("auto", "darwin", [], True, None, "no CUDA libraries"),
        ("default", "linux", [], True, None, "where pip is set to look"),
        ("https://wheels.example/rocm", "linux", [], False, "https://wheels.example/rocm", "wheels.example"),
    ],
)
def test_which_torch_is_taken(
    wish: str, platform: str, vendors: list[str], reached: bool, index: str | None, said: str
) -> None:
    found, why = set_up.choose_torch(wish, platform, vendors, lambda asked: reached)
    assert found == index and said in why


def test_another_wish_is_refused_with_what_there_is() -> None:
    with pytest.raises(set_up.Failed, match=r"TORCH=gpu: use auto, cpu, default"):
        set_up.choose_torch("gpu", "linux", [])


def test_an_index_that_cannot_be_reached_is_told_in_time() -> None:
    assert not set_up.answers("http://127.0.0.1:9/nothing")


def test_drivers_are_those_that_doctor_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenrt.cli import machine

    monkeypatch.setattr(Path, "exists", lambda self: str(self) in ("/dev/kfd", "/dev/nvidiactl"))
    assert machine.drivers() == set_up.drivers() == ["NVIDIA", "AMD or DCU"]


def test_what_pip_says_is_told_in_fewer_words(capsys: pytest.CaptureFixture[str]) -> None:
    told = set_up.Told(set_up.Screen(live=False), started=0.0)
    for line in (
        "Collecting torch",
        "  Downloading https://i.example/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl (191.8 MB)",
        "Progress 95900000 of 191794682",
        "  Downloading jinja2-3.1.6-py3-none-any.whl.metadata (2.9 kB)",
        "Using cached numpy-2.4.0-cp311-cp311-manylinux_2_28_x86_64.whl (16.6 MB)",
        "  qwenrt: compiled 8 of 63 files",
        "  qwenrt: built the CPU kernels (_qwenrt_cpu.so) in 31 s",
    ):
        told.hear(line)
        if line.startswith("Progress"):
            assert told.doing == "torch-2.13.0%2Bcpu, 96 MB of 192 MB"
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "(0 s)" not in line]
    said = [re.sub(r" \(\d+ s\)$", "", line) for line in said]
    assert "torch-2.13.0%2Bcpu: 192 MB" in said and "numpy-2.4.0: 17 MB from the cache of pip" in said
    assert "built the CPU kernels (_qwenrt_cpu.so) in 31 s" in said
    assert told.sizes() == "192 MB downloaded, 17 MB from this machine"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (2900, "2.9 kB"), (6.3e6, "6.3 MB"), (191.8e6, "192 MB")]
)
def test_sizes_are_counted_as_pip_does(size: float, text: str) -> None:
    assert set_up.readable(size) == text


# ---- what an index shows


def links(text: str) -> list[str]:
    return re.findall(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "CONTRIBUTING.md", "docs"])
def test_every_link_leads_somewhere(name: str) -> None:
    files = [ROOT / name] if name.endswith(".md") else sorted((ROOT / name).glob("*.md"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        for link in links(text):
            target, _, anchor = link.partition("#")
            if target.startswith(("http://", "https://")):
                continue
            found = file.parent / target if target else file
            assert found.exists(), f"{file.name}: {link}"
            if anchor and found.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
                assert anchor in anchors, f"{file.name}: {link}"


def test_the_page_of_an_index_has_no_link_to_a_neighbour() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    published = build.readme_for_an_index(readme, "https://example.org/us/qwenrt")
    assert "https://example.org/us/qwenrt/blob/main/docs/serving.md" in links(published)
    assert "https://example.org/us/qwenrt/tree/main/examples" in links(published)
    for page in (published, build.readme_for_an_index(readme, "")):
        assert all(link.startswith(("https://", "#")) for link in links(page))
    assert "the map (`docs/map.md`) and docs/a.md" in build.readme_for_an_index(
        "[the map](docs/map.md) and [docs/a.md](docs/a.md)", ""
    )


def test_the_address_of_the_source_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.ADDRESS, "https://example.org/us/qwenrt.git/")
    assert build.address_of_the_source() == "https://example.org/us/qwenrt"
    monkeypatch.setenv(build.ADDRESS, "git@example.org:us/qwenrt")
    with pytest.raises(SystemExit, match="must be an https://"):
        build.address_of_the_source()


def test_the_metadata_are_complete() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nlicense = "Apache-2.0"\nlicense-files = ["LICENSE"]\n' in text
    assert "\nkeywords = [" in text and "License ::" not in text  # the licence is an SPDX expression
    classifiers = re.findall(r'^    "([A-Z][^"]+ :: [^"]+)",$', text, flags=re.MULTILINE)
    assert len(classifiers) > 10 and classifiers == sorted(classifiers)
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', text)
    assert oldest is not None and f"Programming Language :: Python :: 3.{oldest[1]}" in classifiers
    assert tuple(set_up.OLDEST) == (3, int(oldest[1]))


# ---- without a compiler


def test_why_there_is_no_library_is_noted_for_whoever_loads_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qwenrt.backends.cpu import library

    assert build.NOT_BUILT == library.NOT_BUILT
    target = tmp_path / "cpu" / "_qwenrt_cpu.so"
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert not build.build_or_say_why(target)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no C++ compiler was found" in said
    with pytest.raises(library.KernelsUnavailable) as found:
        library.load(target)
    assert "were not built (no C++ compiler was found" in str(found.value)
    monkeypatch.setattr(build, "build_kernels", lambda *args, **kwargs: None)
    assert build.build_or_say_why(target) and not target.with_name(build.NOT_BUILT).exists()


def test_an_editable_installation_does_not_compile_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "_qwenrt_cpu.so"
    monkeypatch.setattr(build, "build_kernels", lambda *args, **kwargs: "compiled")
    target.write_bytes(b"")
    assert build.build_or_say_why(target, unless_current=True)
    os.utime(target, (1, 1))  # older than its sources
    assert not build.build_or_say_why(target, unless_current=True)


# ---- all of it


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3000)
def test_what_is_published_installs_from_nothing(tmp_path: Path) -> None:
    """sdist -> wheel -> an empty environment; the metadata; what a type checker sees of an editable installation."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    source = tmp_path / "source"
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "build", "mypy"], check=True)
    subprocess.run([str(python), "-m", "build", "-o", str(tmp_path / "dist"), str(source)], check=True)
    (archive,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    hidden = {name for name in listed if name.startswith(".")}
    assert set(listed) - hidden <= packed
    assert not [name for name in packed if name.endswith((".so", "_not_built.txt", ".pyc"))]
    with zipfile.ZipFile(wheel) as unpacked:
        names = unpacked.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = Parser().parsestr(unpacked.read(metadata).decode())
    assert told["License-Expression"] == "Apache-2.0" and told["Description-Content-Type"] == "text/markdown"
    assert "qwenrt/py.typed" in names and "qwenrt/backends/cpu/_qwenrt_cpu.so" in names
    assert all(name.startswith(("qwenrt/", "qwenrt-")) for name in names)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", "-e", str(source)], check=True)
    user = tmp_path / "user.py"
    user.write_text("import qwenrt\n\nreveal_type(qwenrt.__version__)\nreveal_type(qwenrt.LLM)\n")
    seen = subprocess.run(
        [str(python), "-m", "mypy", "--ignore-missing-imports", str(user)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert seen.returncode == 0 and '"Any"' not in seen.stdout and "qwenrt.llm.LLM" in seen.stdout, (
        seen.stdout
    )
