"""What the server says about itself: whether it lives, what it serves, how busy it is, and what may be asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

import qwenrt
from qwenrt.server.health import Report
from qwenrt.server.metrics import CONTENT_TYPE
from qwenrt.server.openapi import document
from qwenrt.server.page import page
from qwenrt.server.service import Service
from qwenrt.server.streams import Json

if TYPE_CHECKING:
    from qwenrt.server.parts import Parts


def routes(parts: Parts) -> list[Route]:
    own = _Routes(parts)
    return [
        Route("/", own.root),
        Route("/health", own.health),
        Route("/ready", own.ready),
        Route("/version", own.version),
        Route("/server_info", own.server_info),
        Route("/v1/loads", own.loads),
        Route("/openapi.json", own.openapi),
        *([Route("/metrics", own.metrics)] if parts.settings.metrics else []),
    ]


class _Routes:
    def __init__(self, parts: Parts) -> None:
        self._service, self._health, self._metrics = parts.service, parts.health, parts.service.metrics
        self._has_page = parts.settings.page

    async def root(self, request: Request) -> ASGIApp:
        """The page, or a line of text without it: some clients look here first, and want nothing but a 200."""
        if self._has_page:
            return _page(request)
        name = self._service.names[0]
        return PlainTextResponse(
            f"qwenrt {qwenrt.__version__} serves {name}. What may be asked: /openapi.json\n"
        )

    async def health(self, request: Request) -> ASGIApp:
        return _report(self._health.live())

    async def ready(self, request: Request) -> ASGIApp:
        return _report(self._health.ready())

    async def version(self, request: Request) -> ASGIApp:
        return Json({"version": qwenrt.__version__})

    async def server_info(self, request: Request) -> ASGIApp:
        return Json(_server_info(self._service))

    async def loads(self, request: Request) -> ASGIApp:
        return Json(_loads(self._service))

    async def metrics(self, request: Request) -> ASGIApp:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> ASGIApp:
        return Json(document(self._service.settings.adapter_directory is not None))


def _page(request: Request) -> ASGIApp:
    own = page()
    headers = {
        "content-security-policy": own.policy,
        "etag": own.etag,
        "cache-control": "no-cache",  # kept, and asked about: a server of another version may come to this port
        "vary": "accept-encoding",
    }
    if own.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return HTMLResponse(own.compressed, headers={**headers, "content-encoding": "gzip"})
    return HTMLResponse(own.body, headers=headers)


def _report(report: Report) -> ASGIApp:
    return Json(
        {"status": "ok"} if report.ok else {"status": "failed", "reason": report.reason}, report.status
    )


_OWN_SAMPLING = ("temperature", "top_p", "top_k")  # what a request gets that says nothing of them


def _server_info(service: Service) -> dict[str, Any]:
    """The model, where and how it runs, and the limits of requests."""
    llm, settings, stats = service.llm, service.settings, service.stats()
    return {
        "version": qwenrt.__version__,
        "model": service.names[0],
        "served_model_names": list(service.names),
        "adapters": list(service.adapters),
        "model_type": llm.config.model_type,
        "built_in": llm.name == "demo",
        "thinking": llm.thinking,
        "sampling": {name: getattr(llm.generation_config.sampling, name) for name in _OWN_SAMPLING},
        "device": str(llm.device),
        "kernels": stats["kernels"],
        "dtype": stats["dtype"],
        "max_model_len": llm.max_model_len,
        "max_num_seqs": llm.options.max_num_seqs,
        "weight_bytes": stats["weight_bytes"],
        "cache_bytes": stats["cache_bytes"],
        "max_queue": settings.max_queue,
        "queue_timeout_s": settings.queue_timeout,
        "request_timeout_s": settings.request_timeout,
        "max_body_bytes": settings.max_body,
    }


def _loads(service: Service) -> dict[str, Any]:
    """How busy it is, as a gateway asks before it sends a request here."""
    stats, queue = service.stats(), service.admission.figures()
    total, free = stats["total_blocks"], stats["free_blocks"]
    return {
        "running": stats["running"],
        "waiting": stats["waiting"] + queue.waiting,
        "waiting_tokens": queue.waiting_tokens,
        "max_running": service.llm.options.max_num_seqs,
        "total_blocks": total,
        "free_blocks": free,
        "block_size": stats["block_size"],
        "cache_usage": (total - free) / total,
        "tokens_per_s": queue.tokens_per_s,
    }
