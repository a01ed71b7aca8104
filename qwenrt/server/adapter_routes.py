"""The administrator's routes: adapters loaded and unloaded while requests are served, from one directory alone.

Off unless the server was started with that directory; vLLM's paths and fields. What a request names is looked up among
the directory's own entries: nothing of it is ever part of a path.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.errors import QwenrtError, RequestError
from qwenrt.server.writing import read
from qwenrt.text.dialects.decoding import decode
from qwenrt.text.dialects.problem import Problem

if TYPE_CHECKING:
    from qwenrt.server.parts import Parts

_MOST_ENTRIES = 100_000  # of the directory, that are looked at


class LoadAdapter(msgspec.Struct):
    """The body of POST /v1/load_lora_adapter. ``lora_path``: the name of a directory in the server's directory of
    adapters; ``lora_name``: what requests then say as their model, the same if not given."""

    lora_path: str
    lora_name: str = ""


class UnloadAdapter(msgspec.Struct):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: str


def routes(parts: Parts) -> list[Route]:
    """None where the server has no directory of adapters."""
    if parts.settings.adapter_directory is None:
        return []
    own = _Routes(parts, parts.settings.adapter_directory)
    return [
        Route("/v1/load_lora_adapter", own.load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", own.unload, methods=["POST"]),
    ]


class _Routes:
    def __init__(self, parts: Parts, directory: Path) -> None:
        self._service, self._directory = parts.service, directory
        self._loading = asyncio.Lock()  # one after the other: each takes memory while it is read

    async def load(self, request: Request) -> ASGIApp:
        _check_administers(request)
        asked = await read(request, lambda body: decode(body, LoadAdapter))
        name = asked.lora_name or asked.lora_path
        if name in self._service.names:
            found = f"lora_name: {name[:80]!r} is a name of the model itself. Choose another."
            raise Problem("invalid_request", found, param="lora_name")
        async with self._loading:
            try:
                path = await asyncio.to_thread(self._find, asked.lora_path)
                await asyncio.to_thread(self._service.llm.load_adapter, path, name)
            except RequestError as error:
                raise self._service.problem_of(error) from error
            except (
                QwenrtError
            ) as error:  # of its files: whoever put them there is told, as it is no fault of ours
                raise Problem("invalid_request", str(error), param="lora_path") from error
        return PlainTextResponse(f"Success: adapter {name} is loaded.")

    async def unload(self, request: Request) -> ASGIApp:
        _check_administers(request)
        asked = await read(request, lambda body: decode(body, UnloadAdapter))
        if asked.lora_name not in self._service.adapters:
            loaded = ", ".join(self._service.adapters) or "none"
            found = f"No adapter {asked.lora_name[:80]!r} is loaded. Loaded: {loaded}."
            raise Problem("not_found", found, param="lora_name")
        try:
            await asyncio.to_thread(self._service.llm.unload_adapter, asked.lora_name)
        except QwenrtError as error:
            raise self._service.problem_of(error) from error
        return PlainTextResponse(f"Success: adapter {asked.lora_name} is unloaded.")

    def _find(self, asked: str) -> Path:
        """The entry of the directory that has exactly the name that was asked for. Raises Problem."""
        try:
            with os.scandir(self._directory) as entries:
                for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False):
                    if entry.name == asked and entry.is_dir(follow_symlinks=False):
                        return Path(entry.path)
        except OSError as error:
            raise Problem("unavailable", f"The directory of adapters cannot be read: {error}.") from error
        found = f"lora_path: there is no adapter {asked[:80]!r} in the server's directory of adapters."
        raise Problem("not_found", found, param="lora_path")


def _check_administers(request: Request) -> None:
    if not request.scope["state"]["administers"]:
        found = "This key may not load or unload adapters: its line in the file of keys does not say `admin`."
        raise Problem("forbidden", found)
