"""The options of `pytest --pyargs qwenrt.conformance -p qwenrt.conformance.pytest_plugin`.

pytest reads options before it imports what `--pyargs` names, so that they stand in a module of their own.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qwenrt")
    group.addoption(
        "--device", default="cpu", help="whose backend is compared: cpu, cuda:1, npu, a plugin's name"
    )
    group.addoption("--full", action="store_true", help="every combination instead of every pair")
