"""What whoever starts a server may choose. Checked when built; `qwenrt serve` has the same under the same names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from qwenrt.arguments import as_integer, as_number, flag
from qwenrt.errors import ConfigError, shown
from qwenrt.server.keys import HIGHEST_PRIORITY, Key, as_keys, as_path

MIB = 1 << 20
KIB = 1 << 10
# What each setting means: its help on the command line.
ABOUT: dict[str, str] = {
    "host": "the address to listen at; outside this machine's own (127.0.0.1, ::1, localhost) a key is needed",
    "port": "the port to listen at; 0 takes a free one, Ollama's clients look at 11434",
    "served_model_names": "names that the model goes by in replies and lists (default: its own)",
    "strict_model": "answer 404 to requests for other names, which are served as well where there are no adapters",
    "api_key_file": "a file of keys, one a line, that only its owner may read; SIGHUP reads it again",
    "allow_origins": "a web page's origin, such as https://chat.example.com, whose scripts may use the server",
    "allow_hosts": "a name, beside this machine's own, that clients may know the server by",
    "i_know_this_is_open": "listen to other machines without a key: whoever reaches the port may use the model",
    "max_queue": "requests that may wait for their turn; those beyond are told when to come again (429)",
    "queue_timeout": "seconds that a request may wait for its turn",
    "request_timeout": "seconds that an answer may take, from its turn to its end",
    "max_priority": "the highest priority that a request may have, 0 to 9",
    "drain": "seconds that running answers have to end when the server is stopped",
    "max_body": "bytes of a request's body, such as 8MiB",
    "max_header": "bytes of a request's header",
    "max_connections": "connections at the same time",
    "receive_seconds": "seconds in which a request must have come, as long as its body is slower than receive_rate",
    "receive_rate": "bytes a second that a body must come at when receive_seconds are over",
    "send_buffer": "bytes of an answer that may wait for its reader",
    "send_seconds": "seconds that a reader may leave them waiting before the request is cancelled",
    "share_prefixes": "let different keys use what was computed for each other; how fast an answer begins then tells "
    "what others have asked",
    "watchdog": "seconds that a step may take before the server says that it is not ready",
    "log_prompts": "write prompts and answers into the log",
    "metrics": "serve /metrics",
    "page": "serve the page for a browser at /",
    "adapter_directory": "let adapters in this directory, each a directory of its own, be loaded and unloaded at "
    "/v1/load_lora_adapter and /v1/unload_lora_adapter: by keys whose line says admin, or without keys by everybody on "
    "this machine (default: no such routes)",
}
# setting -> (least, most), for those that are whole numbers and those that may be parts of one
_WHOLE = {
    "port": (0, 65535),
    "max_queue": (0, 100_000),
    "max_priority": (0, HIGHEST_PRIORITY),
    "max_body": (KIB, 1 << 34),
    "max_header": (KIB, 16 * MIB),
    "max_connections": (1, 1_000_000),
    "receive_rate": (1, 1 << 34),
    "send_buffer": (KIB, 1 << 30),
}
_SECONDS = ("queue_timeout", "request_timeout", "drain", "receive_seconds", "send_seconds", "watchdog")
_LONGEST = 30 * 24 * 3600.0  # seconds
_FLAGS = ("strict_model", "i_know_this_is_open", "share_prefixes", "log_prompts", "metrics", "page")
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://[a-z0-9._~-]+(:[0-9]{1,5})?|[a-z][a-z0-9+.-]*://\[[0-9a-f:.]+\](:[0-9]{1,5})?"
)
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?\.?")


@dataclass(frozen=True)
class ServeSettings:
    """How a server behaves. What each field means is in ``ABOUT``; times are in seconds, sizes in bytes.

    Every field is checked when this is made. Raises ConfigError, which names the setting, what was given and what may
    be. ``api_keys`` are texts, which are hashed at once: neither this nor its repr knows them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    strict_model: bool = False
    api_keys: tuple[Key, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    i_know_this_is_open: bool = False
    max_queue: int = 64
    queue_timeout: float = 60.0
    request_timeout: float = 600.0
    max_priority: int = HIGHEST_PRIORITY
    drain: float = 30.0
    max_body: int = 8 * MIB
    max_header: int = 32 * KIB
    max_connections: int = 1024
    receive_seconds: float = 30.0
    receive_rate: int = 64 * KIB
    send_buffer: int = 256 * KIB
    send_seconds: float = 30.0
    share_prefixes: bool = False
    watchdog: float = 60.0
    log_prompts: bool = False
    metrics: bool = True
    page: bool = True
    adapter_directory: Path | None = None

    def __post_init__(self) -> None:
        for setting in fields(self):
            object.__setattr__(self, setting.name, _checked(setting.name, getattr(self, setting.name)))
        if not (self.loopback or self.has_keys or self.i_know_this_is_open):
            raise ConfigError(
                f"listening at {self.host}",
                "other machines reach it, and there is no API key",
                "Name a file of keys with --api-key-file, listen at 127.0.0.1, or say --i-know-this-is-open.",
            )

        if self.adapter_directory is not None and not (self.loopback or self.has_keys):
            raise ConfigError(
                f"adapter_directory={str(self.adapter_directory)!r:.120}",
                "other machines reach the server, and there is no API key: anybody could load and unload",
                "Name a file of keys with --api-key-file, one of them with `admin` behind it.",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_keys) or self.api_key_file is not None


def is_loopback(host: str) -> bool:
    """Whether a name or address is one of this machine's own."""
    if host.rstrip(".") == "localhost":
        return True
    address = as_address(host)
    mapped = getattr(address, "ipv4_mapped", None) or address
    return mapped is not None and mapped.is_loopback


def as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a text spells, in brackets or not; None where it is a name."""
    try:
        return ipaddress.ip_address(host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host)
    except ValueError:
        return None


_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": 1 << 30, "gib": 1 << 30}
_UNITS |= {"kb": 1000, "mb": 1000**2, "gb": 1000**3}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)")


def size(text: str) -> int:
    """Bytes as the command line says them: "8MiB", "64k", "1.5 GiB", "1000000". Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"a size of {shown(text)}", "not a number of bytes", "Write it like 8MiB or 8388608."
        )
    return round(float(match[1]) * unit)


def seconds(text: str) -> float:
    """A time as the command line says it: "30", "250ms", "1.5s", "10m", "1h". Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    unit = (
        {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}.get(match[2].lower())
        if match
        else None
    )
    if match is None or unit is None:
        raise ConfigError(f"a time of {shown(text)}", "not a time", "Write it like 30, 250ms or 10m.")
    return float(match[1]) * unit


def _checked(name: str, value: Any) -> Any:
    if name == "host":
        return _host(value)
    if name == "api_keys":
        return as_keys(value)
    if name in ("api_key_file", "adapter_directory"):
        return as_path(name, value)
    if name in _FLAGS:
        return flag(name, value, ConfigError)
    if name in _WHOLE:
        least, most = _WHOLE[name]
        number = as_integer(value)
        if number is None or not least <= number <= most:
            raise _bad(name, value, f"a whole number from {least} to {most}")
        return number
    if name in _SECONDS:
        time = as_number(value)
        if time is None or not (0 < time <= _LONGEST or (time == 0 and name == "drain")):
            raise _bad(name, value, f"a number of seconds above 0, at most {_LONGEST:.0f}")
        return time
    return {"served_model_names": _names, "allow_origins": _origins, "allow_hosts": _hosts}[name](name, value)


def _bad(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name}={shown(value)}", "not usable", f"It must be {expected}.")


def _host(value: object) -> str:
    text = value.strip().lower() if isinstance(value, str) else ""
    text = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
    if text != "localhost" and as_address(text) is None:  # a name would have to be looked up in the network
        raise _bad("host", value, "an address, such as 127.0.0.1, 0.0.0.0 or ::1, or localhost")
    return text


def _texts(name: str, value: object) -> list[str]:
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else None
    if values is None or not all(isinstance(text, str) and text.isprintable() for text in values):
        raise _bad(name, value, "a list of texts")
    return values


def _names(name: str, value: object) -> tuple[str, ...]:
    names = _texts(name, value)
    for text in names:
        if not 1 <= len(text.strip()) <= 256:
            raise _bad(name, text, "a name of 1 to 256 characters")
    return tuple(dict.fromkeys(names))


def _origins(name: str, value: object) -> tuple[str, ...]:
    origins = [text.strip().lower().rstrip("/") for text in _texts(name, value)]
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise _bad(
                name, origin, "an origin like https://chat.example.com:8443; there is no * for all of them"
            )
    return tuple(dict.fromkeys(origins))


def _hosts(name: str, value: object) -> tuple[str, ...]:
    hosts = [text.strip().lower() for text in _texts(name, value)]
    for host in hosts:
        if len(host) > 253 or not (_HOST_NAME.fullmatch(host) or as_address(host)):
            raise _bad(
                name, host, "a name like llm.example.com, without a port; there is no * for all of them"
            )
    return tuple(dict.fromkeys(host.strip("[]").rstrip(".") for host in hosts))
