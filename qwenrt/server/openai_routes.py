"""The routes of OpenAI's dialect for text: chats, completions, what is asked about prompts, kept streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.server.streams import Client, Json, Streaming, json_beside
from qwenrt.server.writing import caller_of, read
from qwenrt.text.dialects import openai_chat, openai_completions, openai_models
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.decoding import decode
from qwenrt.text.dialects.openai_chat_writer import ChatWriter
from qwenrt.text.dialects.openai_completions import CompletionWriter
from qwenrt.text.dialects.problem import Problem

if TYPE_CHECKING:
    from qwenrt.server.parts import Parts

BASES = ("", "/v1", "/compatible-mode/v1")  # clients are told one of these, or the address alone


class Control(msgspec.Struct):
    """The body of POST /v1/chat/completions/control. ``id``: of the answer that is being written."""

    id: str
    action: str


def routes(parts: Parts) -> list[Route]:
    """The routes below each of BASES, and those of kept streams."""
    own = _Routes(parts)
    posts: dict[str, Callable[[Request], Any]] = {
        "/chat/completions": own.chat,
        "/chat/completions/render": own.render_chat,
        "/chat/completions/input_tokens": own.count_chat,
        "/chat/completions/control": own.control,
        "/completions": own.complete,
        "/completions/render": own.render_completion,
        "/tokenize": own.tokenize,
        "/detokenize": own.detokenize,
    }
    gets = {"/models": own.models, "/models/{name:path}": own.model}
    return [
        *(
            Route(base + path, endpoint, methods=["POST"])
            for base in BASES
            for path, endpoint in posts.items()
        ),
        *(Route(base + path, endpoint) for base in BASES for path, endpoint in gets.items()),
        Route("/v1/streams", own.streams),
        Route("/v1/stream", own.stream, methods=["GET", "DELETE"]),
        Route("/v1/stream/{conversation}", own.stream, methods=["GET", "DELETE"]),
    ]


def _chat(body: bytes) -> Ask:
    return openai_chat.read(openai_chat.decode(body))


def _completion(body: bytes) -> Ask:
    return openai_completions.read(openai_completions.decode(body))


def _tokenize(body: bytes) -> openai_models.TokenizeAsk:
    return openai_models.read_tokenize(openai_models.decode_tokenize(body))


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._service, self._writing = parts.service, parts.writing

    # ---- text

    async def chat(self, request: Request) -> ASGIApp:
        ask = await read(request, _chat)
        return await self._writing.answer(request, "openai_chat", ask, ChatWriter)

    async def complete(self, request: Request) -> ASGIApp:
        ask = await read(request, _completion)
        texts = await asyncio.to_thread(self._texts, ask) if ask.extra.echo else ()
        return await self._writing.answer(request, "openai_completions", ask, CompletionWriter, prompts=texts)

    async def control(self, request: Request) -> ASGIApp:
        """What may be done to an answer while it is written."""
        asked = await read(request, lambda body: decode(body, Control))
        if asked.action != "reasoning_end":
            found = f"action: got {asked.action[:80]!r}. Known is reasoning_end."
            raise Problem("invalid_request", found, param="action")
        running = self._service.running.get(asked.id)
        if running is None or running.caller != caller_of(request):
            raise Problem("not_found", "No answer of this id is being written here.", param="id")
        running.end_thought()
        return Json({"success": True})

    def _texts(self, ask: Ask) -> list[str]:
        decode_ids = self._service.tokenizer.decode
        return [prompt if isinstance(prompt, str) else decode_ids(prompt) for prompt in ask.prompts]

    # ---- about prompts

    async def render_chat(self, request: Request) -> ASGIApp:
        return Json((await self._rendered(request, await read(request, _chat)))[0])

    async def render_completion(self, request: Request) -> ASGIApp:
        rendered = await self._rendered(request, await read(request, _completion))
        return Json(rendered[0] if len(rendered) == 1 else rendered)

    async def count_chat(self, request: Request) -> ASGIApp:
        made = await self._service.make(await read(request, _chat), caller_of(request))
        return Json({"object": "chat.completion.input_tokens", "input_tokens": made.prompt_tokens})

    async def tokenize(self, request: Request) -> ASGIApp:
        asked = await read(request, _tokenize)
        ids = await self._ids(request, asked)
        longest, text_of = self._service.llm.max_model_len, self._service.token_text

        def make() -> dict[str, Any]:
            texts = [text_of(i)[0] for i in ids] if asked.texts else []
            return openai_models.tokenize_body(asked, ids, longest, texts)

        return await json_beside(make)

    async def detokenize(self, request: Request) -> ASGIApp:
        asked = await read(request, openai_models.decode_detokenize)
        return await json_beside(lambda: openai_models.detokenize_body(self._service.text_of(asked.tokens)))

    async def _ids(self, request: Request, asked: openai_models.TokenizeAsk) -> list[int]:
        if asked.chat is not None:
            made = await self._service.make(asked.chat, caller_of(request))
            return made.prepared[0].prompt_token_ids
        assert asked.prompt is not None
        tokenizer = self._service.tokenizer
        ids = await asyncio.to_thread(tokenizer.encode, asked.prompt)
        return [*tokenizer.prefix_ids, *ids] if asked.prefix else ids

    async def _rendered(self, request: Request, ask: Ask) -> list[dict[str, Any]]:
        made = await self._service.make(ask, caller_of(request))
        rendered = []
        for one in made.prepared:
            text = await asyncio.to_thread(self._service.text_of, one.prompt_token_ids)
            ids, longest = one.prompt_token_ids, self._service.llm.max_model_len
            rendered.append(openai_models.render_body(text, ids, longest))
        return rendered

    # ---- models

    async def models(self, request: Request) -> ASGIApp:
        service = self._service
        return Json(
            openai_models.models_body(
                service.names, service.created, service.llm.max_model_len, service.own_name, service.adapters
            )
        )

    async def model(self, request: Request) -> ASGIApp:
        service, name = self._service, request.path_params["name"]
        adapter = name in service.adapters
        if name not in service.names and not adapter:
            served = ", ".join((*service.names, *service.adapters))
            found = f"The model {name[:120]!r} is not served here. Served: {served}."
            raise Problem("not_found", found, param="model")
        parent, longest = service.names[0] if adapter else None, service.llm.max_model_len
        return Json(openai_models.model_body(name, service.created, longest, service.own_name, parent))

    # ---- streams that outlive their connections

    async def streams(self, request: Request) -> ASGIApp:
        return Json(self._writing.kept.listed(caller_of(request).name))

    async def stream(self, request: Request) -> ASGIApp:
        """Read on from a byte of a kept stream, or stop what it is of."""
        given = request.path_params.get("conversation") or request.query_params.get("conv_id", "")
        if request.method == "DELETE":
            self._writing.kept.stop(caller_of(request).name, given)
            return Json({"success": True})
        stream = self._writing.kept.get(caller_of(request).name, given)
        offset = request.query_params.get("from", "0")
        if not (offset.isascii() and offset.isdecimal() and len(offset) < 16):
            raise Problem(
                "invalid_request", f"from: got {offset[:40]!r}. Send a number of bytes.", param="from"
            )
        stream.check(int(offset))
        source: AsyncIterator[bytes] = stream.read(int(offset))
        about = stream.about
        client = Client(request.receive)
        return Streaming(client, source, about.media_type, None, about.headers)
