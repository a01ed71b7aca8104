"""The routes of OpenAI's dialect: chats, completions, embeddings, reranking, and what is asked about prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.server.streams import Json
from qwenrt.server.writing import caller_of, read
from qwenrt.text.dialects import openai_chat
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import decode
from qwenrt.text.dialects.openai_chat_writer import ChatWriter
from qwenrt.text.dialects.problem import Problem

if TYPE_CHECKING:
    from qwenrt.server.app import Server

BASES = ("", "/v1", "/compatible-mode/v1")  # clients are told one of these, or the address alone


class Control(msgspec.Struct):
    """The body of POST /v1/chat/completions/control. ``id``: of the answer that is being written."""

    id: str
    action: str


def routes(server: Server) -> list[Route]:
    """The routes below each of BASES."""
    own = _Routes(server)
    posts: dict[str, Callable[[Request], Any]] = {
        "/chat/completions": own.chat,
        "/chat/completions/render": own.render_chat,
        "/chat/completions/input_tokens": own.count_chat,
        "/chat/completions/control": own.control,
    }
    return [Route(base + path, endpoint, methods=["POST"]) for base in BASES for path, endpoint in posts.items()]


def _chat(body: bytes) -> Ask:
    return openai_chat.read(openai_chat.decode(body))


class _Routes:
    def __init__(self, server: Server) -> None:
        self._service, self._writing = server.service, server.writing

    async def chat(self, request: Request) -> ASGIApp:
        ask = await read(request, _chat)
        return await self._writing.answer(request, "openai_chat", ask, ChatWriter)

    async def render_chat(self, request: Request) -> ASGIApp:
        ask = await read(request, _chat)
        return Json(await self._rendered(request, ask))

    async def count_chat(self, request: Request) -> ASGIApp:
        made = await self._service.make(await read(request, _chat), caller_of(request))
        return Json({"object": "chat.completion.input_tokens", "input_tokens": made.prompt_tokens})

    async def control(self, request: Request) -> ASGIApp:
        asked = await read(request, lambda body: decode(body, Control))
        if asked.action != "reasoning_end":
            found = f"action: got {asked.action[:80]!r}. Known is reasoning_end."
            raise Problem("invalid_request", found, param="action")
        running = self._service.running.get(asked.id)
        if running is None:
            raise Problem("not_found", "No answer of this id is being written here.", param="id")
        running.end_thought()
        return Json({"success": True})

    async def _rendered(self, request: Request, ask: Ask) -> dict[str, Any]:
        """The prompt of a request, as text and ids, and what would be found of it in the cache."""
        made = await self._service.make(ask, caller_of(request))
        ids = made.prepared[0].prompt_token_ids
        text = await asyncio.to_thread(self._service.tokenizer.decode, ids)
        return {
            "prompt": text,
            "token_ids": ids,
            "count": len(ids),
            "max_model_len": self._service.llm.max_model_len,
        }
