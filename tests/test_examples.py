"""Every example runs as a user would run it, on the built-in model, and says what it should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "quickstart.py": ["Paris"],
    "base_completion.py": ["乌兰巴托", "tokens]"],
    "batch.py": ["Tokyo", "7", "巴黎"],
    "system_prompt.py": ["Rome"],
    "tool_use.py": ["calls get_weather", "Paris", "21"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(EXAMPLES / name)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout, f"{words!r} is not in:\n{done.stdout}"
