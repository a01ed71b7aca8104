"""Servers under load: streaming chats of many clients against anything that speaks OpenAI's dialect.

    python -m benchmarks.serving --url http://127.0.0.1:8000 --clients 16 [--probe] [--pid SERVER] [--json FILE]

Each client sends one request after the other, with a prompt of its own; `ignore_eos` makes all answers equally long.
With --probe another process asks for /health meanwhile, on a new connection every 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

_PROBE = """
import signal, socket, sys, time
running, took = True, []
def end(*_):
    global running
    running = False
signal.signal(signal.SIGTERM, end)
while running:
    began = time.perf_counter()
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as to:
        to.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
        while to.recv(65536):
            pass
    took.append(time.perf_counter() - began)
    time.sleep(0.02)
print(*took)
"""
_WORDS = ["river", "stone", "garden", "window", "paper", "silver", "morning", "engine", "letter", "mountain"]


@dataclass
class Answer:
    """When the pieces of one answer came, in seconds from its request; ``tokens``: of the answer, as its usage says."""

    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


@dataclass
class Load:
    """``words``: of a prompt; ``shared``: of these, how many are the same in all prompts; ``long_words``: of one more
    prompt, which comes when all clients have their first tokens."""

    url: str
    clients: int
    requests: int
    words: int
    shared: int
    new_tokens: int
    long_words: int = 0
    model: str = "m"
    grammar: bool = False


async def measure(load: Load) -> tuple[list[Answer], float]:
    """All answers, and the seconds that they took together."""
    began = time.perf_counter()
    late = [_intruder(load)] if load.long_words else []
    each = await asyncio.gather(*(_client(load, number) for number in range(load.clients)), *late)
    answers = [answer for answers in each[: load.clients] for answer in answers]
    return answers, time.perf_counter() - began


async def _intruder(load: Load) -> list[Answer]:
    """One long prompt among the others, with an answer of one token."""
    await asyncio.sleep(10)
    alone = replace(load, words=load.long_words, shared=0, new_tokens=1)
    return [await _ask(alone, _prompt(alone, random.Random(-1)))]


async def _client(load: Load, number: int) -> list[Answer]:
    source = random.Random(number)
    return [await _ask(load, _prompt(load, source)) for _ in range(load.requests)]


def _prompt(load: Load, source: random.Random) -> str:
    shared = [_WORDS[i % len(_WORDS)] for i in range(load.shared)]
    own = [source.choice(_WORDS) for _ in range(load.words - load.shared)]
    return " ".join([*shared, *own])


async def _ask(load: Load, prompt: str) -> Answer:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": load.new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.grammar:
        body["guided_regex"] = "[a-z0-9 ]{4000}"
    raw = json.dumps(body).encode()
    parts = urlsplit(load.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 24)
    began, answer = time.perf_counter(), Answer()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    try:
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            answer.error = status.strip() + " " + (await reader.read()).decode("utf-8", "replace")[-300:]
            return answer
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            choices = event.get("choices") or []
            if choices and (
                choices[0]["delta"].get("content") or choices[0]["delta"].get("reasoning_content")
            ):
                answer.pieces.append(time.perf_counter() - began)
    finally:
        writer.close()
    return answer


def summary(answers: list[Answer], seconds: float, cpu_s: float | None) -> dict[str, object]:
    """What people compare: tokens a second together, the wait for the first, the gaps between pieces."""
    good = [answer for answer in answers if answer.pieces and not answer.error]
    gaps = [b - a for answer in good for a, b in zip(answer.pieces, answer.pieces[1:])]
    firsts = [answer.pieces[0] for answer in good]
    tokens = sum(answer.tokens for answer in good)
    result: dict[str, object] = {
        "answers": len(good),
        "errors": [answer.error for answer in answers if answer.error][:3],
        "output_tokens": tokens,
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(tokens / seconds, 2),
        "first_token_s_p50": round(statistics.median(firsts), 4) if firsts else None,
        "first_token_s_max": round(max(firsts), 4) if firsts else None,
    }
    if gaps:
        ordered = sorted(gaps)
        result["gap_s_p50"] = round(statistics.median(ordered), 4)
        result["gap_s_p99"] = round(ordered[int(len(ordered) * 0.99)], 4)
    if cpu_s is not None:
        result["server_cpu_s"] = round(cpu_s, 3)
    return result


def probing(url: str) -> subprocess.Popen[str]:
    """A process that asks for /health until it is terminated, and then writes the seconds that each answer took."""
    parts = urlsplit(url)
    command = [sys.executable, "-c", _PROBE, str(parts.hostname), str(parts.port)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def probed(process: subprocess.Popen[str]) -> dict[str, object]:
    """What it found."""
    process.terminate()
    took = sorted(map(float, process.communicate()[0].split()))
    p99 = took[int(len(took) * 0.99)]
    return {
        "health": len(took),
        "health_s_p50": round(statistics.median(took), 5),
        "health_s_p99": round(p99, 5),
    }


def cpu_seconds(pid: int | None) -> float | None:
    """Processor time that a process has used, all its threads."""
    if pid is None:
        return None
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--shared", type=int, default=0, help="words that all prompts begin with")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--long-words", type=int, default=0, help="of one long prompt that comes between")
    parser.add_argument("--grammar", action="store_true", help="answers are held to a regular expression")
    parser.add_argument("--probe", action="store_true", help="ask for /health meanwhile")
    parser.add_argument("--pid", type=int, help="of the server, to count its processor time")
    parser.add_argument("--json", type=Path, help="also write the result to a file")
    args = parser.parse_args()
    load = Load(
        args.url,
        args.clients,
        args.requests,
        args.words,
        args.shared,
        args.new_tokens,
        args.long_words,
        grammar=args.grammar,
    )
    probe = probing(args.url) if args.probe else None
    before = cpu_seconds(args.pid)
    answers, seconds = asyncio.run(measure(load))
    after = cpu_seconds(args.pid)
    result = summary(answers, seconds, None if before is None or after is None else after - before)
    if probe is not None:
        result |= probed(probe)
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
