"""What the routes are made from."""

from __future__ import annotations

from dataclasses import dataclass

from qwenrt.server.health import Health
from qwenrt.server.service import Service
from qwenrt.server.settings import ServeSettings
from qwenrt.server.writing import Writing
from qwenrt.text.dialects.signed_thoughts import SignedThoughts


@dataclass(frozen=True)
class Parts:
    """The pieces of one server that its routes use. ``thoughts``: knows its own thoughts again."""

    settings: ServeSettings
    service: Service
    writing: Writing
    health: Health
    thoughts: SignedThoughts
