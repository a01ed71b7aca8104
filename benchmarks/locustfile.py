"""An independent client for `qwenrt bench serve`'s figures: locust, with the time to the first token and the gaps.

    pip install locust
    qwenrt serve demo &
    locust -f benchmarks/locustfile.py --headless -H http://127.0.0.1:8000 -u 4 -r 4 --iterations 24

Each user is a client in a closed loop that asks one question after the other, all different: what
`qwenrt bench serve http://127.0.0.1:8000 --workload random --prompt-words 64 --concurrency 4 --num-prompts 24` asks.
Beside locust's own row for the requests, which ends at a response's head, its table has "TTFT", "gap" and
"whole answer", in ms; the last line counts tokens. Each user asks for the list of models first: a session's first
request takes locust some 0.3 s, which would be in the first TTFT. It shares no code with qwenrt. WORDS, NEW_TOKENS,
MODEL and OPENAI_API_KEY are read from the environment.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import gevent
import locust

NOUNS = (
    "river",
    "stone",
    "garden",
    "window",
    "paper",
    "silver",
    "morning",
    "engine",
    "letter",
    "mountain",
    "table",
)
PROMPT_WORDS = int(os.environ.get("WORDS", "64"))
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "64"))
ROUTE = "/v1/chat/completions"


class Total:
    """What all users asked and got together."""

    asked = 0
    answered = 0
    tokens = 0
    events = 0
    began = 0.0  # the first of them
    ended = 0.0


@locust.events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--iterations", type=int, default=0, help="requests in all, then it ends (0: no end)")


@locust.events.test_stop.add_listener
def tell(environment: Any, **_: Any) -> None:
    seconds = max(Total.ended - Total.began, 1e-9)
    print(
        f"{Total.answered} answers, {Total.tokens} tokens in {Total.events} events and {seconds:.2f} s: "
        f"{Total.tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


class Client(locust.HttpUser):
    """Sends its next question when the answer to its last is complete."""

    def on_start(self) -> None:
        self.client.get("/v1/models", headers=_key())

    @locust.task
    def ask(self) -> None:
        most = self.environment.parsed_options.iterations
        if most and Total.asked == most:
            raise locust.exception.StopUser
        Total.asked += 1
        Total.began = Total.began or time.perf_counter()
        self._read(_body())
        Total.answered += 1
        Total.ended = time.perf_counter()
        if most and Total.answered == most:
            gevent.spawn(self.environment.runner.quit)  # which ends this user too

    def _read(self, body: dict[str, Any]) -> None:
        last = began = time.perf_counter()
        first = True
        with self.client.post(ROUTE, json=body, headers=_key(), stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {response.text[:200]}")
                return
            for line in response.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                now, event = time.perf_counter(), json.loads(line[6:])
                if event.get("usage"):
                    Total.tokens += event["usage"]["completion_tokens"]
                delta = event["choices"][0].get("delta", {}) if event.get("choices") else {}
                if delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"):
                    self._note("TTFT" if first else "gap", now - last)
                    first, last = False, now
                    Total.events += 1
            self._note("whole answer", time.perf_counter() - began)
            if first:
                response.failure("no text")

    def _note(self, name: str, seconds: float) -> None:
        """A row of locust's table."""
        self.environment.events.request.fire(
            request_type="stream",
            name=name,
            response_time=1000 * seconds,
            response_length=0,
            exception=None,
            context={},
        )


def _key() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _body() -> dict[str, Any]:
    words = " ".join(random.choices(NOUNS, k=PROMPT_WORDS))
    return {
        "model": os.environ.get("MODEL", "m"),
        "messages": [{"role": "user", "content": f"{random.getrandbits(32):08x} {words}"}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
