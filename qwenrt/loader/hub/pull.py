"""One download from a model hub, and the failures that all hubs share."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qwenrt.errors import CheckpointError

# Never fetched: *.py (code), *.bin (pickles), and files in subdirectories (other formats of the weights), but for
# additional_chat_templates/*.jinja and the settings of numbered folders (1_Pooling/config.json).
SMALL_FILES = ("*.json", "*.tiktoken", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
WEIGHT_FILES = ("*.safetensors",)
SUBDIRECTORIES = ("[!a0-9]*/*", "*/*/*", "*/*.safetensors", "*/*.tiktoken", "*/*.txt", "*/*.model")
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl")


@dataclass(frozen=True)
class Pull:
    """One repository to download. ``show``: progress bars on stderr (None: only on a terminal)."""

    hub: str
    repo: str
    revision: str | None
    cache_dir: Path
    endpoint: str | None
    token: str | None
    offline: bool
    show: bool | None
    patterns: tuple[str, ...]

    @property
    def asked(self) -> str:
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"fetching {self.repo}{at} from {self.hub}"

    def fail(self, found: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
        raise CheckpointError(self.asked, found, remedy) from cause

    def unreachable(self, found: str, cause: BaseException | None = None) -> NoReturn:
        where = f" at {self.endpoint}" if self.endpoint else ""
        mirror, other = ("HF_ENDPOINT", "modelscope")
        if self.hub == "ModelScope":
            mirror, other = ("MODELSCOPE_ENDPOINT", "huggingface")
        raise Unreachable(
            self.asked,
            f"the hub{where} cannot be reached ({found[:300]})",
            f"Check the network and proxy settings, set {mirror} to a mirror, or pass source='{other}'. "
            "What was fetched is kept: the next try goes on from there.",
        ) from cause

    def not_cached(self, cause: BaseException | None = None) -> NoReturn:
        raise NotCached(
            self.asked, f"offline, and it is not complete in {self.cache_dir}", "Fetch it while online."
        ) from cause


class Unreachable(CheckpointError):
    """A hub did not answer, or something else answered in its place: another source may have the model."""


class NotCached(CheckpointError):
    """Offline, and some files are not in the cache."""


def out_of_space(pull: Pull, error: BaseException | None) -> None:
    """Raise for a full or read-only disk, wherever in a chain of exceptions it is.

    The causes of a network error are about the network: an SSLError's errno 1 is not EPERM, and a firewall's EACCES
    does not mean the disk.
    """
    seen = 0
    while error is not None and seen < 10 and not from_network(error):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            pull.fail(
                f"no space left on the disk of {pull.cache_dir}",
                "Free some space or set QWENRT_HOME to another disk; what was fetched is kept.",
                error,
            )
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            pull.fail(
                f"{pull.cache_dir} cannot be written ({error.strerror})",
                "Set QWENRT_HOME to a directory you may write to.",
                error,
            )
        error, seen = error.__cause__ or error.__context__, seen + 1


def from_network(error: BaseException) -> bool:
    """Whether an exception came out of an HTTP library or the network below it."""
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(packages & set(NETWORK_PACKAGES)) or isinstance(error, (ConnectionError, TimeoutError))
