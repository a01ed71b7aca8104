"""The house rules that a machine can check beside ruff, mypy and import-linter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "qwenrt"
MODULES = sorted(PACKAGE.rglob("*.py"))


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "torch numpy jinja2 tiktoken huggingface_hub safetensors transformers fastapi rich prompt_toolkit"
    loaded = in_fresh_python(f"import sys, qwenrt; print([m for m in '{heavy}'.split() if m in sys.modules])")
    assert loaded == "[]"


def test_importing_the_package_imports_little() -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\nimport qwenrt\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names))"
    )
    # what it is made of is imported when it is asked for
    assert in_fresh_python(code).strip() == "['qwenrt']"


def test_text_and_config_import_no_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted([*(PACKAGE / "text").rglob("*.py"), *(PACKAGE / "config").rglob("*.py")])
        if path.stem != "__init__"
    ]
    code = f"import sys\nfor n in {names}: __import__(n)\nprint('torch' in sys.modules)"
    assert in_fresh_python(code) == "False"


def test_every_public_name_resolves() -> None:
    assert in_fresh_python("import qwenrt\nfor n in qwenrt.__all__: getattr(qwenrt, n)\nprint('ok')") == "ok"
    called = (
        "import qwenrt\nprint(*(callable(getattr(qwenrt, n)) for n in ('finetune', 'merge', 'quantize')))"
    )
    assert in_fresh_python(called) == "True True True"
    within = "from qwenrt.finetune import finetune\nimport inspect, qwenrt\nprint(inspect.signature(qwenrt.finetune)"
    assert in_fresh_python(f"{within} == inspect.signature(finetune))") == "True"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_stay_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    assert source.count("\n") <= 600, "a room grew past 600 lines: look for a natural wall"
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 75, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_config_reads_the_environment(path: Path) -> None:
    if path != ROOT / "qwenrt" / "config" / "environment.py":
        assert not re.search(r"os\.environ|getenv\(", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_files(path: Path) -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden, f"{node.func.id} at line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not any(n.split(".")[0] in {"pickle", "marshal", "shelve", "dill"} for n in names)


def module(name: str) -> Path | None:
    """The file of one of the package's modules."""
    base = ROOT.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p in MODULES), None)


def imported(path: Path) -> set[Path]:
    """The package's files that one imports, at its head, for its types, or inside a function."""
    found: set[Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.level == 0, f"{path} imports relatively"
            found |= {module(f"{node.module}.{alias.name}") or module(node.module) for alias in node.names}
    return {p for p in found if p is not None}


def test_no_circle_of_modules_is_left() -> None:
    left, size = {path: imported(path) for path in MODULES}, -1
    while len(left) != size:  # drop what imports nothing of the rest, or is imported by nothing of it
        size, wanted = len(left), set[Path]().union(*left.values())
        left = {p: found & left.keys() for p, found in left.items() if p in wanted and found & left.keys()}
    assert not left, {str(p.relative_to(ROOT)): sorted(q.stem for q in found) for p, found in left.items()}


def test_files_that_the_decisions_name_are_there() -> None:
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+\.(?:py|cpp|h))`", text):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), f"docs/decisions.md names {name}"


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in sorted(p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()):
        assert f"{room}/" in text, f"docs/architecture.md does not mention {room}/"
