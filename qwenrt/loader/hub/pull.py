"""One download from a model hub, and the failures that all hubs share."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from qwenrt.errors import CheckpointError
from qwenrt.loader.hub.gguf_files import chosen, models, said
from qwenrt.loader.progress import Waiting

# Never fetched: *.py (code), *.bin (pickles), and files in subdirectories (other formats of the weights), but for
# additional_chat_templates/*.jinja and the settings of numbered folders (1_Pooling/config.json).
SMALL_FILES = ("*.json", "*.tiktoken", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")
WEIGHT_FILES = ("*.safetensors",)
SUBDIRECTORIES = ("[!a0-9]*/*", "*/*/*", "*/*.safetensors", "*/*.tiktoken", "*/*.txt", "*/*.model")
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "socket", "ssl")
GOES_ON = "What was fetched is kept: the next try goes on from there."


@dataclass(frozen=True)
class Pull:
    """One repository to download. ``show``: progress bars on stderr (None: only on a terminal). ``nearest``: the names
    most like it, as a sentence. ``gguf``: which of its GGUF files is wanted (see gguf_files). ``beside``: directories
    of other tools that hold some of its files. ``accept``: looks at the small files before the weights are fetched, and
    raises for a model that could not be loaded."""

    hub: str
    repo: str
    revision: str | None
    cache_dir: Path
    endpoint: str | None
    token: str | None
    offline: bool
    show: bool | None
    patterns: tuple[str, ...]
    nearest: str = ""
    gguf: str = ""
    beside: tuple[Path, ...] = ()
    accept: Callable[[Path], None] = field(default=lambda directory: None)

    @property
    def weights(self) -> bool:
        """Whether the weights are wanted too."""
        return bool(self.weight_files)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """What the weights are called."""
        return tuple(pattern for pattern in self.patterns if pattern not in SMALL_FILES)

    def among(self, names: Iterable[str]) -> Pull:
        """The same once it is known which files the repository has. Raises CheckpointError where no one model is meant:
        ``gguf`` is none of them, or there are GGUF files alone and it says nothing."""
        names = [name for name in names if "/" not in name]
        if self.gguf:
            wanted = chosen(names, self.gguf, self.repo, self.asked)
            return replace(self, patterns=(*SMALL_FILES, *map(escape, wanted)))
        found = models(names)
        if self.weights and found and not any(name.endswith(".safetensors") for name in names):
            tags = ", ".join([*found][:24]) + (", ..." if len(found) > 24 else "")
            self.fail(f"it has GGUF files, and no others: {tags}", said(self.repo, found))
        return self

    @property
    def host(self) -> str:
        """The name of the machine that is asked."""
        default = "https://huggingface.co" if self.hub == "HuggingFace" else "https://modelscope.cn"
        return (urlsplit(self.endpoint or default).netloc or str(self.endpoint)).removeprefix("www.")

    @property
    def asked(self) -> str:
        at = f" at revision {self.revision!r}" if self.revision else ""
        return f"fetching {self.repo}{at} from {self.hub}"

    def trying(self, unanswered: Callable[[BaseException], bool] | None = None) -> Waiting:
        """Around the first request: says whose answer is waited for, and where an exception is ``unanswered`` (by
        default one of the network) that none came."""
        none_came = unanswered or from_network
        said = f"no answer from {self.host}"
        return Waiting(f"trying {self.host}", self.show, lambda error: said if none_came(error) else "")

    def fetching_small_files(self) -> Waiting:
        return Waiting(f"fetching configuration and tokenizer of {self.repo}", self.show)

    def fail(self, found: str, remedy: str, cause: BaseException | None = None) -> NoReturn:
        raise CheckpointError(self.asked, found, remedy) from cause

    def check_space(self, needed: int) -> None:
        """Raise unless the disk of the cache has room for ``needed`` bytes more."""
        free = shutil.disk_usage(self.cache_dir).free
        if needed > free:
            wanted, room = f"{needed / 2**30:.1f} GiB", f"{free / 2**30:.1f} GiB"
            self.fail(
                f"{wanted} are still to be fetched, and {room} are free in {self.cache_dir}",
                "Free some space (qwenrt list, qwenrt rm), or set QWENRT_HOME to a directory on another disk.",
            )

    def no_such_repository(self, status: int | None, cause: BaseException, advice: str = "") -> NoReturn:
        self.fail(
            f"there is no such repository on {self.host}, or it is private (HTTP {status})",
            f"Check the spelling. {self.nearest} {advice}".replace("  ", " ").strip(),
            cause,
        )

    def unreachable(self, found: str, cause: BaseException | None = None) -> NoReturn:
        where = f" at {self.endpoint}" if self.endpoint else ""
        mirror, other = ("HF_ENDPOINT", "modelscope")
        if self.hub == "ModelScope":
            mirror, other = ("MODELSCOPE_ENDPOINT", "huggingface")
        raise Unreachable(
            self.asked,
            f"the hub{where} cannot be reached ({found[:300]})",
            f"Check the network and proxy settings, set {mirror} to a mirror, or pass source='{other}'. {GOES_ON}",
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
