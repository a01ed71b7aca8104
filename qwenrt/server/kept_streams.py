"""Streams that outlive their connection (H13 of the specification is `X-Conversation-Id`): what was sent is kept for a
while, and a client that lost its connection, or was reloaded, reads on from where it was."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from qwenrt.text.dialects.answers import SSE_PING
from qwenrt.text.dialects.problem import Problem

KEPT_BYTES = 4 * 2**20  # of one stream, its newest
KEPT_SECONDS = 300.0  # after its end
PING_SECONDS = 15.0  # of silence, after which a ping is kept as well: offsets count all that was sent
MAX_STREAMS = 256
MOST_BYTES = 256 * 2**20  # of all streams; those that have ended go first
_PIECE = 65536  # bytes that a reader gets at once: it may be one that reads nothing
_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_HEX = re.compile(r"[0-9a-fA-F-]+")


def check_id(conversation: str) -> str:
    """An id that nobody can guess: who knows it may read the answer. Raises Problem for one with less than 128 bits."""
    digits = conversation.replace("-", "")
    enough = 32 if _HEX.fullmatch(conversation) else 22  # of 16 and of 64 different characters
    if not _ID.fullmatch(conversation) or len(digits) < enough or len(set(digits)) < 6:
        raise Problem(
            "invalid_request",
            f"The conversation id has {len(conversation)} characters. It must be random, with at least 128 bits: "
            "a UUID of version 4, or 22 letters and digits.",
            param="x-conversation-id",
        )
    return conversation


@dataclass(frozen=True)
class About:
    """What else there is to know of a stream: what a client needs to read it again, and its ``ping``."""

    media_type: str
    headers: dict[str, str]
    ping: Callable[[], bytes] = lambda: SSE_PING


class KeptStream:
    """The bytes of one stream, as they come; any number of readers follow them.

    A task of its own takes them from the source, whether anybody reads or not. When more than KEPT_BYTES have come,
    the oldest are forgotten.
    """

    def __init__(self, source: AsyncIterator[bytes], about: About, stop: Callable[[], None]) -> None:
        self.about, self._stop = about, stop
        self._kept = bytearray()
        self._first = 0  # the offset of the oldest byte that is kept
        self._more = asyncio.Event()
        self.ended_at: float | None = None  # by the loop's clock
        self._task = asyncio.ensure_future(self._take(source))

    @property
    def kept(self) -> int:
        """Bytes that are kept."""
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._first + len(self._kept)

    def stop(self) -> None:
        """End what is being written; readers still get its end."""
        self._stop()

    def check(self, offset: int) -> None:
        """Raises Problem where a reader cannot begin at this offset."""
        if not self._first <= offset <= self.size:
            raise Problem(
                "invalid_request",
                f"The stream can be read from byte {self._first} to {self.size}, not from {offset}. "
                "Ask again within these, or send the request anew.",
                param="from",
            )

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """What came from this offset on, and what comes until the end; stops where a reader is too slow to follow."""
        while True:
            more = self._more
            if offset < self._first:
                return
            if offset < self.size:
                data = bytes(memoryview(self._kept)[offset - self._first :][:_PIECE])
                offset += len(data)
                yield data
            elif self.ended_at is not None:
                return
            else:
                await more.wait()

    async def _take(self, source: AsyncIterator[bytes]) -> None:
        try:
            async for data in self._with_pings(source):
                self._kept += data
                if len(self._kept) > KEPT_BYTES:
                    self._first += len(self._kept) - KEPT_BYTES
                    del self._kept[:-KEPT_BYTES]
                self._wake()
        finally:
            self.ended_at = asyncio.get_running_loop().time()
            self._wake()

    async def _with_pings(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """What comes, and pings while nothing does."""
        coming = asyncio.ensure_future(_next(source))
        try:
            while True:
                await asyncio.wait([coming], timeout=PING_SECONDS)
                if not coming.done():
                    yield self.about.ping()
                    continue
                data = coming.result()
                if data is None:
                    return
                coming = asyncio.ensure_future(_next(source))
                yield data
        finally:
            coming.cancel()

    def _wake(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def close(self) -> None:
        """Stop it, and wait for its end."""
        self._stop()
        await asyncio.wait([self._task])


async def _next(source: AsyncIterator[bytes]) -> bytes | None:
    return await anext(source, None)


class KeptStreams:
    """The streams of all conversations, each bound to the caller (an opaque name of the key) that began it."""

    def __init__(self) -> None:
        self._streams: OrderedDict[tuple[str, str], KeptStream] = OrderedDict()

    def keep(
        self,
        caller: str,
        conversation: str,
        source: AsyncIterator[bytes],
        about: About,
        stop: Callable[[], None],
    ) -> KeptStream:
        """Begin to keep a stream; one of the same conversation that is still written is stopped. Raises Problem."""
        key = caller, check_id(conversation)
        self._forget_old()
        before = self._streams.pop(key, None)
        if before is not None:
            before.stop()
        self._make_room(caller)
        if len(self._streams) >= MAX_STREAMS:
            raise Problem(
                "queue_full",
                f"{MAX_STREAMS} streams are being written. Send the request without X-Conversation-Id, or later.",
                retry_after=int(KEPT_SECONDS),
            )
        self._streams[key] = stream = KeptStream(source, about, stop)
        return stream

    def get(self, caller: str, conversation: str) -> KeptStream:
        """Raises Problem where there is none, or where it is another caller's: the same one."""
        self._forget_old()
        stream = self._streams.get((caller, conversation))
        if stream is None:
            raise Problem("not_found", "No stream of this conversation is kept here.", param="conv_id")
        return stream

    def stop(self, caller: str, conversation: str) -> None:
        """End a stream that is still written, and forget it. Harmless where there is none."""
        stream = self._streams.pop((caller, conversation), None)
        if stream is not None:
            stream.stop()

    def listed(self, caller: str) -> list[dict[str, object]]:
        """The streams of a caller, for a client that asks what is still being written. Nobody is told of those that
        came without a key: their ids are all that guards them."""
        self._forget_old()
        if not caller:
            return []
        return [
            {"conversation_id": conversation, "bytes": stream.size, "running": stream.ended_at is None}
            for (owner, conversation), stream in self._streams.items()
            if owner == caller
        ]

    async def close(self) -> None:
        """Stop all of them."""
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            await stream.close()

    def _make_room(self, caller: str) -> None:
        """Forget streams that have ended, the caller's own before those of others and old before new, until one more
        may be kept."""
        ended = [key for key, stream in self._streams.items() if stream.ended_at is not None]
        kept = sum(stream.kept for stream in self._streams.values())
        for key in sorted(ended, key=lambda key: key[0] != caller):
            if len(self._streams) < MAX_STREAMS and kept + KEPT_BYTES <= MOST_BYTES:
                return
            kept -= self._streams.pop(key).kept

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        for key, stream in list(self._streams.items()):
            if stream.ended_at is not None and now - stream.ended_at > KEPT_SECONDS:
                del self._streams[key]
