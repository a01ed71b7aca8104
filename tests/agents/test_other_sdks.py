"""Clients that cannot live beside each other: openai 0.28 and 2, langchain-openai, litellm on all four dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.conftest import ROOT, Beside, Done, environment

pytestmark = pytest.mark.agents

OPENAI_0 = ("chat", "stream", "functions", "functions_stream", "observation", "errors", "models_and_vectors")
OPENAI_2 = (
    *("chat", "tools", "structure", "responses", "vectors_and_models", "errors"),
    "whole_and_async",
)
LANGCHAIN = ("chat", "tools", "structure", "responses", "vectors")
EVERY = ("chat", "stream", "whole_and_async")
# What each of its routes can do with this server.
LITELLM = {
    "openai": (*EVERY, "tools", "tools_stream", "structure", "vectors", "errors"),
    "hosted_vllm": (*EVERY, "tools", "tools_stream", "structure", "vectors", "errors"),
    "responses": (*EVERY, "tools"),
    "anthropic": (*EVERY, "tools", "tools_stream", "structure", "errors"),
    "ollama_chat": (*EVERY, "tools", "tools_stream", "structure"),
    "ollama": (*EVERY, "vectors"),
    "dashscope": (*EVERY, "tools", "tools_stream"),
}


def run(beside: Beside, name: str, program: str, tmp_path: Path, *what: str) -> Done:
    """Run functions of a program with the Python of an environment."""
    python = environment(name) / "bin" / "python"
    command = [python, ROOT / "tests/agents/programs" / program, "{address}", *what]
    done = beside.run(command, tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert done.code == 0, (done.output, done.refused)
    return done


@pytest.mark.parametrize("what", OPENAI_0)
def test_openai_028_with_qwen1(beside_qwen1: Beside, what: str, tmp_path: Path) -> None:
    run(beside_qwen1, "openai-0", "openai_0.py", tmp_path, what)


@pytest.mark.parametrize("what", ["stream", "functions_stream", "errors", "models_and_vectors"])
def test_openai_028_with_a_later_model(beside: Beside, what: str, tmp_path: Path) -> None:
    run(beside, "openai-0", "openai_0.py", tmp_path, what)


@pytest.mark.parametrize("what", OPENAI_2)
def test_openai_2(beside: Beside, what: str, tmp_path: Path) -> None:
    run(beside, "openai-2", "openai_2.py", tmp_path, what)


@pytest.mark.parametrize("what", LANGCHAIN)
def test_langchain(beside: Beside, what: str, tmp_path: Path) -> None:
    run(beside, "langchain", "langchain_chat.py", tmp_path, what)


@pytest.mark.parametrize("route", LITELLM)
def test_litellm(beside: Beside, route: str, tmp_path: Path) -> None:
    run(beside, "litellm", "litellm_all.py", tmp_path, route, *LITELLM[route])
