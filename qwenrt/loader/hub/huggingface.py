"""Fetch a repository from HuggingFace, or from a mirror of it, with huggingface-hub."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any, NoReturn

from qwenrt.errors import CheckpointError, QwenrtError
from qwenrt.files import is_there, opened
from qwenrt.loader.hub.downloads import fetch_shards, repository
from qwenrt.loader.hub.pull import SMALL_FILES, SUBDIRECTORIES, Pull, from_network, out_of_space
from qwenrt.loader.progress import ByteBar, quiet_tqdm


def fetch(pull: Pull) -> Path:
    """The directory of the repository's files; cached files are not fetched again, partial ones are resumed.

    Raises CheckpointError; Unreachable where another source may have the model.
    """
    try:
        _silence()
        if pull.offline:
            return _snapshot(pull, pull.patterns, False)
        info = repository(pull)
        pull = pull.among(file.rfilename for file in info.siblings or ())
        with pull.fetching_small_files():
            directory = _snapshot(pull, SMALL_FILES, False)
        if pull.weights:
            pull.accept(directory)
            left = fetch_shards(pull, info)
            directory = _snapshot(pull, pull.patterns, pull.show if left else False)
        _verify(pull, directory)
        return directory
    except QwenrtError:
        raise
    except Exception as error:
        _explain(pull, error)


def _silence() -> None:
    """The client tells a hub nothing but what is fetched. It would add which torch is here and which agent runs it, and
    ask huggingface.co how agents are known, whatever mirror ``pull`` names."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True


def _snapshot(pull: Pull, patterns: tuple[str, ...], show: bool | None) -> Path:
    """The client's own download of the files of these names that are not here yet. ``show``: its bars."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            pull.repo,
            revision=pull.revision,
            cache_dir=pull.cache_dir,
            endpoint=pull.endpoint,
            token=pull.token or False,
            local_files_only=pull.offline,
            allow_patterns=list(patterns),
            ignore_patterns=list(SUBDIRECTORIES),
            max_workers=4,
            tqdm_class=quiet_tqdm(show),
            library_name="qwenrt",
        )
    )


def _explain(pull: Pull, error: Exception) -> NoReturn:
    """Raise our error for a failure of the client. Its classes are looked up by name: they moved between versions."""
    names = {cls.__name__ for cls in type(error).__mro__}
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    out_of_space(pull, error)
    if pull.offline and names & {"LocalEntryNotFoundError", "IncompleteSnapshotError"}:
        pull.not_cached(error)
    if "OfflineModeIsEnabled" in names:
        pull.fail("HF_HUB_OFFLINE is set", "Unset it, or pass offline=True to use only cached files.", error)
    if "GatedRepoError" in names:
        found = f"the repository is gated: {pull.host} asks for an account that accepted its licence (HTTP {status})"
        pull.fail(found, _token_advice(pull), error)
    if "RevisionNotFoundError" in names:
        pull.fail(
            "there is no such revision (HTTP 404)", "Leave revision out, or look it up on the page.", error
        )
    if "RepositoryNotFoundError" in names or status in (401, 403):
        pull.no_such_repository(status, error, f"If it is private: {_token_advice(pull)}")
    if status == 429:
        pull.unreachable("too many requests: HTTP 429, after several tries", error)
    if status in (500, 502, 503, 504):
        pull.unreachable(f"HTTP {status}", error)
    if names & {"LocalEntryNotFoundError", "IncompleteSnapshotError"} or from_network(error):
        pull.unreachable(_root(error), error)
    if isinstance(error, OSError) and "onsistency" in str(error):
        pull.fail(
            f"a file arrived with the wrong size ({str(error).splitlines()[0][:200]})",
            "Try again; if it happens again, the mirror is broken: use another endpoint.",
            error,
        )
    if isinstance(error, ValueError):  # JSON that is not: a captive portal, a proxy's page
        pull.unreachable(f"it answered, but not like a model hub: {error}", error)
    pull.fail(f"{type(error).__name__}: {str(error)[:300]}", "Try again; what was fetched is kept.", error)


def _root(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _token_advice(pull: Pull) -> str:
    page = f"{(pull.endpoint or 'https://huggingface.co').rstrip('/')}/{pull.repo}"
    given = "is set, but that account may not read it" if pull.token else "is not set"
    return (
        f"Open {page}, accept its licence if it asks for that, and set HF_TOKEN to an access token of your account "
        f"(HF_TOKEN {given})."
    )


def verify(pull: Pull, directory: Path) -> None:
    """Compare the files of an earlier download with their hashes, where that was not done. Raises CheckpointError."""
    try:
        _verify(pull, directory)
    except OSError as error:
        _explain(pull, error)


def _verify(pull: Pull, directory: Path) -> None:
    """Compare each new file with the hash it is stored under (sha256 of large files, git's sha1 of small ones).

    A file that passed is noted by an empty file in ``verified``; one that fails is deleted, so that it is fetched
    again. Names that are no hash, as some mirrors send, cannot be checked.
    """
    noted = pull.cache_dir / "verified"
    files = []
    for path in sorted(directory.iterdir()):
        blob = path.resolve()
        if (
            len(blob.name) in (40, 64)
            and blob.parent.name == "blobs"
            and not is_there(noted / blob.name, CheckpointError)
        ):
            files.append((path, blob))
    with ByteBar("verifying", sum(blob.stat().st_size for _, blob in files), pull.show) as bar:
        for path, blob in files:
            if _digest(blob, bar) != blob.name:
                size = blob.stat().st_size
                path.unlink(missing_ok=True)
                blob.unlink(missing_ok=True)
                pull.fail(
                    f"{path.name} ({size} bytes) does not match its hash; it was deleted",
                    "Try again; if it happens again, something on the way changes files: use another endpoint.",
                )
            with contextlib.suppress(OSError):  # a cache that may only be read: verified again the next time
                noted.mkdir(exist_ok=True)
                (noted / blob.name).touch()


def _digest(path: Path, bar: ByteBar) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256() if len(path.name) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with opened(path, CheckpointError) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            bar.add(len(chunk))
    return digest.hexdigest()
