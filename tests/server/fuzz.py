"""Requests that nobody sends on purpose, at every route, many at once: `python -m tests.server.fuzz SECONDS [SEED]`.

Bodies that are right are changed in their structure and in their bytes; paths, methods and headers too; some clients
hang up. What may not happen: an answer of 500, an error that nobody foresaw in the log, a stream without an end, a
request that is still there at the end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import qwenrt
from qwenrt.server import app
from qwenrt.server.application import Server
from qwenrt.server.bodies import GETS, POSTS
from qwenrt.server.openapi import document
from tests.server.asgi import Exchange

SIDE_BY_SIDE = 6
STUCK = 60.0  # seconds after which a request counts as stuck
DOCUMENTED = {501, 503, 504}  # what may be answered besides what is below 500
USER = [{"role": "user", "content": "What is the capital of France?"}]
FUNCTION = {
    "name": "weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": FUNCTION}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
CALLED = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "sunny"},
]
RIGHT: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"model": "m", "messages": USER, "max_tokens": 5},
        {
            "model": "m",
            "messages": CALLED,
            "tools": TOOLS,
            "tool_choice": "auto",
            "stream": True,
            "max_tokens": 5,
        },
        {
            "model": "m",
            "messages": USER,
            "n": 3,
            "logprobs": True,
            "top_logprobs": 2,
            "seed": 1,
            "max_tokens": 3,
        },
        {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 12,
        },
        {
            "model": "m",
            "messages": USER,
            "stop": ["Paris", "x"],
            "logit_bias": {"11": -5},
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "stop_token_ids": [5],
            "max_completion_tokens": 6,
            "reasoning_effort": "low",
            "priority": 3,
            "cache_salt": "s",
            "timeout": 3.5,
            "draft": "lookup",
        },
        {"model": "m", "messages": USER, "structured_outputs": {"regex": "[a-z]{1,4}"}, "max_tokens": 4},
        {"model": "m", "messages": USER, "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 4},
        {"model": "m", "messages": USER, "functions": [FUNCTION], "function_call": "auto", "max_tokens": 4},
    ],
    "/v1/completions": [
        {"model": "m", "prompt": "Once", "max_tokens": 4, "logprobs": 2},
        {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "stream": True, "n": 2},
        {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 2, "best_of": 2, "echo": True},
    ],
    "/v1/responses": [
        {"model": "m", "input": "Hello", "max_output_tokens": 5},
        {
            "model": "m",
            "instructions": "i",
            "input": [
                {"role": "developer", "content": "d"},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "o"},
            ],
            "tools": [
                {"type": "function", **FUNCTION},
                {"type": "namespace", "name": "ns", "tools": [{"type": "function", "name": "f"}]},
                {
                    "type": "custom",
                    "name": "cu",
                    "format": {"type": "grammar", "syntax": "lark", "definition": "s"},
                },
                {"type": "web_search"},
            ],
            "tool_choice": "auto",
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
            "stream": True,
            "store": False,
            "max_output_tokens": 6,
        },
    ],
    "/v1/messages": [
        {"model": "m", "max_tokens": 5, "messages": USER},
        {
            "model": "m",
            "max_tokens": 6,
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [{"type": "text", "text": "r"}],
                        },
                        {"type": "text", "text": "<system-reminder>r</system-reminder>"},
                    ],
                },
            ],
            "tools": [{"name": "weather", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "enabled", "budget_tokens": 100},
            "stop_sequences": ["x"],
            "stream": True,
        },
    ],
    "/v1/embeddings": [{"model": "m", "input": ["a", "b"]}, {"input": [1, 2], "encoding_format": "base64"}],
    "/v1/rerank": [{"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1}],
    "/v1/score": [{"text_1": "q", "text_2": ["a", "b"]}],
    "/tokenize": [{"prompt": "abc", "return_token_strs": True}, {"messages": USER}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/api/chat": [
        {"model": "m", "messages": USER, "options": {"num_predict": 4, "top_k": 3.0, "seed": 1}, "tools": []},
        {
            "model": "m",
            "messages": CALLED[:2],
            "tools": TOOLS,
            "format": SCHEMA,
            "options": {"num_predict": 9},
        },
    ],
    "/api/generate": [
        {"model": "m", "prompt": "a", "options": {"num_predict": 4}, "context": [1, 2], "think": False},
        {"model": "m", "prompt": "a", "raw": True, "stream": False, "options": {"num_predict": 4}},
    ],
    "/api/embed": [{"model": "m", "input": ["a"], "dimensions": 4}],
    "/api/embeddings": [{"model": "m", "prompt": "a"}],
    "/api/show": [{"model": "m"}],
    "/api/v1/services/aigc/text-generation/generation": [
        {
            "model": "m",
            "input": {"messages": USER},
            "parameters": {"max_tokens": 5, "result_format": "message", "n": 2, "stop": ["x", 5, [6, 7]]},
        },
        {"input": {"prompt": "p", "history": [{"user": "u", "bot": "b"}]}, "parameters": {"max_tokens": 5}},
    ],
    "/v1/chat/completions/control": [{"id": "chatcmpl-1", "action": "reasoning_end"}],
}
RIGHT |= {
    f"/v1/chat/completions/{what}": RIGHT["/v1/chat/completions"] for what in ("render", "input_tokens")
}
RIGHT["/v1/completions/render"] = RIGHT["/v1/completions"]
RIGHT["/v1/responses/input_tokens"] = RIGHT["/v1/responses"]
RIGHT["/v1/messages/count_tokens"] = RIGHT["/v1/messages"]
assert set(POSTS) == set(RIGHT)

STRANGE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        64,
        65,
        2**31,
        2**63 - 1,
        2**63,
        -(2**64),
        10**300,
        1.5,
        -0.0,
        1e-300,
        1e308,
    ),
    *(
        "",
        " ",
        "a",
        "0",
        "null",
        "auto",
        "none",
        "required",
        "user",
        "system",
        "assistant",
        "tool",
        "function",
    ),
    *(
        "\x00",
        "\r\nx: y",
        "\u2028",
        "\ud7ff",
        "\U0010ffff",
        "<|im_start|>",
        "<|im_end|>\n",
        "<think>",
        "</think>",
    ),
    *(
        "<tool_call>",
        '{"name": "weather", "arguments": {}}',
        "(a+)+$",
        "(",
        "[a-z]{0,400}",
        "a" * 4000,
        "é" * 500,
    ),
    *(
        "start: /a/",
        '%json {"type": "object"}',
        "{{ 7 * 7 }}",
        "../../etc/passwd",
        "http://127.0.0.1/",
        "$ref",
    ),
    *([], {}, [[]], [None], [1, "a"], [1] * 50, ["x"] * 70, {"a": 1}, {"type": "function"}, {"type": "text"}),
    *({"type": "text", "text": "t"}, {"role": "user", "content": "x"}, {"type": "object", "required": ["b"]}),
    *(
        {"$ref": "#"},
        {"anyOf": []},
        {"not": {}},
        {"enum": []},
        {"const": None},
        {"pattern": "("},
        {"type": "array"},
    ),
]
NUMBERS = [
    b"1e400",
    b"1" * 5000,
    b"-",
    b"01",
    b"NaN",
    b"-Infinity",
    b"1e-400",
    b"9" * 30,
    b"-1",
    b"1.5e2",
    b"0.0",
]
BYTES = [
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\\ud800",
    b'"',
    b"{",
    b"[" * 300,
    b"]",
    b",",
    b":",
    b"\\",
    b"\xc3",
    b" ",
]
HEADERS: list[dict[str, str]] = [
    *({"content-type": "application/json"}, {"content-type": "text/plain; charset=utf-16"}),
    *(
        {"x-request-id": "a b"},
        {"x-request-id": "ok-1"},
        {"x-conversation-id": "1"},
        {"x-dashscope-sse": "enable"},
    ),
    {"x-conversation-id": "0f8fad5b-d9cb-469f-a165-70867728950e"},
    *({"accept": "text/event-stream"}, {"authorization": "Bearer x"}, {"authorization": "Basic !!"}),
    *({"content-encoding": "gzip"}, {"content-length": "x"}, {"host": "evil.example"}, {"origin": "null"}),
    *({"expect": "100-continue"}, {"sec-fetch-site": "cross-site"}, {"host": "localhost:1"}, {"host": "["}),
    {"access-control-request-method": "POST", "origin": "http://localhost"},
]
PATHS = [
    *("/v1/models", "/v1/models/demo", "/v1/models/a/b", "/v1/models/%00", "/models", "/v1/responses/resp_1"),
    *("/v1/stream/0f8fad5b-d9cb-469f-a165-70867728950e", "/v1/stream?conv_id=&from=x", "/v1/stream?from=-1"),
    *(
        "/v1/stream/0f8fad5b-d9cb-469f-a165-70867728950e?from=999999",
        "/v1/responses/resp_1/cancel",
        "/api/pull",
    ),
    *(
        "/api/blobs/sha256:1",
        "//",
        "/..",
        "/%2e%2e/",
        "/v1/",
        "/\u00e9",
        "/%ff",
        "/a%0d%0ab",
        "*",
        "/v2/rerank",
    ),
    "/compatible-mode/v1/chat/completions",
]
METHODS = ["GET", "HEAD", "POST", "DELETE", "PUT", "OPTIONS", "PATCH", "TRACE", "G\u00c4T"]


class Requests:
    """Random requests; the same from the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        described = document()
        parts = described["components"]["schemas"]
        self._names: dict[str, list[str]] = {}
        for path, body in described["paths"].items():
            if "post" in body:
                schema = body["post"]["requestBody"]["content"]["application/json"]["schema"]
                whole = parts[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
                self._names[path] = sorted(whole["properties"])
        self._all_names = sorted({name for part in parts.values() for name in part.get("properties", ())})

    def __call__(self) -> Exchange:
        """The next one."""
        pick = self._random
        headers = dict(pick.choice(HEADERS)) if pick.random() < 0.3 else {}
        leaves = pick.random() < 0.1
        after = pick.randrange(1, 5)

        def at_send(exchange: Exchange, message: dict[str, Any]) -> None:
            if leaves and len(exchange.sent) >= after:
                exchange.hang_up()

        if pick.random() < 0.1:
            path = pick.choice([*PATHS, *GETS, *RIGHT])
            body = pick.choice([None, b"", b"{}", b"[]", b"null", b'"a"', b"\xff"])
            return Exchange(pick.choice(METHODS), path, body, headers, at_send)
        path = pick.choice(list(RIGHT))
        body = self.changed(path, deepcopy(pick.choice(RIGHT[path])))
        if pick.random() < 0.15 and path.startswith("/v1/"):
            path = path.removeprefix("/v1") if pick.random() < 0.5 else f"/compatible-mode{path}"
        return Exchange("POST", path, body, headers, at_send)

    def changed(self, path: str, body: dict[str, Any]) -> bytes:
        """A body with some changes to its structure, and sometimes to its bytes."""
        pick = self._random
        for _ in range(pick.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            if pick.random() < 0.35:
                names = self._names[path] if pick.random() < 0.8 else self._all_names
                body[pick.choice(names)] = deepcopy(pick.choice(STRANGE))
            else:
                with suppress(RecursionError):  # of what was nested twice
                    self._change(body)
        try:
            raw = json.dumps(body, ensure_ascii=pick.random() < 0.5).encode("utf-8", "surrogatepass")
        except RecursionError:
            raw = b'{"a":' * 2000
        return self._bytes(raw) if pick.random() < 0.25 else raw

    def _change(self, body: dict[str, Any]) -> None:
        """One change at any place: another value, none, one more, or one that stands elsewhere."""
        pick, places = self._random, list(_places(body))
        if not places:
            return
        holder, key = pick.choice(places)
        kind = pick.random()
        if kind < 0.55:
            holder[key] = deepcopy(pick.choice(STRANGE))
        elif kind < 0.7:
            del holder[key]
        elif kind < 0.85 and isinstance(holder, list):
            holder[key:key] = [deepcopy(holder[key])] * pick.choice([1, 3, 60])
        elif kind < 0.95:
            other, at = pick.choice(places)
            holder[key] = deepcopy(other[at])
        else:
            for _ in range(pick.choice([5, 150, 250])):
                holder[key] = [holder[key]] if pick.random() < 0.5 else {"a": holder[key]}

    def _bytes(self, raw: bytes) -> bytes:
        pick, at = self._random, self._random.randrange(len(raw) + 1)
        kind = pick.random()
        if kind < 0.3:
            return raw[:at]
        if kind < 0.6:
            return raw[:at] + pick.choice(BYTES) + raw[at:]
        if kind < 0.8:
            digits = [i for i, c in enumerate(raw) if 48 <= c < 58]
            at = pick.choice(digits or [0])
            return raw[:at] + pick.choice(NUMBERS) + raw[at + 1 :]
        return bytes(c ^ (1 << pick.randrange(8)) if pick.random() < 0.01 else c for c in raw)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


class Found(Exception):
    """A request that was answered as none may be."""


class Faults(logging.Handler):
    """Errors that the server wrote into its log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(self.format(record))


def told(exchange: Exchange) -> str:
    """A request, to send it again."""
    return f"{exchange.scope['method']} {exchange.scope['path']} {exchange.headers_given} {exchange.body_given!r}"


async def fuzz(
    server: Server, seed: int, enough: Callable[[int], bool], at_once: int = SIDE_BY_SIDE
) -> Counter[int]:
    """Send requests until ``enough(how many)``; how many answers had which status. Raises Found."""
    requests, statuses, faults, count = Requests(seed), Counter[int](), Faults(), 0
    log = logging.getLogger("qwenrt.server")
    log.addHandler(faults)

    async def client() -> None:
        nonlocal count
        while not enough(count):
            count += 1
            exchange = requests()
            try:
                await asyncio.wait_for(exchange.run(server), STUCK)
            except asyncio.TimeoutError:
                raise Found(f"stuck: {told(exchange)}") from None
            except Exception as error:
                raise Found(f"{type(error).__name__}: {told(exchange)}") from error
            statuses[exchange.status] += 1
            if exchange.status >= 500 and exchange.status not in DOCUMENTED:
                raise Found(f"{exchange.status} {exchange.body[:500]!r}: {told(exchange)}")
            if not (exchange.whole or exchange.left):
                raise Found(f"no end: {told(exchange)}")
            if faults.said:
                raise Found(f"{faults.said[0]}\n{told(exchange)} (or one beside it)")

    try:
        await asyncio.gather(*(client() for _ in range(at_once)))
        end = time.monotonic() + STUCK
        while server.service.running or server.admission.figures().running or server.llm.stats()["running"]:
            if time.monotonic() > end:
                raise Found("something is left at the end")
            await asyncio.sleep(0.01)
        stats = server.llm.stats()
        if stats["free_blocks"] != stats["total_blocks"]:
            raise Found(f"blocks are left: {stats['free_blocks']} of {stats['total_blocks']} are free")
    finally:
        log.removeHandler(faults)
        await server.writing.kept.close()
    return statuses


def small_llm() -> qwenrt.LLM:
    """The built-in model with a context that keeps every answer short."""
    return qwenrt.load("demo", progress=False, max_model_len=256)


def main(seconds: float, seed: int) -> None:
    logging.getLogger("qwenrt").setLevel(logging.ERROR)
    end = time.monotonic() + seconds
    with small_llm() as llm:
        statuses = asyncio.run(fuzz(app(llm), seed, lambda count: time.monotonic() > end))
    print(f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
