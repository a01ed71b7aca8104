"""Every error a user can cause: what was asked, what was found, what to do."""

from __future__ import annotations


class QwenrtError(Exception):
    """Base of all errors qwenrt raises on purpose.

    ``asked`` says what was wanted, ``found`` what was there instead (with numbers), ``remedy`` what the
    reader can do now. The three are joined into the message and stay readable as attributes.
    """

    def __init__(self, asked: str, found: str = "", remedy: str = "") -> None:
        self.asked, self.found, self.remedy = asked, found, remedy
        head = f"{asked}: {found}" if found else asked
        super().__init__(f"{head.rstrip('.')}. {remedy}".rstrip() if remedy else head)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.asked, self.found, self.remedy)


class ConfigError(QwenrtError):
    """A config.json, generation_config.json or a setting makes no sense or contradicts itself."""


class CheckpointError(QwenrtError):
    """A model's files: not found, not reachable, incomplete, corrupt, or of a kind that is refused."""


class BackendError(QwenrtError):
    """A device or kernel: absent, unsupported, failed, or wrong."""


class RequestError(QwenrtError, ValueError):
    """A request: a parameter out of range, a prompt of the wrong kind, use after close."""


class CapacityError(QwenrtError):
    """Not enough memory, context or cache for what was asked."""
