"""Every error a user can cause: what was asked, what was found, what to do."""

from __future__ import annotations

import errno
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice


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


class _Shown(reprlib.Repr):
    """Short texts of values that may be large, deeply nested, or fail when they are shown."""

    def repr_int(self, value: int, level: int) -> str:
        if value.bit_length() > 256:  # Python refuses to spell numbers of thousands of digits
            return f"an integer of {value.bit_length()} bits"
        return repr(value)

    def repr_dict(self, value: dict[object, object], level: int) -> str:
        if level <= 0 or not value:
            return "{...}" if value else "{}"
        items = islice(value.items(), self.maxdict)
        pieces = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in items]
        return f"{{{', '.join(pieces)}{', ...' if len(value) > self.maxdict else ''}}}"

    def repr_instance(self, value: object, level: int) -> str:
        try:
            text = repr(value)
        except Exception:  # whatever a stranger's __repr__ raises
            return f"<{type(value).__name__}>"
        return text if len(text) <= self.maxother else f"{text[: self.maxother - 3]}..."


_SHOWN = _Shown()
_SHOWN.maxother = _SHOWN.maxstring = 120
_SHOWN.maxlevel = 3


def shown(value: object, most: int = 80) -> str:
    """``value`` as an error shows it: its repr in at most ``most`` characters, made without spelling out all of it."""
    try:
        text = _SHOWN.repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


_NO_MEMORY = (  # torch's words on the CPU and on devices, the dynamic linker's, Python's for a thread's stack
    *("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory"),
    *("failed to map segment", "can't start new thread", "bad_alloc"),
)


def memory_ran_out(error: BaseException) -> bool:
    """Whether an exception means that the process can have no more memory."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in str(error) for words in _NO_MEMORY
    )


@contextmanager
def memory_errors(asked: str) -> Iterator[None]:
    """Within the block, every error that means that memory ran out is raised as a CapacityError."""
    try:
        yield
    except (MemoryError, ImportError, OSError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        said = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise CapacityError(
            asked,
            f"memory ran out ({said})",
            "Close other programs, raise this process's limits (ulimit -v, ulimit -d), or use a smaller model.",
        ) from error
