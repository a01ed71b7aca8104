"""The loads whose figures docs/serving.md has: streaming chats of many clients, sent by the client of `bench serve`.

    python -m benchmarks.serving --url http://127.0.0.1:8000 --clients 16 [--probe] [--pid SERVER] [--json FILE]

What `bench serve` cannot ask is here: prompts that share words within the question, answers held to a grammar, a long
prompt among the others. `ignore_eos` makes all answers equally long.
With --probe another process asks for /health meanwhile, on a new connection every 20 ms; a server without one has no
figures of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwenrt.load_test.client import OpenAIServer
from qwenrt.load_test.connections import Address
from qwenrt.load_test.figures import figures
from qwenrt.load_test.pacing import ClosedLoop
from qwenrt.load_test.running import LoadRun
from qwenrt.load_test.server_process import cpu_seconds
from qwenrt.load_test.workloads import WORDS, Conversation, Turn

INTRUDER_S = 10.0  # when the long prompt comes: all clients have their first tokens
_PROBE = """
import signal, socket, sys, time
running, took = True, []
def end(*_):
    global running
    running = False
signal.signal(signal.SIGTERM, end)
while running:
    began, came = time.perf_counter(), b""
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as to:
            to.sendall(b"GET /health HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n")
            while more := to.recv(65536):
                came += more
    except OSError:
        pass
    if came[9:12] == b"200":
        took.append(time.perf_counter() - began)
    time.sleep(0.02)
print(*took)
"""


def conversation(source: random.Random, words: int, shared: int, new_tokens: int) -> Conversation:
    """One question of ``words`` words, of which the first ``shared`` are the same in all."""
    same = [WORDS[i % len(WORDS)] for i in range(shared)]
    own = [source.choice(WORDS) for _ in range(words - shared)]
    return Conversation([Turn("user", " ".join([*same, *own]), new_tokens)])


async def measure(args: argparse.Namespace) -> LoadRun:
    """The run of all clients, each of which sends ``args.requests`` questions; the long prompt is not part of it."""
    extra: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
    if args.grammar:
        extra["guided_regex"] = "[a-z0-9 ]{4000}"
    server = OpenAIServer(Address.of(args.url), model="m", extra=extra, timeout=3600)
    source = random.Random(args.seed)
    asked = [
        conversation(source, args.words, args.shared, args.new_tokens)
        for _ in range(args.clients * args.requests)
    ]
    run = LoadRun(asked, server, ClosedLoop(args.clients))

    async def intrude() -> None:
        await asyncio.sleep(INTRUDER_S)
        request = conversation(source, args.long_words, 0, 1).ask()
        assert request is not None
        await server.ask(request)

    await asyncio.gather(run.go(), *([intrude()] if args.long_words else []))
    server.close()
    return run


def summary(run: LoadRun, cpu_s: float | None) -> dict[str, object]:
    """The figures under the names that benchmarks/results/serving has, in seconds."""
    found = figures(run, percentiles=(99, 100))

    def seconds(name: str) -> float | None:
        return None if found[name] is None else round(found[name] / 1000, 4)

    result: dict[str, object] = {
        "answers": found["completed"],
        "errors": [f"{failure['kind']}: {failure['first']}" for failure in found["failures"]],
        "output_tokens": found["total_output_tokens"],
        "seconds": round(found["duration"], 3),
        "output_tokens_per_s": None
        if found["output_throughput"] is None
        else round(found["output_throughput"], 2),
        "first_token_s_p50": seconds("median_ttft_ms"),
        "first_token_s_max": seconds("p100_ttft_ms"),
        "gap_s_p50": seconds("median_itl_ms"),
        "gap_s_p99": seconds("p99_itl_ms"),
        "tokens_per_event": found["tokens_per_event"],
        "client": found["client"],
    }
    return result if cpu_s is None else result | {"server_cpu_s": round(cpu_s, 3)}


def probing(url: str) -> subprocess.Popen[str]:
    """A process that asks for /health until it is terminated, and then writes the seconds that each answer took."""
    parts = urlsplit(url)
    command = [sys.executable, "-c", _PROBE, str(parts.hostname), str(parts.port)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def probed(process: subprocess.Popen[str]) -> dict[str, object]:
    """What it found."""
    process.terminate()
    took = sorted(map(float, process.communicate()[0].split()))
    if not took:  # no /health there: each answer but a 200 counts for nothing
        return {"health": 0, "health_s_p50": None, "health_s_p99": None}
    p99 = took[int(len(took) * 0.99)]
    return {
        "health": len(took),
        "health_s_p50": round(statistics.median(took), 5),
        "health_s_p99": round(p99, 5),
    }


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
    parser.add_argument("--seed", type=int, default=0, help="of the words: another one avoids a cache")
    parser.add_argument("--probe", action="store_true", help="ask for /health meanwhile")
    parser.add_argument("--pid", type=int, help="of the server, to count its processor time")
    parser.add_argument("--json", type=Path, help="also write the result to a file")
    args = parser.parse_args()
    probe = probing(args.url) if args.probe else None
    before = cpu_seconds(args.pid) if args.pid else None
    run = asyncio.run(measure(args))
    after = cpu_seconds(args.pid) if args.pid else None
    used = None if before is None or after is None else after - before
    result = summary(run, used)
    if probe is not None:
        result |= probed(probe)
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
