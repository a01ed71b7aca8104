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
    backend: str | None = None  # QWENRT_BACKEND: what device="auto" means
    num_threads: int | None = None  # QWENRT_NUM_THREADS: CPU threads of our kernels and of torch
    kernels: str = "auto"  # QWENRT_KERNELS: auto | off | an instruction set that doctor names
    activations: str = "auto"  # QWENRT_ACTIVATIONS: auto | exact | int16 | int8, what load's "auto" means
    packed_cache: Path | None = None  # QWENRT_PACKED_CACHE: 1 (in QWENRT_HOME) or a directory
    openai_api_key: str | None = (
        None  # OPENAI_API_KEY: what `bench serve` shows to the server that it measures
    )

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        env = os.environ if environ is None else environ
        threads = env.get("QWENRT_NUM_THREADS")
        if threads and not (threads.isdecimal() and 1 <= int(threads) <= 1024):
            raise ConfigError("QWENRT_NUM_THREADS", f"is {threads!r}", "Set a number of threads, 1 to 1024.")
        home = env.get("QWENRT_HOME")
        cache_dir = Path(home).expanduser() if home else Path.home() / ".cache" / "qwenrt"
        return cls(
            cache_dir=cache_dir,
            hf_endpoint=env.get("HF_ENDPOINT") or None,
            hf_token=env.get("HF_TOKEN") or None,
            modelscope_endpoint=env.get("MODELSCOPE_ENDPOINT") or None,
            offline=any(_truthy(env.get(k)) for k in ("QWENRT_OFFLINE", "HF_HUB_OFFLINE")),
            backend=env.get("QWENRT_BACKEND") or None,
            num_threads=int(threads) if threads else None,
            kernels=env.get("QWENRT_KERNELS", "auto") or "auto",
            activations=env.get("QWENRT_ACTIVATIONS", "auto") or "auto",
            packed_cache=packed_cache_in(env.get("QWENRT_PACKED_CACHE"), cache_dir),
            openai_api_key=env.get("OPENAI_API_KEY") or None,
        )


def packed_cache_in(value: str | bool | os.PathLike[str] | None, cache_dir: Path) -> Path | None:
    """The directory that a setting means: a directory, yes or no; None for none."""
    text = str(int(value)) if isinstance(value, bool) else value
    text = "" if text is None else os.fspath(text) if isinstance(text, os.PathLike) else text
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError("packed_cache", f"got {shown(value)}", "Pass True, False or a directory.")
    text = text.strip()
    if text.lower() in ("", "0", "false", "no", "off"):
        return None
    try:
        os.fsencode(text)
        return cache_dir / "packed" if _truthy(text) else Path(text).expanduser()
    except (RuntimeError, ValueError) as error:  # no such home; no name that a file can have
        raise ConfigError("packed_cache", f"got {shown(value)}: {error}", "Pass a directory.") from error


def _truthy(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "on")
