"""From a request that asks for text to its response: read, render, wait for a turn, write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.types import ASGIApp

from qwenrt.server.failures import log_failure
from qwenrt.server.kept_streams import About, KeptStreams
from qwenrt.server.running import Running
from qwenrt.server.service import Arrival, Caller, Made, Service
from qwenrt.server.streams import Client, ClientGone, Json, Streaming, events, json_beside
from qwenrt.text.dialects.answers import Served, Writer
from qwenrt.text.dialects.ask import Ask
from qwenrt.text.dialects.problem import Problem

LARGE_BODY = 65536  # bytes; reading more takes long enough to be done beside the event loop
LARGE_ANSWER = 8192  # tokens and their alternatives in a body, for the same reason
CONVERSATION = "x-conversation-id"

T = TypeVar("T")


class WriterOf(Protocol):
    """Makes the Writer of one request; mostly a dialect's class."""

    def __call__(self, served: Served, ask: Ask) -> Writer: ...


async def read(request: Request, reader: Callable[[bytes], T]) -> T:
    """What ``reader`` makes of a request's body, beside the event loop where the body is large. Raises Problem."""
    body = await request.body()
    return await asyncio.to_thread(reader, body) if len(body) > LARGE_BODY else reader(body)


def caller_of(request: Request) -> Caller:
    """Whose request it is, as the guard found out."""
    state = request.scope["state"]
    return Caller(state["caller"], state["max_priority"])


class Writing:
    """Answers the requests of all dialects for text."""

    def __init__(self, service: Service) -> None:
        self.service, self.kept = service, KeptStreams()

    async def answer(
        self, request: Request, dialect: str, ask: Ask, writer_of: WriterOf, **told: Any
    ) -> ASGIApp:
        """The response to a request. ``told``: more of what its writer is to know, as fields of Served.

        Raises Problem for what is wrong before anything was sent, ClientGone where nobody waits for it any more.
        """
        self.service.check_room(dialect)
        client, answer_id = Client(request.receive), ""
        request_id = request.scope["state"]["request_id"]
        try:
            made = await client.unless_gone(self.service.make(ask, caller_of(request)))
            writer = writer_of(self.served(made, request, **told), ask)
            size = len(await request.body())
            answer_id = writer.id  # never what a client chose
            about = Arrival(request_id, dialect, answer_id, size)
            start = self.service.start(made, ask, caller_of(request), about)
            running = await client.unless_gone(start)
        except BaseException:
            client.close()
            if (begun := self.service.running.get(answer_id)) is not None:  # just as this was cancelled
                begun.close()
            raise
        headers = _headers(ask, made)
        if ask.stream:
            return self._stream(client, running, writer, headers, request, ask.progress)
        try:
            choices = await client.unless_gone(running.whole())
        except ClientGone:
            raise
        except Exception as error:
            raise self.problem_of(request_id, error) from error
        finally:
            client.close()
        if all(choice.finish_reason == "timeout" and not choice.token_ids for choice in choices):
            found = "The request reached its deadline before its first token. Allow it more time."
            raise Problem("timeout", found)
        if broken := sum(choice.broken_calls for choice in choices):
            headers["x-qwenrt-call-error"] = str(broken)
        if made.told * sum(len(choice.token_ids) for choice in choices) > LARGE_ANSWER:
            return await json_beside(partial(writer.whole, choices), headers)
        return Json(writer.whole(choices), headers=headers)

    def problem_of(self, request_id: str, error: Exception) -> Problem:
        """What went wrong, for the client; what nobody foresaw is in the log as well."""
        problem = self.service.problem_of(error)
        if problem.kind == "internal":
            log_failure(request_id, error, self.service.settings.log_prompts)
        return problem

    def served(self, made: Made | None, request: Request, **told: Any) -> Served:
        """What a writer knows of the server and of a request."""
        model = self.service.names[0]
        if made is not None:
            model = made.adapter or model
            told.setdefault("prompt_tokens", made.prompt_tokens)
            told.setdefault("prompt_token_ids", made.prepared[0].prompt_token_ids)
        return Served(
            model,
            request.scope["state"]["request_id"],
            token_text=self.service.token_text,
            fingerprint=self.service.fingerprint,
            **told,
        )

    def _stream(
        self,
        client: Client,
        running: Running,
        writer: Writer,
        headers: dict[str, str],
        request: Request,
        tells_progress: bool,
    ) -> ASGIApp:
        request_id = request.scope["state"]["request_id"]
        source = events(running, writer, partial(self.problem_of, request_id), tells_progress)
        conversation = request.headers.get(CONVERSATION)
        if conversation is None:
            return Streaming(
                client, source, writer.media_type, writer.ping, headers, running.cancel, running.close
            )
        about, owner = About(writer.media_type, headers, writer.ping), caller_of(request).name
        try:
            stream = self.kept.keep(owner, conversation, source, about, running.cancel)
        except Problem:
            client.close()
            running.close()
            raise
        return Streaming(client, stream.read(0), writer.media_type, None, headers)


def _in_a_header(name: str) -> str:
    """A client's word, with nothing in it that ends a header or a list."""
    return name.encode("unicode_escape").decode("ascii").replace(",", "?")[:64]


def _headers(ask: Ask, made: Made) -> dict[str, str]:
    headers = {}
    if made.max_tokens is not None:
        headers["x-qwenrt-max-tokens"] = str(made.max_tokens)
    if ask.ignored:
        headers["x-qwenrt-ignored"] = ", ".join(map(_in_a_header, ask.ignored[:32]))
    return headers
