"""An HTTP server around a loaded model, for the clients of OpenAI, Anthropic, Ollama and DashScope."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenrt.llm import LLM
    from qwenrt.server.application import Server
    from qwenrt.server.settings import ServeSettings


def app(
    llm: LLM, settings: ServeSettings | None = None, *, api_keys: Iterable[str] = (), **choices: Any
) -> Server:
    """An ASGI application around a loaded model: mount it, test it in-process, or run it with any ASGI server.

    settings: a ServeSettings, or its fields as keywords (``choices``). api_keys: texts; without any, no request needs a
    key. Needs the packages of `pip install "qwenrt[server]"`. Raises ConfigError.
    """
    from qwenrt.server.application import Server
    from qwenrt.server.keys import as_keys
    from qwenrt.server.settings import ServeSettings

    if settings is None:
        settings = ServeSettings(api_keys=as_keys(api_keys), **choices)
    return Server(llm, settings)
