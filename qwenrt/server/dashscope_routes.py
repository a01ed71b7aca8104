"""The route of DashScope's own dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from qwenrt.server.writing import read
from qwenrt.text.dialects import dashscope, dashscope_answers
from qwenrt.text.dialects.ask import Ask

if TYPE_CHECKING:
    from qwenrt.server.parts import Parts

PATH = "/api/v1/services/aigc/text-generation/generation"


def routes(parts: Parts) -> list[Route]:
    service, writing = parts.service, parts.writing

    async def generation(request: Request) -> ASGIApp:
        stream = dashscope.wants_stream(request.headers)

        def reader(body: bytes) -> Ask:
            return dashscope.read(dashscope.decode(body), stream, service.text_of)

        return await writing.answer(
            request, "dashscope", await read(request, reader), dashscope_answers.Writer
        )

    return [Route(PATH, generation, methods=["POST"])]
