"""The routes of Ollama's dialect. Its clients look at port 11434."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

import qwenrt
from qwenrt.config.layers import num_parameters
from qwenrt.server.streams import Json, json_beside, unless_gone
from qwenrt.server.writing import caller_of, read
from qwenrt.text.dialects import ollama, ollama_answers, ollama_models
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.ollama import ChatRequest, GenerateRequest

if TYPE_CHECKING:
    from qwenrt.llm import LLM
    from qwenrt.server.parts import Parts


def routes(parts: Parts) -> list[Route]:
    """Those that are served, and those that say why they are not."""
    own = _Routes(parts)
    refused = [
        Route(f"/api/{name}{rest}", own.refused, methods=["GET", "HEAD", "POST", "DELETE"])
        for name in ollama.NOT_SERVED
        for rest in ("", "/{digest:path}")
    ]
    return [
        Route("/api/chat", own.chat, methods=["POST"]),
        Route("/api/generate", own.generate, methods=["POST"]),
        Route("/api/embed", own.embed, methods=["POST"]),
        Route("/api/embeddings", own.embeddings, methods=["POST"]),
        Route("/api/show", own.show, methods=["POST"]),
        Route("/api/tags", own.tags),
        Route("/api/ps", own.ps),
        Route("/api/version", own.version),
        *refused,
    ]


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._service, self._writing = parts.service, parts.writing

    async def chat(self, request: Request) -> ASGIApp:
        context = self._service.llm.max_model_len

        def reader(body: bytes) -> tuple[ChatRequest, Ask]:
            asked = ollama.decode_chat(body)
            return asked, ollama.read_chat(asked, context)

        return await self._answer(request, *await read(request, reader))

    async def generate(self, request: Request) -> ASGIApp:
        context = self._service.llm.max_model_len

        def reader(body: bytes) -> tuple[GenerateRequest, Ask]:
            asked = ollama.decode_generate(body)
            return asked, ollama.read_generate(asked, context)

        return await self._answer(request, *await read(request, reader))

    async def embed(self, request: Request) -> ASGIApp:
        wanted = ollama.read_embed(await read(request, ollama.decode_embed))
        began = time.monotonic()
        vectors, count = await self._embedded(request, wanted)
        served = self._writing.served(None, request, prompt_tokens=count)
        seconds = time.monotonic() - began
        return await json_beside(
            partial(ollama_answers.embed_body, served, vectors, wanted.dimensions, seconds)
        )

    async def embeddings(self, request: Request) -> ASGIApp:
        wanted = ollama.read_embed(await read(request, ollama.decode_embeddings))
        vectors, _ = await self._embedded(request, wanted)
        return Json(ollama_answers.embeddings_body(vectors[0]))

    async def show(self, request: Request) -> ASGIApp:
        asked = await read(request, ollama.decode_show)
        name = asked.model or asked.name
        self._service.check_name(name)
        wanted, cards = self._service.adapter_of(name), self._cards()
        return Json(ollama_models.show(next((card for card in cards if card.name == wanted), cards[0])))

    async def tags(self, request: Request) -> ASGIApp:
        return Json(ollama_models.tags(self._cards()))

    async def ps(self, request: Request) -> ASGIApp:
        on_device = self._service.llm.device.type != "cpu"
        return Json(ollama_models.ps(self._cards(), time.time(), on_device))

    async def version(self, request: Request) -> ASGIApp:
        return Json(ollama_models.version(qwenrt.__version__))

    async def refused(self, request: Request) -> ASGIApp:
        raise ollama.not_served(request.url.path.split("/")[2])

    async def _embedded(self, request: Request, wanted: ollama.Embedding) -> tuple[list[list[float]], int]:
        self._service.check_name(wanted.model)
        if not wanted.texts:
            return [], 0
        work = self._service.embed(wanted.texts, caller_of(request), truncate=wanted.truncate)
        return await unless_gone(request.receive, work)

    async def _answer(self, request: Request, asked: ChatRequest | GenerateRequest, ask: Ask) -> ASGIApp:
        if ollama.is_load(asked):
            self._service.check_name(ask.model)
            return Json(ollama_answers.loaded(self._writing.served(None, request), ask))
        return await self._writing.answer(request, "ollama", ask, ollama_answers.Writer)

    def _cards(self) -> list[ollama_models.ModelCard]:
        service, llm = self._service, self._service.llm
        capabilities = ["completion"]
        if llm.takes_tools:
            capabilities.append("tools")
        if llm.thinking != "never":
            capabilities.append("thinking")
        if llm.has_tokenizer:
            capabilities.append("embedding")
        stats = service.stats()
        return [
            ollama_models.ModelCard(
                name=name,
                architecture=ollama_models.architecture(llm.config),
                parameters=num_parameters(llm.config),
                quantization=_weights(llm),
                context_length=llm.max_model_len,
                capabilities=tuple(capabilities),
                size=stats["weight_bytes"],
                modified=service.created,
                info=ollama_models.architecture_info(llm.config),
            )
            for name in (*service.names, *service.adapters)
        ]


def _weights(llm: LLM) -> str:
    """What the weights are, in a word."""
    quant = llm.config.quant
    if quant is not None:
        return f"{quant.method}-int{quant.bits}" if quant.has_codes else quant.method
    return llm.options.quantize or str(llm.stats()["dtype"])
