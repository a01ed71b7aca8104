"""The routes that agents use: Anthropic's messages, and OpenAI's responses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.server.kept_responses import KeptResponse, KeptResponses
from qwenrt.server.openai_routes import BASES
from qwenrt.server.streams import Json
from qwenrt.server.writing import LARGE_BODY, caller_of, read
from qwenrt.text.dialects import anthropic, anthropic_answers, openai_responses, responses_answers
from qwenrt.text.dialects.answers import Served, json_bytes
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from qwenrt.outputs import Generation
    from qwenrt.server.parts import Parts


def routes(parts: Parts) -> list[Route]:
    messages, responses = _Messages(parts), _Responses(parts)
    here = [Route(base + "/messages", messages.write, methods=["POST"]) for base in ("", "/v1")]
    here += [Route(base + "/messages/count_tokens", messages.count, methods=["POST"]) for base in ("", "/v1")]
    for base in BASES:
        here += [
            Route(base + "/responses", responses.write, methods=["POST"]),
            Route(base + "/responses/input_tokens", responses.count, methods=["POST"]),
            Route(base + "/responses/compact", responses.compact, methods=["POST"]),
            Route(base + "/responses/{id}", responses.get, methods=["GET"]),
            Route(base + "/responses/{id}", responses.delete, methods=["DELETE"]),
            Route(base + "/responses/{id}/cancel", responses.cancel, methods=["POST"]),
        ]
    return here


class _Messages:
    def __init__(self, parts: Parts) -> None:
        self._service, self._writing, self._thoughts = parts.service, parts.writing, parts.thoughts

    async def write(self, request: Request) -> ASGIApp:
        ask = await read(request, lambda body: anthropic.read(anthropic.decode(body), self._thoughts))
        return await self._writing.answer(request, "anthropic", ask, anthropic_answers.Writer)

    async def count(self, request: Request) -> ASGIApp:
        ask = await read(request, lambda body: anthropic.read(anthropic.decode_count(body), self._thoughts))
        made = await self._service.make(ask, caller_of(request))
        return Json(anthropic_answers.count_body(made.prompt_tokens))


class _Responses:
    def __init__(self, parts: Parts) -> None:
        self._service, self._writing, self._thoughts = parts.service, parts.writing, parts.thoughts
        self._kept = KeptResponses()

    async def write(self, request: Request) -> ASGIApp:
        owner = caller_of(request).name
        ask = await self._read(request, await read(request, openai_responses.decode))

        def writer(served: Served, ask: Ask) -> responses_answers.Writer:
            return _KeepingWriter(served, ask, self._kept, owner)

        return await self._writing.answer(request, "openai_responses", ask, writer)

    async def count(self, request: Request) -> ASGIApp:
        ask = await self._read(request, await read(request, openai_responses.decode_count))
        made = await self._service.make(ask, caller_of(request))
        return Json(responses_answers.count_body(made.prompt_tokens))

    async def get(self, request: Request) -> ASGIApp:
        kept = self._kept.get(caller_of(request).name, request.path_params["id"])
        return Response(kept.body, media_type="application/json")

    async def delete(self, request: Request) -> ASGIApp:
        response_id = request.path_params["id"]
        self._kept.drop(caller_of(request).name, response_id)
        return Json(responses_answers.deleted_body(response_id))

    async def cancel(self, request: Request) -> ASGIApp:
        self._kept.get(caller_of(request).name, request.path_params["id"])
        raise Problem("invalid_request", "The response is finished. Close the connection of one that is not.")

    async def compact(self, request: Request) -> ASGIApp:
        raise Problem(
            "not_found", "Responses are not compacted here: send fewer items, or summaries of them."
        )

    async def _read(self, request: Request, asked: openai_responses.CountRequest) -> Ask:
        """What is asked for, beside the event loop where the conversation is long."""
        previous, owner = asked.previous_response_id, caller_of(request).name
        earlier = self._kept.get(owner, previous).items if previous else b"[]"
        if len(earlier) + len(await request.body()) > LARGE_BODY:
            return await asyncio.to_thread(openai_responses.read, asked, self._thoughts, earlier)
        return openai_responses.read(asked, self._thoughts, earlier)


class _KeepingWriter(responses_answers.Writer):
    """Keeps a finished response, where the request wants that, so that a later one can go on from it."""

    def __init__(self, served: Served, ask: Ask, kept: KeptResponses, owner: str) -> None:
        super().__init__(served, ask)
        self._ask, self._kept, self._owner = ask, kept, owner

    def end(self) -> bytes:
        events = super().end()
        self._keep()
        return events

    def whole(self, choices: Sequence[Generation]) -> dict[str, Any]:
        body = super().whole(choices)
        self._keep()
        return body

    def _keep(self) -> None:
        if self._ask.extra.store and self.response["status"] in ("completed", "incomplete"):
            kept = KeptResponse(json_bytes(self.response), openai_responses.kept_items(self._ask, self))
            self._kept.keep(self._owner, self.response["id"], kept)
