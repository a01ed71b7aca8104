"""Fetch a repository from ModelScope with its own client, where that is installed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from qwenrt.errors import CheckpointError, QwenrtError
from qwenrt.files import is_there
from qwenrt.loader.hub.downloads import RemoteFile, is_beside
from qwenrt.loader.hub.pull import (
    SMALL_FILES,
    SUBDIRECTORIES,
    Pull,
    from_network,
    out_of_space,
)

DEFAULT_ENDPOINT = "https://www.modelscope.cn"


def installed() -> bool:
    """Whether the client is here; looks without importing it."""
    return find_spec("modelscope_hub") is not None


def fetch(pull: Pull) -> Path:
    """The directory of the repository's files; as huggingface.fetch. The client checks sizes and hashes itself."""
    if not installed():
        pull.fail(
            "the modelscope package is not installed",
            "pip install 'qwenrt[modelscope]', or pass source='huggingface'.",
        )
    with _quiet_client():
        return _fetched(pull)


def _fetched(pull: Pull) -> Path:
    from modelscope_hub.api import (
        HubApi,  # the client inside modelscope: without the torch that package imports
    )
    from modelscope_hub.config import HubConfig

    def download(patterns: tuple[str, ...]) -> Path:
        return Path(
            api.download_repo(
                pull.repo,
                "model",
                revision=pull.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(SUBDIRECTORIES),
                local_files_only=pull.offline,
            )
        )

    try:
        # An empty token, not None: None would make the client unpickle a stored cookie.
        api = HubApi(
            HubConfig(endpoint=pull.endpoint or DEFAULT_ENDPOINT, cache_dir=pull.cache_dir, token="")
        )
        if pull.offline:
            return download(pull.patterns)
        with pull.trying(lambda error: any(map(from_network, _causes(error)))):
            files = api.list_repo_files(pull.repo, "model", revision=pull.revision)
        pull = pull.among(str(file.path) for file in files)
        directory = download(SMALL_FILES)
        if pull.weights:
            pull.accept(directory)
            _prepare(pull, files, directory)
            download(pull.patterns)
        return directory
    except QwenrtError:
        raise
    except Exception as error:
        _explain(pull, error)


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Without the client's own lines on stderr, which would go through ours; how it ends is said in our words."""
    import modelscope_hub  # noqa: F401, because it sets a level of its own when it is imported

    log = logging.getLogger("modelscope_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _prepare(pull: Pull, files: Sequence[Any], directory: Path) -> None:
    """Before the weights are fetched: link those that another tool has into ``directory``, where the client finds them,
    and see that there is room for the others."""
    needed = 0
    for file in files:
        name = str(file.path)
        if "/" in name or not any(fnmatch(name, pattern) for pattern in pull.weight_files):
            continue
        remote = RemoteFile(name, "", {}, int(file.size or 0), str(file.sha256 or ""), "")
        here = directory / name
        if not is_there(here, CheckpointError) and not is_beside(pull, remote, here):
            begun = here.with_name(f"{name}.incomplete")
            needed += remote.size - (begun.stat().st_size if is_there(begun, CheckpointError) else 0)
    pull.check_space(needed)


def _explain(pull: Pull, error: Exception) -> NoReturn:
    """Raise our error for a failure of the client; the causes of a failed file lie in ``failed_files``."""
    causes = list(_causes(error))
    main = next((cause for cause in causes if not hasattr(cause, "failed_files")), error)
    for cause in causes:
        out_of_space(pull, cause)
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    statuses = {_status(cause) for cause in causes}
    if pull.offline:
        pull.not_cached(error)
    if statuses & {401, 403} or names & {"AuthenticationError", "PermissionDeniedError"}:
        pull.fail(
            "the repository is private or gated",
            "Fetch it with ModelScope's own tool after logging in, and give the directory.",
            error,
        )
    if 404 in statuses or names & {"NotExistError"}:
        pull.fail(
            f"there is no such repository or revision on {pull.host} (HTTP 404)",
            f"Check the spelling. {pull.nearest} ModelScope calls the default revision 'master'.".replace(
                "  ", " "
            ),
            error,
        )
    if names & {"FileIntegrityError", "FileSizeMismatchError"}:
        pull.fail(f"a file arrived damaged ({str(main)[:200]})", "Try again; it was deleted.", error)
    if 429 in statuses:
        pull.unreachable("too many requests: HTTP 429, after several tries", error)
    if any(map(from_network, causes)) or "NetworkError" in names or statuses & {500, 502, 503, 504}:
        origin = _origin(main)
        pull.unreachable(f"{type(origin).__name__}: {origin}", error)
    pull.fail(f"{type(main).__name__}: {str(main)[:300]}", "Try again; what was fetched is kept.", error)


def _origin(error: BaseException) -> BaseException:
    """What the system said, beneath the words of three packages; the error itself where the system said nothing."""
    cause = error
    for _ in range(10):
        cause = cause.__cause__ or cause.__context__ or cause
    return cause if isinstance(cause, OSError) else error


def _status(error: BaseException) -> int | None:
    status: Any = getattr(error, "status_code", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    return status if isinstance(status, int) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from down to the network, and the failures of single files it collects."""
    for _ in range(10):
        if error is None:
            return
        yield error
        if from_network(error):
            return
        failed = getattr(error, "failed_files", None)
        if isinstance(failed, dict):
            for one in failed.values():
                yield from _causes(one)
        error = error.__cause__ or error.__context__
