"""How tests ask a whole server, and hold its engine between two steps."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import qwenrt
from qwenrt.server import app
from qwenrt.server.settings import ServeSettings
from tests.server.wire import PATIENCE, Serving, Wire, request, serving, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
OLLAMA = "/api/chat"
GENERATE = "/api/generate"
DASHSCOPE = "/api/v1/services/aigc/text-generation/generation"


def sent(path: str, body: Any = None, method: str = "", **headers: str) -> bytes:
    """A request in bytes. body: bytes as they are, else as JSON; "_" in a header's name is "-"."""
    raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return request(method or ("GET" if raw is None else "POST"), path, named, raw)


def read(wire: Wire) -> tuple[int, dict[str, str], Any]:
    """(status, headers, body) of one response; a body that is JSON is decoded."""
    status, told, came = wire.response()
    is_json = told.get("content-type", "").startswith("application/json")
    return status, told, json.loads(came) if is_json else came


def ask(
    served: Serving, path: str, body: Any = None, method: str = "", **headers: str
) -> tuple[int, dict[str, str], Any]:
    """(status, headers, body) of one request."""
    with served.wire(sent(path, body, method, **headers)) as wire:
        return read(wire)


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat, as OpenAI, Anthropic and Ollama have it."""
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def dashscope(text: str = "Hello", **parameters: Any) -> dict[str, Any]:
    """The body of a chat in DashScope's dialect."""
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "input": {"messages": messages}, "parameters": parameters}


# A stream of each dialect: its path, its body, its headers.
STREAMS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "chat": (CHAT, chat(stream=True), {}),
    "completions": (COMPLETIONS, {"model": "m", "prompt": "Hello", "stream": True}, {}),
    "responses": (RESPONSES, {"model": "m", "input": "Hello", "stream": True}, {}),
    "messages": (MESSAGES, chat(stream=True, max_tokens=1000), {}),
    "ollama": (OLLAMA, chat(), {}),
    "generate": (GENERATE, {"model": "m", "prompt": "Hello"}, {}),
    "dashscope": (DASHSCOPE, dashscope(), {"x_dashscope_sse": "enable"}),
}


def events(stream: bytes) -> list[Any]:
    """The data of each server-sent event; comments and [DONE] left out."""
    found = []
    for block in stream.decode().split("\n\n"):
        lines = [line[5:].strip() for line in block.split("\n") if line.startswith("data:")]
        if lines and lines != ["[DONE]"]:
            found.append(json.loads("\n".join(lines)))
    return found


def lines(stream: bytes) -> list[Any]:
    """The objects of NDJSON."""
    return [json.loads(line) for line in stream.splitlines() if line.strip()]


def joined(chunks: list[Any], field: str = "content", index: int = 0) -> str:
    """A field of the deltas of OpenAI's chunks."""
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ()) if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


@contextmanager
def serve(llm: qwenrt.LLM, **settings: Any) -> Iterator[Serving]:
    """The whole server around a model."""
    chosen = ServeSettings(**{"port": 0, "drain": 0, **settings})
    application = app(llm, chosen)
    with serving(application, chosen, hooks=application.hooks(lambda: None)) as running:
        running.application = application  # type: ignore[attr-defined]
        yield running


class Gate:
    """Before each step of a scripted model: open, or closed, so that what is computed stands still; or a fault.

    ``before`` is called with the number of each step, in the engine's thread, when the gate is open.
    """

    def __init__(self, llm: qwenrt.LLM) -> None:
        assert llm._assembled is not None
        self.engine = llm._assembled.engine._engine
        assert self.engine is not None
        [stack] = self.engine.runner.stacks
        self._run, self._open, self._steps = stack.run, threading.Event(), 0
        self.waiting = threading.Event()
        self.before: Callable[[int], object] = lambda step: None
        self._open.set()
        stack.run = self._step  # type: ignore[method-assign]

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if not self._open.is_set():
            self.waiting.set()
            assert self._open.wait(PATIENCE)
            self.waiting.clear()
        self.before(self._steps)
        return self._run(*args, **kwargs)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within the block no step is computed: the first that begins waits."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def blocks(self) -> tuple[int, int]:
        """Blocks of the cache that are free, and all of them."""
        return self.engine.blocks.num_free, self.engine.blocks.num_blocks

    def idle(self) -> None:
        """Wait until nothing is left of any request in the engine."""
        until(
            lambda: not self.engine.has_work and self.engine.blocks.num_free == self.engine.blocks.num_blocks
        )
