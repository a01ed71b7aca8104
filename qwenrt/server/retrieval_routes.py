"""The routes for embeddings, reranking and scores, as OpenAI's, Jina's and vLLM's clients ask them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.server.openai_routes import BASES
from qwenrt.server.streams import Json, json_beside, unless_gone
from qwenrt.server.writing import caller_of, read
from qwenrt.text.dialects import openai_retrieval as retrieval

if TYPE_CHECKING:
    from qwenrt.server.parts import Parts


def routes(parts: Parts) -> list[Route]:
    own = _Routes(parts)
    posts = {"/embeddings": own.embeddings, "/rerank": own.rerank, "/score": own.score}
    return [
        *(
            Route(base + path, endpoint, methods=["POST"])
            for base in BASES
            for path, endpoint in posts.items()
        ),
        Route("/v2/rerank", own.rerank, methods=["POST"]),
    ]


def _embeddings(body: bytes) -> retrieval.EmbeddingAsk:
    return retrieval.read_embeddings(retrieval.decode_embeddings(body))


def _rerank(body: bytes) -> retrieval.RerankAsk:
    return retrieval.read_rerank(retrieval.decode_rerank(body))


def _score(body: bytes) -> retrieval.ScoreAsk:
    return retrieval.read_score(retrieval.decode_score(body))


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._service = parts.service

    async def embeddings(self, request: Request) -> ASGIApp:
        ask, service = await read(request, _embeddings), self._service
        service.check_name(ask.model)
        work = service.embed(ask.inputs, caller_of(request), ask.instruction, ask.prompt_name)
        vectors, count = await unless_gone(request.receive, work)
        return await json_beside(partial(retrieval.embeddings_body, ask, vectors, service.names[0], count))

    async def rerank(self, request: Request) -> ASGIApp:
        ask, service = await read(request, _rerank), self._service
        service.check_name(ask.model)
        pairs = [(ask.query, document) for document in ask.documents]
        work = service.scores(pairs, caller_of(request), ask.instruction)
        scores, count = await unless_gone(request.receive, work)
        return Json(retrieval.rerank_body(ask, scores, service.names[0], count))

    async def score(self, request: Request) -> ASGIApp:
        ask, service = await read(request, _score), self._service
        service.check_name(ask.model)
        work = service.scores(ask.pairs, caller_of(request), ask.instruction)
        scores, count = await unless_gone(request.receive, work)
        return Json(retrieval.score_body(scores, service.names[0], service.created, count))
