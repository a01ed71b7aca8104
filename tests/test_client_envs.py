"""The script that makes environments for clients: what it asks of pip and npm, and when. No network."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from qwenrt.cli.serve import agent_lines
from scripts import client_envs
from scripts.client_envs import AXE, CLIENTS, NPM, cache_directory, made_of, make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(client_envs.subprocess, "run", lambda command, check: commands.append(command))
    return commands


@pytest.mark.parametrize("name", CLIENTS)
def test_an_environment_is_made_once(name: str, asked: list[list[str]], tmp_path: Path) -> None:
    directory = make(name, tmp_path)
    assert made_of(name, tmp_path) == list(CLIENTS[name])
    assert asked[-1][-len(CLIENTS[name]) :] == list(CLIENTS[name])
    assert str(directory) in " ".join(asked[-1])
    assert ("--ignore-scripts" in asked[-1]) == (name in (AXE, NPM))
    count = len(asked)
    make(name, tmp_path)
    assert len(asked) == count
    (directory / "made-of.txt").write_text("another==1\n")
    make(name, tmp_path)
    assert len(asked) == 2 * count


def test_the_newest_of_each_line(asked: list[list[str]], tmp_path: Path) -> None:
    for name in ("openai-0", "openai-2", "litellm", NPM):
        make(name, tmp_path, newest=True)
    wanted = [line for name in ("openai-0", "openai-2", "litellm", NPM) for line in made_of(name, tmp_path)]
    assert wanted[:3] == ["openai>=0,<1", "openai>=2,<3", "litellm"]
    assert wanted[3:] == [f"{package.rpartition('@')[0]}@latest" for package in CLIENTS[NPM]]


def test_one_that_failed_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], check: bool) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(client_envs.subprocess, "run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        make("litellm", tmp_path)
    assert made_of("litellm", tmp_path) == []


def test_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(client_envs.CACHE, str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv(client_envs.CACHE)
    assert cache_directory() == Path.home() / ".cache" / "qwenrt-clients"


def test_the_lines_for_agents_name_a_key_only_where_there_is_one() -> None:
    """That the programs start with them is what tests/agents shows."""
    for line in agent_lines("http://127.0.0.1:8000", "a model", 8192).values():
        assert "http://127.0.0.1:8000" in line and "KEY=YOUR-KEY" not in line
    keyed = agent_lines("http://127.0.0.1:8000", "a model", 8192, has_keys=True)
    assert all("=YOUR-KEY" in line for line in keyed.values())
    assert "-m 'a model'" in keyed["Codex"] and "model_context_window=8192" in keyed["Codex"]
