"""What the server says about itself: health, versions, figures for gateways and monitors, and its own description."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import qwenrt
from qwenrt.server.service import Service

if TYPE_CHECKING:
    pass


def server_info(service: Service) -> dict[str, Any]:
    """The model, where and how it runs, and the limits of requests."""
    llm, settings = service.llm, service.settings
    stats = llm.stats()
    return {
        "version": qwenrt.__version__,
        "model": service.names[0],
        "served_model_names": list(service.names),
        "model_type": llm.config.model_type,
        "device": str(llm.device),
        "kernels": stats["kernels"],
        "dtype": stats["dtype"],
        "max_model_len": stats["max_model_len"],
        "max_num_seqs": llm.max_num_seqs,
        "weight_bytes": stats["weight_bytes"],
        "cache_bytes": stats["cache_bytes"],
        "max_queue": settings.max_queue,
        "queue_timeout_s": settings.queue_timeout,
        "request_timeout_s": settings.request_timeout,
        "max_body_bytes": settings.max_body,
    }


def loads(service: Service) -> dict[str, Any]:
    """How busy it is: what a gateway asks before it sends a request here."""
    stats = service.llm.stats()
    total, free = stats["total_blocks"], stats["free_blocks"]
    waiting = service.admission.waiting + stats["waiting"]
    return {
        "running": stats["running"],
        "waiting": waiting,
        "max_running": service.llm.max_num_seqs,
        "total_blocks": total,
        "free_blocks": free,
        "block_size": stats["block_size"],
        "cache_usage": (total - free) / total if total else 0.0,
    }
