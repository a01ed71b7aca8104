"""From a name to a directory: local, built in, and through the real clients of two hubs that run on loopback."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwenrt.config import Environment
from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.checkpoint import open_checkpoint
from qwenrt.loader.hub import downloads, huggingface, modelscope
from qwenrt.loader.hub import resolve as hub_module
from qwenrt.loader.hub.pull import Unreachable
from qwenrt.loader.hub.resolve import resolve
from tests.loader.hub.stand_in_hub import COMMIT, Hub

REPO = "Qwen/Qwen-7B-Chat"
WEIGHTS = "model.safetensors"
BOTH = pytest.mark.parametrize("source", ["huggingface", "modelscope"])
NOWHERE = "http://127.0.0.1:9"  # nothing listens there

Start = Callable[..., Hub]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    model = Path(__file__).parents[2] / "golden" / "plain"
    wanted = {
        name: (model / name).read_bytes() for name in ("config.json", "generation_config.json", WEIGHTS)
    }
    code = b"raise SystemExit('code from a checkpoint must not run')"
    return {
        **wanted,
        "qwen.tiktoken": b"IQ== 0\n",
        "modeling_qwen.py": code,
        "pytorch_model.bin": b"\x80\x02.",
        "onnx/model.safetensors": b"another format of the weights",
        "1_Pooling/config.json": b"{}",
        "1_Pooling/model.safetensors": b"another model's weights",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "assets/vocab.txt": b"another model's words",
    }


@pytest.fixture
def start(files: dict[str, bytes]) -> Iterator[Start]:
    hubs: list[Hub] = []

    def begin(**faults: object) -> Hub:
        hubs.append(Hub(REPO, dict(files), **faults).start())  # type: ignore[arg-type]
        return hubs[-1]

    yield begin
    for hub in hubs:
        hub.stop()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' pauses between tries, shortened; pieces small enough for our small files."""
    import huggingface_hub.constants

    real = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: real(min(seconds, 0.01)))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    monkeypatch.setattr(
        "modelscope_hub._download_control._DownloadControl.sleep", lambda self, seconds: time.sleep(seconds)
    )


def env_of(tmp_path: Path, hub: Hub | str, token: str | None = None) -> Environment:
    url = hub if isinstance(hub, str) else hub.url
    return Environment(cache_dir=tmp_path / "cache", hf_endpoint=url, modelscope_endpoint=url, hf_token=token)


def fetch(tmp_path: Path, hub: Hub | str, source: str = "huggingface", **how: object) -> Path:
    name = str(how.pop("name", REPO))
    return resolve(name, source, env=env_of(tmp_path, hub), progress=False, **how)  # type: ignore[arg-type]


def failure(tmp_path: Path, hub: Hub | str, source: str = "huggingface", **how: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        fetch(tmp_path, hub, source, **how)
    assert error.value.asked and error.value.remedy
    return error.value


# ---- names


@pytest.mark.parametrize("name", ["with space", "中文目录", "v1.0.1", "Qwen"])
def test_a_local_directory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    assert resolve(str(tmp_path / name)) == resolve(tmp_path / name) == tmp_path / name
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == resolve(f"./{name}/") == tmp_path / name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(f"~/{name}") == tmp_path / name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("./none", "there is no such directory"),
        ("/none/at/all", "/ is the last part that exists"),
        ("~nobody-here/x", "nobody-here"),
        ("C:\\models\\qwen", "there is no such directory"),
        ("a/b/c", "there is no such directory"),
        ("https://huggingface.co/Qwen/Qwen-7B", "it is an address"),
        ("x" * 5000, "name too long"),
        ("a\0b", "not of the form"),
        ("", "that is not a name"),
        (None, "that is not a name"),
        (5, "that is not a name"),
    ],
)
def test_a_directory_that_is_not_there(name: object, found: str) -> None:
    with pytest.raises(CheckpointError) as error:
        resolve(name, offline=True)  # type: ignore[arg-type]
    assert found in str(error.value) and error.value.remedy


def test_a_misspelt_directory_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "Qwen-7B-Chat").mkdir()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="did you mean 'Qwen-7B-Chat'"):
        resolve(tmp_path / "Qwen-7B-Chta")
    with pytest.raises(CheckpointError, match=f"it is a file. Give the directory that holds it: {tmp_path}"):
        resolve(tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"model.gguf is not a valid GGUF file: it is an empty file"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name", ["Qwen-7B-Chta", "Qwen 7B", "a/..", "../b", "a/b--c", "a/b.git", "a/", "/b", "a/b?c", "名/名"]
)
def test_a_name_that_is_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        resolve(name, offline=True, env=env_of(tmp_path, NOWHERE))
    assert error.value.remedy
    if name == "Qwen-7B-Chta":
        assert "Did you mean Qwen-7B-Chat" in error.value.remedy


def test_other_arguments_out_of_range(tmp_path: Path) -> None:
    assert "Use one of auto, huggingface, modelscope" in str(failure(tmp_path, NOWHERE, "github"))
    for revision in ("../x", "a b", "", "-x", "a..b", 5, ["main"]):
        assert "not a branch, tag or commit" in str(failure(tmp_path, NOWHERE, revision=revision))


def test_the_demo_is_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "DEMO", tmp_path)
    with pytest.raises(CheckpointError, match=r"not in this installation.*Reinstall qwenrt"):
        resolve("demo")
    (tmp_path / "config.json").write_text("{}")
    assert resolve("demo") == tmp_path


# ---- fetching


@BOTH
def test_fetch_and_again_and_offline(
    tmp_path: Path, start: Start, files: dict[str, bytes], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start()
    directory = fetch(tmp_path, hub, source, name="qwen-7b-chat")
    assert sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()) == [
        "1_Pooling/config.json", "additional_chat_templates/tool_use.jinja",
        "config.json", "generation_config.json", WEIGHTS, "qwen.tiktoken",
    ]  # fmt: skip
    assert (directory / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert len(open_checkpoint(directory).tensors) == 27
    sent = dict(hub.sent)
    assert fetch(tmp_path, hub, source) == directory and hub.sent == sent  # nothing twice
    hub.stop()

    def no_socket(*args: object, **kwargs: object) -> None:
        raise AssertionError("offline opens no socket")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    assert fetch(tmp_path, hub, source, offline=True) == directory
    assert fetch(tmp_path, hub, "auto", offline=True) == directory
    error = failure(tmp_path, hub, "auto", offline=True, name="Qwen/Qwen-14B")
    assert "offline" in error.found and "there is: Qwen-7B-Chat" in error.found


@BOTH
def test_only_the_small_files(tmp_path: Path, start: Start, source: str) -> None:
    hub = start()
    directory = fetch(tmp_path, hub, source, weights=False)
    assert (directory / "qwen.tiktoken").exists() and not (directory / WEIGHTS).exists()
    error = failure(tmp_path, hub, source, offline=True)  # the weights are not here: not complete
    assert "not complete" in error.found
    assert (fetch(tmp_path, hub, source) / WEIGHTS).exists()


def test_the_environment_says_offline(tmp_path: Path) -> None:
    nowhere = {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path)}
    env = Environment.read({"QWENRT_HOME": str(tmp_path), "QWENRT_OFFLINE": "1", **nowhere})
    with pytest.raises(
        CheckpointError,
        match=r"offline, and there is no copy of it on this machine; there is: nothing.*or give the directory",
    ):
        resolve("Qwen-7B-Chat", env=env)


def test_a_mirror_is_asked_and_given_the_token(tmp_path: Path, start: Start) -> None:
    hub = start(gated=True)
    directory = resolve(REPO, "huggingface", env=env_of(tmp_path, hub, token="hf_secret"), progress=False)
    assert (directory / WEIGHTS).exists() and hub.gets(WEIGHTS)


@BOTH
def test_a_revision(tmp_path: Path, start: Start, source: str) -> None:
    hub = start()
    assert (fetch(tmp_path, hub, source, revision=COMMIT) / WEIGHTS).exists()
    error = failure(tmp_path, hub, source, revision="v9")
    assert "'v9'" in error.asked and "revision" in error.found and "404" in error.found


# ---- what goes wrong on the way


@BOTH
def test_a_cut_connection_is_resumed(
    tmp_path: Path, start: Start, files: dict[str, bytes], source: str
) -> None:
    size = len(files[WEIGHTS])
    hub = start(cut_after={WEIGHTS: 400_000})
    directory = fetch(tmp_path, hub, source)
    assert (directory / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert size <= hub.sent[WEIGHTS] < size + 60_000  # only the last piece is sent twice
    assert [r for r in hub.gets(WEIGHTS) if r[2].startswith("bytes=")]


@BOTH
def test_a_killed_download_is_resumed_by_the_next_process(
    tmp_path: Path, start: Start, files: dict[str, bytes], source: str
) -> None:
    hub = start(stall_after={WEIGHTS: 500_000})
    code = (
        "import sys; from pathlib import Path; from qwenrt.config import Environment\n"
        "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 50_000\n"
        "import modelscope_hub._download as d; d.DOWNLOAD_CHUNK_SIZE = 50_000\n"
        "from qwenrt.loader.hub.resolve import resolve; url = sys.argv[1]\n"
        "env = Environment(cache_dir=Path(sys.argv[2]), hf_endpoint=url, modelscope_endpoint=url)\n"
        f"resolve({REPO!r}, sys.argv[3], env=env)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, hub.url, str(tmp_path / "cache"), source], stderr=-3
    )
    assert hub.stalled.wait(200)
    deadline = time.monotonic() + 200
    while not _partial(tmp_path) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    child.kill()
    child.wait()
    # what is here is no model yet
    assert "not complete" in failure(tmp_path, hub, source, offline=True).found
    before = hub.sent.pop(WEIGHTS)
    assert before == 500_000
    directory = fetch(tmp_path, hub, source)
    assert (directory / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.sent[WEIGHTS] <= len(files[WEIGHTS]) - 400_000


def _partial(tmp_path: Path) -> bool:
    """Whether some process has written 400 kB of an unfinished file."""
    found = [*(tmp_path / "cache").rglob("*.part"), *(tmp_path / "cache").rglob("*.incomplete")]
    for path in found:
        with contextlib.suppress(FileNotFoundError):  # a small file that was finished meanwhile
            if path.stat().st_size >= 400_000:
                return True
    return False


def test_an_address_that_runs_out_is_asked_for_again(
    tmp_path: Path, start: Start, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed addresses hold for about an hour: a large model waits longer for its turn, or takes longer."""
    hub = start(signed=True, cut_after={WEIGHTS: 400_000})
    real = downloads._check_space

    def much_later(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        hub.period += 1

    monkeypatch.setattr(downloads, "_check_space", much_later)
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(hub, "period", hub.period + 1))
    directory = fetch(tmp_path, hub)
    assert (directory / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert hub.sent[WEIGHTS] < len(files[WEIGHTS]) + 60_000


def test_a_part_that_is_too_long_is_begun_again(
    tmp_path: Path, start: Start, files: dict[str, bytes]
) -> None:
    part = tmp_path / "cache" / "huggingface" / "parts" / f"{hashlib.sha256(files[WEIGHTS]).hexdigest()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(files[WEIGHTS]) + 1))
    assert (fetch(tmp_path, start()) / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at the open files of Linux")
def test_a_file_is_closed_before_it_is_moved_or_deleted(
    tmp_path: Path, start: Start, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows wants it."""

    def closed(method: Callable[..., object]) -> Callable[..., object]:
        def call(self: Path, *args: object, **kwargs: object) -> object:
            opened = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
            assert os.path.realpath(self) not in opened
            return method(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Path, "replace", closed(Path.replace))
    monkeypatch.setattr(Path, "unlink", closed(Path.unlink))
    hub = start(altered={WEIGHTS: bytes(len(files[WEIGHTS]))})
    assert "does not match its hash" in failure(tmp_path, hub).found
    hub.altered = {WEIGHTS: bytes(500)}
    assert "wrong size" in failure(tmp_path, hub).found
    hub.altered.clear()
    assert (fetch(tmp_path, hub) / WEIGHTS).exists()


def test_who_waits_for_another_process_can_be_stopped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = downloads.RemoteFile("one.safetensors", "", {}, 5, "00", COMMIT)
    never, stop = threading.Event(), threading.Event()
    outcome: list[str] = []

    def wait() -> None:
        try:
            with downloads._locked(tmp_path / "00.part", file, stop):
                outcome.append("held")
        except downloads.Stopped:
            outcome.append("stopped")

    with downloads._locked(tmp_path / "00.part", file, never):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not outcome
        stop.set()
        thread.join(200)
    assert outcome == ["stopped"] and "waiting for it" in caplog.text
    stop.clear()
    wait()
    assert outcome == ["stopped", "held"]


def test_files_that_were_not_begun_are_not_after_a_failure() -> None:
    begun: list[str] = []

    def fetch_one(file: downloads.RemoteFile, stop: threading.Event) -> None:
        begun.append(file.name)
        raise ValueError(file.name)

    files = [downloads.RemoteFile(str(i), "", {}, 5, "00", COMMIT) for i in range(50)]
    with pytest.raises(ValueError, match=r"\d"):
        downloads._in_parallel(files, fetch_one)
    assert len(begun) <= downloads.PARALLEL


def test_a_file_too_large_for_plain_http_is_left_to_the_client(
    tmp_path: Path, start: Start, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "MAX_PLAIN_BYTES", len(files[WEIGHTS]) - 1)
    assert (fetch(tmp_path, start()) / WEIGHTS).read_bytes() == files[WEIGHTS]
    assert not (tmp_path / "cache" / "huggingface" / "parts").exists()


def test_more_bytes_than_announced_are_not_kept(
    tmp_path: Path, start: Start, files: dict[str, bytes]
) -> None:
    hub = start(excess=30_000_000)
    error = failure(tmp_path, hub)
    assert f"more than the {len(files[WEIGHTS])} bytes" in error.found and "endpoint" in error.remedy
    kept = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert max(kept) <= len(files[WEIGHTS])
    hub.excess = 0
    assert (fetch(tmp_path, hub) / WEIGHTS).read_bytes() == files[WEIGHTS]


@BOTH
@pytest.mark.parametrize("kind", ["short", "same size"])
def test_contents_that_are_not_what_was_promised(
    tmp_path: Path, start: Start, files: dict[str, bytes], source: str, kind: str
) -> None:
    bad = b"x" * (500 if kind == "short" else len(files[WEIGHTS]))
    hub = start(altered={WEIGHTS: bad})
    error = failure(tmp_path, hub, source)
    assert any(word in error.found for word in ("wrong size", "damaged", "does not match its hash"))
    assert not [p for p in (tmp_path / "cache").rglob(WEIGHTS) if p.exists()]
    hub.altered.clear()
    assert (fetch(tmp_path, hub, source) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_small_file_that_was_changed_on_the_way(
    tmp_path: Path, start: Start, files: dict[str, bytes]
) -> None:
    hub = start(altered={"config.json": files["config.json"].replace(b"512", b"513")})
    assert "config.json" in failure(tmp_path, hub).found
    hub.altered.clear()
    assert (fetch(tmp_path, hub) / "config.json").read_bytes() == files["config.json"]


@BOTH
def test_no_such_repository(tmp_path: Path, start: Start, source: str) -> None:
    error = failure(tmp_path, start(), source, name="Qwen/Qwen-8B")
    assert "there is no such repository" in error.found and "Check the spelling" in error.remedy
    assert not list((tmp_path / "cache").rglob("config.json"))


@BOTH
def test_gated(tmp_path: Path, start: Start, source: str) -> None:
    error = failure(tmp_path, start(gated=True), source)
    assert "gated" in error.found
    assert ("HF_TOKEN" in error.remedy and "licence" in error.remedy) or source == "modelscope"


@BOTH
def test_too_many_requests(tmp_path: Path, start: Start, source: str) -> None:
    hub = start(statuses=[429, 429], api_statuses=[429])
    assert (fetch(tmp_path, hub, source) / WEIGHTS).exists()
    busy = start(statuses=[429] * 200, api_statuses=[429] * 200)
    error = failure(tmp_path / "other", busy, source)
    assert "429" in error.found
    assert len(busy.requests) <= 40  # tries are bounded


@BOTH
def test_a_repository_without_a_model(tmp_path: Path, start: Start, source: str) -> None:
    hub = start()
    del hub.files[WEIGHTS]
    assert "pickled" in str(failure(tmp_path, hub, source)) or "none of its" in str(
        failure(tmp_path, hub, source)
    )
    del hub.files["config.json"]
    assert "no config.json" in failure(tmp_path / "other", hub, source).found


@BOTH
def test_a_login_page_in_place_of_the_hub(tmp_path: Path, start: Start, source: str) -> None:
    assert isinstance(failure(tmp_path, start(portal=True), source), Unreachable)


@BOTH
def test_a_hub_that_redirects_in_circles(tmp_path: Path, start: Start, source: str) -> None:
    hub = start(circular=True)
    assert isinstance(failure(tmp_path, hub, source), CheckpointError)
    assert len(hub.requests) <= 200


@BOTH
def test_a_hub_whose_encryption_fails(tmp_path: Path, start: Start, source: str) -> None:
    error = failure(tmp_path, start().url.replace("http://", "https://"), source)
    assert isinstance(error, Unreachable) and error.remedy


@BOTH
def test_nobody_answers(tmp_path: Path, source: str) -> None:
    error = failure(tmp_path, NOWHERE, source)
    assert isinstance(error, Unreachable) and NOWHERE in error.found and "_ENDPOINT" in error.remedy


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_that_accepts_and_says_nothing(
    tmp_path: Path, weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    outcome: list[CheckpointError] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        thread = threading.Thread(
            target=lambda: outcome.append(failure(tmp_path, where, weights=weights)), daemon=True
        )
        thread.start()
        thread.join(200)
    assert [type(error) for error in outcome] == [Unreachable]


def test_a_firewall_is_not_taken_for_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    for source in ("huggingface", "modelscope"):
        error = failure(tmp_path, NOWHERE, source)
        assert isinstance(error, Unreachable), str(error)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_cache_filled_by_another_tool(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """Its files are not noted as verified; they are verified, and noted where that can be written."""
    hub = start()
    directory = fetch(tmp_path, hub)
    shutil.rmtree(tmp_path / "cache" / "huggingface" / "verified")
    real = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        if self.name == "verified" and read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert fetch(tmp_path, hub) == directory
    assert (tmp_path / "cache" / "huggingface" / "verified").exists() != read_only


def test_a_file_that_cannot_be_verified(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start()
    fetch(tmp_path, hub)
    shutil.rmtree(tmp_path / "cache" / "huggingface" / "verified")

    def digest(*args: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(huggingface, "_digest", digest)
    assert "Input/output error" in failure(tmp_path, hub).found


def test_both_failures_are_told_where_the_second_hub_has_not_the_model(tmp_path: Path, start: Start) -> None:
    env = Environment(cache_dir=tmp_path, hf_endpoint=NOWHERE, modelscope_endpoint=start().url)
    with pytest.raises(CheckpointError) as error:
        resolve("someone/their-model", env=env, progress=False)
    assert "404" in error.value.found and NOWHERE in error.value.found and "HuggingFace" in error.value.found


def test_the_advice_is_for_the_hub_that_was_asked(tmp_path: Path) -> None:
    error = failure(tmp_path, NOWHERE, "modelscope")
    assert "MODELSCOPE_ENDPOINT" in error.remedy and "source='huggingface'" in error.remedy
    assert "ConnectionRefusedError: [Errno 111]" in error.found and "Max retries" not in error.found


@BOTH
def test_what_is_here_serves_when_nobody_answers(
    tmp_path: Path, start: Start, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = fetch(tmp_path, start(), source)
    assert fetch(tmp_path, NOWHERE, source) == directory


def test_modelscope_where_huggingface_is_unreachable(tmp_path: Path, start: Start) -> None:
    hub = start()
    env = Environment(cache_dir=tmp_path, hf_endpoint=NOWHERE, modelscope_endpoint=hub.url)
    directory = resolve("Qwen-7B-Chat", env=env, progress=False)
    assert directory.is_relative_to(tmp_path / "modelscope") and (directory / WEIGHTS).exists()
    error = failure(tmp_path / "x", NOWHERE, "auto")
    assert "ModelScope" in error.found and "source=" not in error.remedy  # both were asked


def test_modelscope_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "installed", lambda: False)
    assert "pip install 'qwenrt[modelscope]'" in failure(tmp_path, NOWHERE, "modelscope").remedy
    assert "ModelScope was not tried: pip install" in failure(tmp_path, NOWHERE, "auto").found


def test_a_missing_repository_is_not_looked_for_elsewhere(tmp_path: Path, start: Start) -> None:
    hub = start()
    failure(tmp_path, hub, "auto", name="Qwen/Qwen-8B")
    assert not [r for r in hub.requests if "/api/v1/" in r[1]]


@BOTH
def test_the_disk_is_full(tmp_path: Path, start: Start, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open

    class Full:
        def __init__(self, stream: object) -> None:
            self._stream = stream

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: object) -> None:
            self._stream.close()  # type: ignore[attr-defined]

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opening(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        stream = real(path, mode, *args, **kwargs)  # type: ignore[call-overload]
        return (
            Full(stream) if str(path).endswith((".part", ".incomplete")) and mode in ("ab", "wb") else stream
        )

    monkeypatch.setattr("builtins.open", opening)
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: opening(self, mode, *a, **k))
    error = failure(tmp_path, start(), source)
    assert "no space left on the disk" in error.found and "QWENRT_HOME" in error.remedy
    assert not [p for p in (tmp_path / "cache").rglob(WEIGHTS) if p.exists()]


def test_too_little_space_is_seen_before(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = start()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    error = failure(tmp_path, hub)
    assert "GiB are still to be fetched" in error.found and WEIGHTS not in hub.sent


@BOTH
def test_a_cache_that_cannot_be_written(tmp_path: Path, start: Start, source: str) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    error = failure(tmp_path, start(), source)
    assert "cannot be written" in error.found and "QWENRT_HOME" in error.remedy


@BOTH
def test_two_at_once(tmp_path: Path, start: Start, files: dict[str, bytes], source: str) -> None:
    hub = start(delay=0.2)
    code = (
        "import sys; from pathlib import Path; from qwenrt.config import Environment\n"
        "from qwenrt.loader.hub.resolve import resolve; url = sys.argv[1]\n"
        "env = Environment(cache_dir=Path(sys.argv[2]), hf_endpoint=url, modelscope_endpoint=url)\n"
        f"print(resolve({REPO!r}, sys.argv[3], env=env))"
    )
    command = [sys.executable, "-c", code, hub.url, str(tmp_path / "cache"), source]
    children = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    results = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    (first, said), (second, _) = results
    assert first == second and "modelscope_hub" not in said  # the client's own lines
    data = (Path(first.strip()) / WEIGHTS).read_bytes()
    assert hashlib.sha256(data).digest() == hashlib.sha256(files[WEIGHTS]).digest()
    assert hub.sent[WEIGHTS] == len(data)  # the second waited for the first


def test_no_bar_where_nobody_looks(tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(tmp_path, start())
    assert capfd.readouterr() == ("", "")
    resolve(REPO, "huggingface", env=env_of(tmp_path / "b", start()), progress=True)
    assert "downloading weights" in capfd.readouterr().err
