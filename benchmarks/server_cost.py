"""What the server itself costs: processor time of its event loop's thread for each streamed token, in each dialect.

    python -m benchmarks.server_cost [--clients 16] [--new-tokens 200] [--model DIR --quantize int4] [--json FILE]

It is served in this process; the clients are another one, so that their time is not counted. Without --model it is a
model that plays a script, so that all answers are equally long.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import qwenrt
from qwenrt.server.lifecycle import Hooks, bind, server_of
from qwenrt.server.settings import ServeSettings
from tests.server.scripted import scripted_llm

USER = [{"role": "user", "content": "Tell me a story."}]
SAMPLING = {"temperature": 1.0, "seed": 7}
DIALECTS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai chat": (
        "/v1/chat/completions",
        {"model": "m", "messages": USER, "stream": True},
    ),
    "openai completions": (
        "/v1/completions",
        {"model": "m", "prompt": "Once upon a time", "stream": True},
    ),
    "anthropic": ("/v1/messages", {"model": "m", "messages": USER, "stream": True}),
    "responses": ("/v1/responses", {"model": "m", "input": USER, "stream": True}),
    "ollama": ("/api/chat", {"model": "m", "messages": USER}),
}

_CLIENT = """
import asyncio, json, sys
async def one(port, raw, path):
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    lines = f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(raw)}", "Connection: close", "", ""
    writer.write("\\r\\n".join(lines).encode() + raw)
    total = 0
    while data := await reader.read(1 << 20):
        total += len(data)
    writer.close()
    return total
async def main(port, path, clients, raw):
    print(sum(await asyncio.gather(*(one(port, raw, path) for _ in range(clients)))))
asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()))
"""


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of the event loop's thread per token, by dialect: the least of the rounds; and its share of the
    time."""
    clients, new_tokens, rounds = args.clients, args.new_tokens, args.rounds
    text = "a word and " * (new_tokens // 3)
    if args.model is None:
        loaded = scripted_llm(lambda prompt: text, max_model_len=8192)
    else:
        loaded = qwenrt.load(args.model, quantize=args.quantize, max_model_len=2048, progress=False)
    with loaded as llm:
        settings = ServeSettings(port=0, drain=0)
        application = qwenrt.server.app(llm, settings)
        sockets = bind(settings)
        port = sockets[0].getsockname()[1]
        server = server_of(application, settings, Hooks())
        thread = threading.Thread(target=lambda: server.run(sockets), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        assert thread.ident is not None
        clock = time.pthread_getcpuclockid(thread.ident)
        result: dict[str, Any] = {"clients": clients, "new_tokens": new_tokens, "by_dialect": {}}
        for name, (path, body) in DIALECTS.items():
            raw = json.dumps({**body, **SAMPLING, "max_tokens": new_tokens, "max_output_tokens": new_tokens})
            if args.model is not None:
                if not name.startswith("openai"):
                    continue  # their answers end where the model likes
                raw = json.dumps({**json.loads(raw), "ignore_eos": True})
            command = [sys.executable, "-c", _CLIENT, str(port), path, str(clients), raw]
            found = []
            for _ in range(rounds):
                before, written, began = (
                    time.clock_gettime(clock),
                    llm.stats()["generated_tokens"],
                    time.perf_counter(),
                )
                subprocess.run(command, check=True, capture_output=True)
                used, seconds = time.clock_gettime(clock) - before, time.perf_counter() - began
                found.append((used / (llm.stats()["generated_tokens"] - written) * 1e6, used / seconds))
            each, share = min(found)
            result["by_dialect"][name] = {"us_per_token": round(each, 1), "share_of_time": round(share, 4)}
        server.stop()
        thread.join(10)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a directory: then it is this model that answers")
    parser.add_argument("--quantize")
    parser.add_argument("--json", type=Path, help="also write the result to a file")
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
