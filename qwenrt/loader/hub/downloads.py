"""Fetch a repository's large files; a download resumes where an earlier one, of any process, stopped.

huggingface-hub resumes within one call only: a killed process loses what it had fetched. Large files are therefore
fetched here, with its functions, into ``parts``, checked against their sha256, and moved to where the client keeps
finished files; it then finds them there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from qwenrt.errors import CheckpointError
from qwenrt.files import is_there, opened
from qwenrt.loader.hub.pull import Pull, from_network
from qwenrt.loader.progress import ByteBar, quiet_tqdm

_log = logging.getLogger(__name__)

PARALLEL = 4
TIMEOUT = 30.0  # seconds a hub may take to describe a repository
MAX_PLAIN_BYTES = 50 * 10**9  # http_get refuses a larger file; the client has another way, hf_xet
_DAMAGED = "Try again; if it happens again, a proxy on the way changes files: use another endpoint."


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its address, which is valid for about an hour, its size and its hash."""

    name: str
    url: str
    headers: dict[str, str]
    size: int
    sha256: str
    commit: str


class Stopped(Exception):
    """Another file failed or the user interrupted: this one stops after its next bytes, and keeps them."""


def repository(pull: Pull) -> Any:
    """The hub's description of the repository: its commit and its files. The first request of every download, with a
    time limit: the client itself would wait for ever for a hub that does not answer."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=pull.endpoint, token=pull.token or False, library_name="qwenrt")
    with pull.trying():
        return _with_retries(lambda: api.model_info(pull.repo, revision=pull.revision, timeout=TIMEOUT))


def fetch_shards(pull: Pull, info: Any) -> bool:
    """Bring every weight file of the repository that ``info`` describes to the client's store. -> whether some are left
    to the client.

    Raises CheckpointError when the disk cannot hold them or a file does not match its hash, and whatever the
    client raises.
    """
    commit = str(info.sha)
    names = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
    names = [name for name in names if any(fnmatch(name, pattern) for pattern in pull.weight_files)]
    store = pull.cache_dir / f"models--{pull.repo.replace('/', '--')}" / "blobs"
    with ThreadPoolExecutor(PARALLEL) as pool:
        described = list(pool.map(lambda name: _describe(pull, name, commit), names))
        files = [
            file
            for file in described
            if file is not None and not is_there(store / file.sha256, CheckpointError)
        ]
    left = None in described
    if not files:
        return left
    parts = parts_of(pull.cache_dir, pull.repo)
    for directory in (parts, store, pull.cache_dir / "verified"):
        directory.mkdir(parents=True, exist_ok=True)
    for file in list(files):
        if is_beside(pull, file, store / file.sha256):
            (pull.cache_dir / "verified" / file.sha256).touch()
            files.remove(file)
    if not files:
        return left
    _check_space(pull, files, parts)
    with ByteBar("downloading weights", sum(file.size for file in files), pull.show) as bar:
        _in_parallel(files, lambda file, stop: _fetch_one(pull, file, parts, store, bar, stop))
    return left


def parts_of(cache_dir: Path, repo: str) -> Path:
    """Where unfinished files of a repository are, each with its lock."""
    return cache_dir / "parts" / f"models--{repo.replace('/', '--')}"


def is_beside(pull: Pull, file: RemoteFile, target: Path) -> bool:
    """Whether another tool has the file: then, once its hash was checked, ``target`` becomes a second name of it, or a
    copy where that is another disk."""
    for directory in pull.beside:
        found = directory / file.name
        try:
            info = found.stat()
            if not stat.S_ISREG(info.st_mode) or info.st_size != file.size:
                continue
            with ByteBar(f"checking {file.name}", file.size, pull.show) as bar:
                if _sha256(found, bar) != file.sha256:
                    continue
            _link_or_copy(found.resolve(), target)
            return True
        except (OSError, CheckpointError) as error:
            _log.info("%s of another tool is not used: %s", found, error)
    return False


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name of a file, which takes no space; on another disk a copy, complete before it has its name."""
    with contextlib.suppress(FileExistsError):  # another process did the same
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:
            unfinished = target.with_name(f"{target.name}.copy-{os.getpid()}")
            try:
                shutil.copyfile(source, unfinished)
                unfinished.replace(target)
            finally:
                unfinished.unlink(missing_ok=True)


def _with_retries(call: Callable[[], Any]) -> Any:
    """Call again, after the wait the server asks for (at most 30 s) or a growing one, while it is busy."""
    for wait in (1.0, 2.0, 4.0, None):
        try:
            return call()
        except Exception as error:
            if wait is None or _status(error) not in (429, 500, 502, 503, 504):
                raise
            after = str(cast(Any, error).response.headers.get("Retry-After", ""))
            time.sleep(min(float(after), 30.0) if after.isdecimal() else wait)
    return None


def _status(error: Exception) -> int | None:
    """The HTTP status an exception of the client carries."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _describe(pull: Pull, name: str, commit: str) -> RemoteFile | None:
    """A file as a HEAD request describes it; None where the client has to fetch it: its hash is unknown, or it is too
    large for plain HTTP."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined,unused-ignore]

    url = hf_hub_url(pull.repo, name, revision=commit, endpoint=pull.endpoint)
    token = pull.token or False
    metadata = _with_retries(lambda: get_hf_file_metadata(url, token=token))
    etag, size = metadata.etag or "", metadata.size
    if len(etag) != 64 or any(c not in "0123456789abcdef" for c in etag) or size is None:
        return None
    if size > MAX_PLAIN_BYTES:
        return None
    headers = build_hf_headers(token=token, library_name="qwenrt")
    if urlsplit(metadata.location)[:2] != urlsplit(url)[:2]:
        headers.pop("authorization", None)  # the store of the bytes has its own signature in the address
    return RemoteFile(name, metadata.location, headers, size, etag, commit)


def _check_space(pull: Pull, files: list[RemoteFile], parts: Path) -> None:
    here = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # another process may be finishing it
            here += (parts / f"{file.sha256}.part").stat().st_size
    pull.check_space(sum(file.size for file in files) - here)


def _in_parallel(files: list[RemoteFile], fetch: Callable[[RemoteFile, threading.Event], None]) -> None:
    """Several files at once; the first failure, or Ctrl-C, stops the others and is raised."""
    stop = threading.Event()

    def guarded(file: RemoteFile) -> None:
        try:
            if stop.is_set():
                raise Stopped
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
    part, done = parts / f"{file.sha256}.part", store / file.sha256
    with _locked(part, file, stop):
        if is_there(done, CheckpointError):
            part.unlink(missing_ok=True)
            bar.add(file.size)
            return
        try:
            # closed before it is moved or deleted: Windows does neither to an open file
            with part.open("ab") as stream:
                _append(pull, file, stream, bar, stop)
        except _TooManyBytes:
            part.unlink()
            found = (
                f"{file.name}: more than the {file.size} bytes that were announced are sent; it was deleted"
            )
            pull.fail(found, _DAMAGED)
        except OSError as error:
            if "onsistency" in str(error):  # the client's error for a size other than the announced one
                part.unlink()
            raise
        if _sha256(part) != file.sha256:
            part.unlink()
            pull.fail(
                f"{file.name} ({file.size} bytes) does not match its hash; it was deleted",
                _DAMAGED,
            )
        (pull.cache_dir / "verified" / file.sha256).touch()
        part.replace(done)


@contextlib.contextmanager
def _locked(part: Path, file: RemoteFile, stop: threading.Event) -> Iterator[None]:
    """Hold the lock of a part; waiting for another process ends when ``stop`` is set."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{part}.lock")
    told = False
    while not lock.is_locked:
        if stop.is_set():
            raise Stopped
        try:
            lock.acquire(timeout=0.5)
        except Timeout:
            if not told:
                _log.warning("another process is fetching %s: waiting for it", file.name)
            told = True
    try:
        yield
    finally:
        lock.release()


def _append(pull: Pull, file: RemoteFile, stream: BinaryIO, bar: ByteBar, stop: threading.Event) -> None:
    """Append what is missing to ``stream``. While bytes arrive, a connection that was cut and an address that
    expired are each tried again: some versions of the client resume after neither, none after the second."""
    from huggingface_hub.file_download import http_get

    if stream.tell() > file.size:
        stream.seek(0)
        stream.truncate()
    bar.add(stream.tell())
    while (have := stream.tell()) < file.size:
        source = _describe(pull, file.name, file.commit) or file
        try:
            return http_get(
                source.url,
                cast(Any, _CountingFile(stream, file.size, bar, stop)),
                resume_size=have,
                headers=dict(source.headers),
                expected_size=file.size,
                _tqdm_bar=quiet_tqdm(False)(),
            )
        except Exception as error:
            if stream.tell() <= have or not (from_network(error) or _status(error) in (401, 403)):
                raise


class _TooManyBytes(Exception):
    """More bytes arrive than the file has."""


class _CountingFile:
    """The file that http_get writes to: counts bytes for the bar, writes them at once, and can be stopped."""

    def __init__(self, stream: BinaryIO, size: int, bar: ByteBar, stop: threading.Event) -> None:
        self._stream, self._size, self._bar, self._stop = stream, size, bar, stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        if self._stream.tell() + len(data) > self._size:
            raise _TooManyBytes
        written: int = self._stream.write(data)
        self._bar.add(len(data))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _sha256(path: Path, bar: ByteBar | None = None) -> str:
    digest = hashlib.sha256()
    with opened(path, CheckpointError) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            if bar is not None:
                bar.add(len(chunk))
    return digest.hexdigest()
