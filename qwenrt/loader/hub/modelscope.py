"""Fetch a repository from ModelScope with its own client, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from qwenrt.loader.hub.pull import SUBDIRECTORIES, Pull, from_network, out_of_space

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
    from modelscope_hub.api import (
        HubApi,  # the client inside modelscope: without the torch that package imports
    )
    from modelscope_hub.config import HubConfig

    try:
        # An empty token, not None: None would make the client unpickle a stored cookie.
        config = HubConfig(endpoint=pull.endpoint or DEFAULT_ENDPOINT, cache_dir=pull.cache_dir, token="")
        return Path(
            HubApi(config).download_repo(
                pull.repo,
                "model",
                revision=pull.revision,
                allow_patterns=list(pull.patterns),
                ignore_patterns=list(SUBDIRECTORIES),
                local_files_only=pull.offline,
            )
        )
    except Exception as error:
        _explain(pull, error)


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
            "there is no such repository or revision (HTTP 404)",
            "Check the spelling; ModelScope calls the default revision 'master'.",
            error,
        )
    if names & {"FileIntegrityError", "FileSizeMismatchError"}:
        pull.fail(f"a file arrived damaged ({str(main)[:200]})", "Try again; it was deleted.", error)
    if 429 in statuses:
        pull.unreachable("too many requests: HTTP 429, after several tries", error)
    if any(map(from_network, causes)) or "NetworkError" in names or statuses & {500, 502, 503, 504}:
        pull.unreachable(f"{type(main).__name__}: {main}", error)
    pull.fail(f"{type(main).__name__}: {str(main)[:300]}", "Try again; what was fetched is kept.", error)


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
