"""Claude Code, Codex and Qwen Code, as npm brings them, make a file: one question, one call of a tool, one answer.

They are started with the very lines that `qwenrt serve` prints.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwenrt.cli.serve import AGENTS_SEND, agent_lines
from scripts.client_envs import NPM
from tests.agents.conftest import Beside, environment
from tests.agents.inside import CONTEXT
from tests.server.assistant import FILE, MADE

pytestmark = pytest.mark.agents

BLOCK = 16  # tokens of a block of the cache
QUESTION = f"make a file {FILE}"


@dataclass(frozen=True)
class Agent:
    """Its name in the greeting, what is added to the line to answer one question without a person, where it asks."""

    name: str
    arguments: str
    path: str


AGENTS = [
    Agent("Claude Code", "-p {question} --allowedTools Bash", "/v1/messages"),
    Agent(
        "Codex",
        "exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox {question}",
        "/v1/responses",
    ),
    Agent("Qwen Code", "-y -p {question}", "/v1/chat/completions"),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the three programs under the names that people type."""
    modules = environment(NPM) / "node_modules"
    directory = tmp_path_factory.mktemp("bin")
    launchers = {
        "claude": modules
        / "@anthropic-ai/claude-code/cli-wrapper.cjs",  # for who runs no installation scripts
        "codex": modules / "@openai/codex/bin/codex.js",
        "qwen": modules / "@qwen-code/qwen-code/cli.js",
    }
    for name, launcher in launchers.items():
        (directory / name).write_text(f'#!/bin/sh\nexec node {shlex.quote(str(launcher))} "$@"\n')
        (directory / name).chmod(0o755)
    return directory


@pytest.mark.parametrize("has_keys", [False, True], ids=["open", "with a key"])
@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_an_agent_makes_a_file(
    beside: Beside, programs: Path, agent: Agent, has_keys: bool, tmp_path: Path
) -> None:
    line = agent_lines("{address}", "scripted-qwen3", CONTEXT, has_keys)[agent.name]
    line += " " + agent.arguments.replace("{question}", shlex.quote(QUESTION))
    done = beside.run(["sh", "-c", f"PATH={programs}:$PATH; {line}"], tmp_path)
    assert done.code == 0, done.output
    assert (tmp_path / FILE).read_text() == "hello\n" and MADE in done.output
    assert not done.refused
    keys = {request["key"] for request in done.requests if request["path"] == agent.path}
    assert not has_keys or keys == {"Bearer YOUR-KEY"}
    assert agent.name != "Claude Code" or done.requests[0]["method"] == "HEAD"
    turns = [answer for answer in done.answers if answer["prompt"] > 10_000]
    first, second = turns
    assert second["prompt"] - second["cached"] <= second["prompt"] - first["prompt"] + BLOCK


@pytest.mark.timeout(
    1200
)  # it reads 50,000 tokens or more; minutes on two cores that have nothing else to do
def test_claude_code_has_an_answer_of_the_built_in_model(
    beside_demo: Beside, programs: Path, tmp_path: Path
) -> None:
    """A toy: what it says is of no use, but its context holds what Claude Code sends, and a turn ends."""
    line = agent_lines("{address}", "demo", 65536)["Claude Code"]
    line += f" -p {shlex.quote('Where does Anna live?')} --max-turns 2"
    done = beside_demo.run(["sh", "-c", f"PATH={programs}:$PATH; {line}"], tmp_path, seconds=900)
    assert done.code == 0, done.output
    # left, and found the cache when it came back
    gone = [request for request in done.refused if request["status"] == 499]
    assert done.output.strip() and done.refused == gone
    # on a slow machine it leaves after some minutes, asks again, and what was computed is cached
    answers = [answer for answer in done.answers if answer["outcome"] not in ("abort", "cancelled")]
    whole = [answer for answer in answers if answer["prompt"] > AGENTS_SEND // 4]
    assert whole and all(answer["answer"] > 0 for answer in whole)
