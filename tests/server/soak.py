"""Hours of what clients do to a server: `python -m tests.server.soak SECONDS [SEED]`.

Short and long prompts in every dialect over sockets; a fifth of the requests are cancelled, some connections are killed
wherever they are, some clients read slowly or send nonsense. After each round the server is left alone, and what it
holds is looked at: no request, block, task or connection may be left, and memory and descriptors stay as they are.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import logging
import os
import random
import socket
import statistics
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import qwenrt
from qwenrt.server import app
from qwenrt.server.application import Server
from qwenrt.server.settings import ServeSettings
from tests.server.fuzz import RIGHT, Faults
from tests.server.wire import Serving, request, serving

CLIENTS = 16
ROUND = 20.0  # seconds of load between two looks
WARM_UP = 0.35  # of the time; libraries, caches and the allocator have what they keep then
DRIFT = 0.01  # of resident memory, from the end of the warm-up to the end
WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "not",
    "what",
    "a",
    "traveller",
    "from",
    "Rome",
    "would",
    "ask",
    "about",
    "in",
    "the",
    "morning",
]


class Clients:
    """They send what the spec's clients send, and worse."""

    def __init__(self, port: int, seed: int) -> None:
        self._port, self._random = port, random.Random(seed)
        self.count = Counter[str]()

    async def run(self, until: float) -> None:
        await asyncio.gather(*(self._client(until) for _ in range(CLIENTS)))

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self._random.choices(
                ("read", "cancelled", "killed", "slow", "nonsense"), (64, 20, 8, 4, 4)
            )[0]
            with suppress(OSError, asyncio.IncompleteReadError):
                await getattr(self, f"_{kind}")(self._sent())
            self.count[kind] += 1

    def _sent(self) -> bytes:
        """A request that closes its connection."""
        pick = self._random
        path = pick.choice([*(["/v1/chat/completions", "/v1/messages", "/v1/responses"] * 4), *RIGHT])
        body = dict(pick.choice(RIGHT[path]))
        words = pick.choice([5, 5, 20, 200, 2000])
        text = " ".join(pick.choice(WORDS) for _ in range(words))
        if "messages" in body and pick.random() < 0.7:
            body["messages"] = [{"role": "user", "content": text}]
        for name in ("max_tokens", "max_output_tokens"):
            if name in body:
                body[name] = pick.choice([1, 10, 50, 300])
        if path.startswith(("/v1/chat", "/v1/messages", "/v1/responses")) and pick.random() < 0.6:
            body["stream"] = True
        if pick.random() < 0.3 and path in ("/v1/chat/completions", "/v1/completions"):
            body["ignore_eos"] = True
        headers = {"connection": "close"}
        if pick.random() < 0.02:
            headers["x-conversation-id"] = f"{pick.getrandbits(128):032x}"
        return request("POST", path, headers, json.dumps(body).encode())

    async def _open(self, receive_buffer: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        return await asyncio.open_connection(sock=sock, limit=4096)

    async def _read(self, sent: bytes) -> None:
        """A client that does as it should."""
        reader, writer = await self._open()
        try:
            writer.write(sent)
            status = (await reader.readline())[9:12].decode()
            while await reader.read(65536):
                pass
            self.count[f"status {status}"] += 1
        finally:
            writer.close()

    async def _cancelled(self, sent: bytes) -> None:
        """One that reads a while and leaves."""
        reader, writer = await self._open()
        try:
            writer.write(sent)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(self._random.choice([1, 2000])), self._random.random())
            await asyncio.sleep(self._random.random() / 10)
        finally:
            writer.close()

    async def _killed(self, sent: bytes) -> None:
        """A connection that is reset, maybe in the middle of its request."""
        _reader, writer = await self._open()
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        whole = self._random.random() < 0.5
        writer.write(sent if whole else sent[: self._random.randrange(len(sent))])
        await asyncio.sleep(self._random.random() / 5)
        writer.transport.abort()

    async def _slow(self, sent: bytes) -> None:
        """One that reads a few bytes now and then, and nothing in the end."""
        reader, writer = await self._open(receive_buffer=4096)
        try:
            writer.write(sent)
            for _ in range(self._random.randrange(20)):
                await reader.read(100)
                await asyncio.sleep(0.05)
            await asyncio.sleep(self._random.random() * 3)
        finally:
            writer.transport.abort()

    async def _nonsense(self, sent: bytes) -> None:
        """Bytes that are no request, or no longer one."""
        reader, writer = await self._open()
        try:
            at = self._random.randrange(len(sent))
            writer.write(sent[:at] + self._random.randbytes(20) + sent[at:])
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(65536), 1)
        finally:
            writer.close()


class Look:
    """What the process holds when nobody asks for anything."""

    def __init__(self, server: Server, served: Serving) -> None:
        end = time.monotonic() + 60
        while self._busy(server, served) and time.monotonic() < end:
            time.sleep(0.05)
        self.left = self._busy(server, served)
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free in the allocator is no leak
        with open("/proc/self/statm") as file:
            self.resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()
        self.objects = len(gc.get_objects())

    @staticmethod
    def _busy(server: Server, served: Serving) -> dict[str, int]:
        stats, figures = server.llm.stats(), server.admission.figures()
        held = {
            "answers": len(server.service.running),
            "turns": figures.running,
            "in the queue": figures.waiting,
            "sequences": stats["running"] + stats["waiting"],
            "blocks": stats["total_blocks"] - stats["free_blocks"],
            "tasks of requests": served.tasks,
            "connections": served.connections,
        }
        return {name: count for name, count in held.items() if count}

    def __str__(self) -> str:
        return (
            f"{self.resident / 2**20:.1f} MiB, {self.descriptors} descriptors, {self.threads} threads, "
            f"{self.objects} objects, left: {self.left or 'nothing'}"
        )


def soak(seconds: float, seed: int) -> list[str]:
    """What was found wrong; prints what it sees."""
    settings = ServeSettings(
        port=0,
        drain=0,
        max_queue=16,
        send_buffer=16384,
        send_seconds=2,
        receive_seconds=3,
        request_timeout=30,
    )
    faults = Faults()
    logging.getLogger("qwenrt").addHandler(faults)
    looks: list[tuple[float, Look]] = []
    with qwenrt.load("demo", progress=False, max_num_seqs=8, max_model_len=4096) as llm:
        server = app(llm, settings)
        with serving(server, settings, hooks=server.hooks(lambda: None)) as served:
            clients, began = Clients(served.port, seed), time.monotonic()
            while time.monotonic() < began + seconds:
                asyncio.run(clients.run(time.monotonic() + ROUND))
                look = Look(server, served)
                looks.append((time.monotonic() - began, look))
                print(f"{looks[-1][0]:7.0f} s: {look}", flush=True)
            print(dict(sorted(clients.count.items())))
    return [*faults.said[:5], *_wrong(looks, seconds)]


def _wrong(looks: list[tuple[float, Look]], seconds: float) -> list[str]:
    wrong = [f"{look.left} were left after {at:.0f} s" for at, look in looks if look.left]
    warm = [look for at, look in looks if at > WARM_UP * seconds]
    if len(warm) < 6:
        return wrong
    early, late = warm[: len(warm) // 3], warm[-(len(warm) // 3) :]
    before, after = (statistics.median(look.resident for look in some) for some in (early, late))
    print(f"memory after the warm-up: {100 * (after / before - 1):+.2f} %")
    if after > before * (1 + DRIFT):
        wrong.append(f"memory grew from {before} to {after} bytes")
    if statistics.median(look.descriptors for look in late) > max(look.descriptors for look in early):
        wrong.append(f"descriptors grew from {early[0].descriptors} to {late[-1].descriptors}")
    return wrong


def main(seconds: float, seed: int) -> int:
    logging.getLogger("qwenrt").setLevel(logging.ERROR)
    wrong = soak(seconds, seed)
    print("\n".join(wrong) or "nothing is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
