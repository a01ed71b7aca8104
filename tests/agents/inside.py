"""A model behind the real server, and programs beside it, in whatever network this is run in.

    python -m tests.agents.inside qwen3|qwen1|demo       scripted, in one of two chat formats; or the built-in model

Reads one program a line of standard input, {"command": [...], "env": {...}, "cwd": "...", "seconds": 60}, runs it with
{address} in its command and its environment replaced, and writes a line: {"code", "output", "requests", "answers"}.
The first line that it writes is {"address": ...}. It ends with its input.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import qwenrt
from qwenrt.llm import LLM
from qwenrt.outputs import Usage
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.assistant import assistant, react
from tests.server.scripted import scripted_llm
from tests.server.wire import serving

CONTEXT = 131072  # tokens: an agent's first prompt has 40,000 of a vocabulary whose tokens are two characters


class Recorded:
    """The server, with what it was asked and what it answered."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self.requests: list[dict[str, Any]] = []
        self.answers: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        ended = server.metrics.end

        def end(
            dialect: str, outcome: str, seconds: float, usage: Usage | None = None, errors: int = 0
        ) -> None:
            ended(dialect, outcome, seconds, usage, errors)
            told = {"dialect": dialect, "outcome": outcome}
            if usage is not None:
                told |= {"prompt": usage.prompt_tokens, "cached": usage.cached_tokens}
                told |= {"answer": usage.completion_tokens}
            self.answers.append(told)

        server.metrics.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._server(scope, receive, send)
            return
        request = {"method": scope["method"], "path": scope["path"], "status": 0}
        request["key"] = next(
            (v.decode() for n, v in scope["headers"] if n in (b"authorization", b"x-api-key")), ""
        )
        self.requests.append(request)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                request["status"] = message["status"]
                headers = {name.decode(): value.decode() for name, value in message["headers"]}
                request["ignored"] = headers.get("x-qwenrt-ignored", "")
            elif request["status"] >= 400:
                request["said"] = message["body"].decode()[:500]
            await send(message)

        await self._server(scope, receive, sent)

    def take(self) -> dict[str, Any]:
        """What came since the last call."""
        told = {"requests": list(self.requests), "answers": list(self.answers)}
        self.requests.clear()
        self.answers.clear()
        return told


def run(program: dict[str, Any], address: str) -> dict[str, Any]:
    """Run a program to its end, or as long as it may."""
    command = [word.replace("{address}", address) for word in program["command"]]
    env = {name: value.replace("{address}", address) for name, value in program["env"].items()}
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd=program["cwd"],
            timeout=program["seconds"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, output = -1, late.stdout or b""
    seconds = round(time.monotonic() - began, 1)
    return {"code": code, "output": output.decode("utf-8", "replace")[-20000:], "seconds": seconds}


def model(chat: str) -> AbstractContextManager[LLM]:
    """As `qwenrt serve` loads it, where it is the built-in one."""
    if chat == "demo":
        return qwenrt.load("demo", progress=False)
    return scripted_llm(react if chat == "qwen1" else assistant, CONTEXT, chat, max_num_batched_tokens=8192)


def main() -> None:
    settings, chat = ServeSettings(port=0, drain=0), sys.argv[1]
    with model(chat) as llm:
        server = app(llm, settings)
        recorded = Recorded(server)
        with serving(recorded, settings, hooks=server.hooks(lambda: None)) as running:
            print(json.dumps({"address": running.url}), flush=True)
            for line in sys.stdin:
                done = run(json.loads(line), running.url)
                print(json.dumps(done | recorded.take()), flush=True)


if __name__ == "__main__":
    main()
