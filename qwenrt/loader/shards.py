"""Fetch a repository's large files so that a download goes on where any earlier one, of any process, stopped.

huggingface-hub resumes within one call only: what a killed process had fetched is lost. Large files are therefore
fetched here, with its functions, into ``parts``, checked against their sha256, and moved to where the client keeps
finished files; it then finds them there.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from qwenrt.loader.progress import ByteBar, quiet_tqdm
from qwenrt.loader.pull import WEIGHT_FILES, Pull

PARALLEL = 4


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: where its bytes are and what they must be."""

    name: str
    url: str
    headers: dict[str, str]
    size: int
    sha256: str


class Stopped(Exception):
    """Another file failed or the user gave up: this one stops at its next bytes and keeps them."""


def fetch_shards(pull: Pull) -> str:
    """Bring every weight file of the repository to the client's store; returns the commit they belong to.

    Raises CheckpointError when the disk cannot hold them or a file's contents are not what its hash promises, and
    whatever the client raises.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=pull.endpoint, token=pull.token or False, library_name="qwenrt")
    info = _patiently(lambda: api.model_info(pull.repo, revision=pull.revision))
    commit = str(info.sha)
    names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)]
    store = pull.cache_dir / f"models--{pull.repo.replace('/', '--')}" / "blobs"
    with ThreadPoolExecutor(PARALLEL) as pool:
        described = pool.map(lambda name: _describe(pull, name, commit), names)
        files = [file for file in described if file is not None and not (store / file.sha256).exists()]
    if not files:
        return commit
    parts = pull.cache_dir / "parts"
    for directory in (parts, store, pull.cache_dir / "verified"):
        directory.mkdir(parents=True, exist_ok=True)
    _check_space(pull, files, parts)
    with ByteBar("downloading weights", sum(file.size for file in files), pull.show) as bar:
        _in_parallel(files, lambda file, stop: _fetch_one(pull, file, parts, store, bar, stop))
    return commit


def _patiently(call: Callable[[], Any]) -> Any:
    """Call again, after the wait the server asks for (at most 30 s) or a growing one, while it is busy."""
    for wait in (1.0, 2.0, 4.0, None):
        try:
            return call()
        except Exception as error:
            response: Any = getattr(error, "response", None)
            if wait is None or getattr(response, "status_code", None) not in (429, 500, 502, 503, 504):
                raise
            after = str(response.headers.get("Retry-After", ""))
            time.sleep(min(float(after), 30.0) if after.isdecimal() else wait)
    return None


def _describe(pull: Pull, name: str, commit: str) -> RemoteFile | None:
    """What a HEAD request says of a file; None where its hash is not told, and the client is left to fetch it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    url = hf_hub_url(pull.repo, name, revision=commit, endpoint=pull.endpoint)
    token = pull.token or False
    metadata = _patiently(lambda: get_hf_file_metadata(url, token=token))
    etag, size = metadata.etag or "", metadata.size
    if len(etag) != 64 or any(c not in "0123456789abcdef" for c in etag) or size is None:
        return None
    headers = build_hf_headers(token=token, library_name="qwenrt")
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the store of the bytes has its own signature in the address
    return RemoteFile(name, metadata.location, headers, size, etag)


def _check_space(pull: Pull, files: list[RemoteFile], parts: Path) -> None:
    here = sum(part.stat().st_size for file in files if (part := parts / f"{file.sha256}.part").exists())
    needed = sum(file.size for file in files) - here
    free = shutil.disk_usage(parts).free
    if needed > free:
        pull.fail(
            f"{needed / 2**30:.1f} GiB are still to be fetched, and {free / 2**30:.1f} GiB are free in {parts}",
            "Free some space, or set QWENRT_HOME to a directory on another disk.",
        )


def _in_parallel(files: list[RemoteFile], fetch: Callable[[RemoteFile, threading.Event], None]) -> None:
    """Several files at once; the first failure, or Ctrl-C, stops the others and is raised."""
    stop = threading.Event()

    def guarded(file: RemoteFile) -> None:
        try:
            fetch(file, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(PARALLEL) as pool:
        tasks = [pool.submit(guarded, file) for file in files]
        try:
            failures = [task.exception() for task in tasks]
        except BaseException:
            stop.set()
            raise
    first = next((error for error in failures if error is not None and not isinstance(error, Stopped)), None)
    if first is not None:
        raise first


def _fetch_one(
    pull: Pull, file: RemoteFile, parts: Path, store: Path, bar: ByteBar, stop: threading.Event
) -> None:
    """Fetch one file, or what is missing of it; another process that fetches the same one is waited for."""
    from filelock import FileLock
    from huggingface_hub.file_download import http_get

    part, done = parts / f"{file.sha256}.part", store / file.sha256
    with FileLock(f"{part}.lock"), part.open("ab") as stream:
        if done.exists():
            part.unlink()
            return
        if stream.tell() > file.size:
            stream.truncate(0)
        have = stream.tell()
        bar.add(have)
        try:
            http_get(
                file.url,
                cast(Any, _Counted(stream, bar, stop)),
                resume_size=have,
                headers=dict(file.headers),
                expected_size=file.size,
                _tqdm_bar=quiet_tqdm(False)(),
            )
        except OSError as error:
            if "onsistency" in str(error):  # the client's word for a size that is not the announced one
                part.unlink()
            raise
        stream.flush()
        if _sha256(part) != file.sha256:
            part.unlink()
            pull.fail(
                f"{file.name} ({file.size} bytes) does not have the contents its hash promises; it was deleted",
                "Try again; if it happens again, something on the way changes files: use another endpoint.",
            )
        (pull.cache_dir / "verified" / file.sha256).touch()
        part.replace(done)


class _Counted:
    """The file that http_get writes to: counts bytes for the bar, keeps them at once, and can be stopped."""

    def __init__(self, stream: Any, bar: ByteBar, stop: threading.Event) -> None:
        self._stream, self._bar, self._stop = stream, bar, stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        written: int = self._stream.write(data)
        self._bar.add(len(data))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
