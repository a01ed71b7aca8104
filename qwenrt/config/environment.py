"""The only reader of environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwenrt.errors import ConfigError, shown


@dataclass(frozen=True)
class Environment:
    """Every environment variable qwenrt looks at. Nothing else in the package reads os.environ."""

    cache_dir: Path  # QWENRT_HOME: downloads and caches
    hf_endpoint: str | None = None  # HF_ENDPOINT: a mirror of huggingface.co
    hf_token: str | None = None  # HF_TOKEN: for gated or private repositories
    modelscope_endpoint: str | None = None  # MODELSCOPE_ENDPOINT
    offline: bool = False  # QWENRT_OFFLINE or HF_HUB_OFFLINE: never open a socket
    hf_cache: Path | None = None  # HF_HUB_CACHE, or hub in HF_HOME: where HuggingFace's own tools keep models
    modelscope_cache: Path | None = None  # MODELSCOPE_CACHE: where ModelScope's keep them
    backend: str | None = None  # QWENRT_BACKEND: what device="auto" means
    num_threads: int | None = None  # QWENRT_NUM_THREADS: CPU threads of our kernels and of torch
    kernels: str = "auto"  # QWENRT_KERNELS: auto | off | an instruction set | nz, plain (NPU)
    activations: str = "auto"  # QWENRT_ACTIVATIONS: auto | exact | int16 | int8, what load's "auto" means
    packed_cache: Path | None = None  # QWENRT_PACKED_CACHE: 1 (in QWENRT_HOME) or a directory
    openai_api_key: str | None = None  # OPENAI_API_KEY: shown by `bench serve` to the server that it measures
    history: Path | None = None  # QWENRT_HISTORY: what `qwenrt chat` keeps; 0 for nothing, 1 or a directory

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        env = os.environ if environ is None else environ
        threads = env.get("QWENRT_NUM_THREADS")
        if threads and not (threads.isdecimal() and 1 <= int(threads) <= 1024):
            raise ConfigError("QWENRT_NUM_THREADS", f"is {threads!r}", "Set a number of threads, 1 to 1024.")
        cache_dir = _expanded(env.get("QWENRT_HOME") or "~/.cache/qwenrt")
        if cache_dir is None:
            found = f"is {shown(env.get('QWENRT_HOME'))}, and this user has no such home directory"
            raise ConfigError("QWENRT_HOME", found, "Set it to a directory for downloads and caches.")
        return cls(
            cache_dir=cache_dir,
            hf_endpoint=env.get("HF_ENDPOINT") or None,
            hf_token=env.get("HF_TOKEN") or None,
            modelscope_endpoint=env.get("MODELSCOPE_ENDPOINT") or None,
            offline=any(_truthy(env.get(k)) for k in ("QWENRT_OFFLINE", "HF_HUB_OFFLINE")),
            hf_cache=_hf_cache(env),
            modelscope_cache=_expanded(env.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"),
            backend=env.get("QWENRT_BACKEND") or None,
            num_threads=int(threads) if threads else None,
            kernels=env.get("QWENRT_KERNELS", "auto") or "auto",
            activations=env.get("QWENRT_ACTIVATIONS", "auto") or "auto",
            packed_cache=packed_cache_in(env.get("QWENRT_PACKED_CACHE"), cache_dir),
            openai_api_key=env.get("OPENAI_API_KEY") or None,
            history=_history(env),
        )


def _hf_cache(env: Mapping[str, str]) -> Path | None:
    """The directory of HuggingFace's own tools, by their variables in their order."""
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    return _expanded(named or os.path.join(home, "hub"))


def _expanded(text: str) -> Path | None:
    """A directory whose name may begin with ~; None for a user without a home, as some containers have."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return None


def of_process() -> dict[str, str]:
    """All of this process's variables, for one that it starts."""
    return dict(os.environ)


def set_for_process(variables: Mapping[str, str]) -> None:
    """From now on, for this process and those that it starts."""
    os.environ.update(variables)


@dataclass(frozen=True)
class Console:
    """What the terminal may be sent beside text. Read apart from the Environment, whose errors are told through it."""

    escapes: bool = True  # sequences that move the cursor or clear the screen: not where TERM is dumb
    styles: bool = True  # colours and bold letters: not there either, nor where NO_COLOR is set

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Console:
        env = os.environ if environ is None else environ
        escapes = env.get("TERM", "") != "dumb"
        return cls(escapes, escapes and not env.get("NO_COLOR"))


def _history(env: Mapping[str, str]) -> Path | None:
    """Where conversations are kept: in the user's directory for the state of programs, unless it is said otherwise."""
    said = env.get("QWENRT_HISTORY", "").strip()
    if _falsy(said):
        return None
    if said and not _truthy(said):
        directory = _expanded(said)
        if directory is None:
            found = f"is {shown(said)}, and there is no such home directory"
            raise ConfigError("QWENRT_HISTORY", found, "Set it to a directory, or to 0 to keep nothing.")
        return directory
    state = _expanded(env.get("XDG_STATE_HOME") or env.get("LOCALAPPDATA") or "~/.local/state")
    return None if state is None else state / "qwenrt"


def packed_cache_in(value: str | bool | os.PathLike[str] | None, cache_dir: Path) -> Path | None:
    """The directory that a setting means: a directory, yes or no; None for none."""
    text = str(int(value)) if isinstance(value, bool) else value
    text = "" if text is None else os.fspath(text) if isinstance(text, os.PathLike) else text
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError("packed_cache", f"got {shown(value)}", "Pass True, False or a directory.")
    text = text.strip()
    if not text or _falsy(text):
        return None
    try:
        os.fsencode(text)
        return cache_dir / "packed" if _truthy(text) else Path(text).expanduser()
    except (RuntimeError, ValueError) as error:  # no such home; no name that a file can have
        raise ConfigError("packed_cache", f"got {shown(value)}: {error}", "Pass a directory.") from error


def _truthy(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "on")


def _falsy(value: str) -> bool:
    return value.strip().lower() in ("0", "false", "no", "off")
