"""Reading JSON that nobody has vouched for: files, and single fields with their limits."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenrt.errors import ConfigError

logger = logging.getLogger("qwenrt")
MAX_JSON_BYTES = 64 * 2**20
LIMITS = {  # name -> largest value that any Qwen comes near; more is a damaged or hostile file
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "intermediate_size": 2**20,
    "kv_channels": 4096,
    "seq_length": 2**24,
    "max_position_embeddings": 2**24,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "moe_intermediate_size": 2**20,
    "shared_expert_intermediate_size": 2**20,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that nobody has vouched for. Raises ConfigError that names what it really is."""
    value = _read_value(path)
    if not isinstance(value, dict):
        raise ConfigError(
            f"reading {path}",
            f"a JSON {type(value).__name__}, not an object",
            "Put the model's own file in its place.",
        )
    return value


def read_json_list(path: Path) -> list[Any]:
    """The same for a file that holds a list."""
    value = _read_value(path)
    if not isinstance(value, list):
        raise ConfigError(
            f"reading {path}",
            f"a JSON {type(value).__name__}, not a list",
            "Put the model's own file in its place.",
        )
    return value


def _read_value(path: Path) -> Any:
    asked = f"reading {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ConfigError(
            asked,
            "no such file" if missing else f"{type(error).__name__}: {error.strerror}",
            "Is this a model directory? It needs config.json, the tokenizer and *.safetensors."
            if missing
            else "Check the file's permissions.",
        ) from error
    if len(raw) > MAX_JSON_BYTES:
        raise ConfigError(asked, f"more than {MAX_JSON_BYTES} bytes", "This is not a configuration file.")
    unlike = not_the_file(raw)
    if unlike:
        raise ConfigError(asked, *unlike)
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            asked,
            f"not valid JSON ({str(error)[:120]}) in {len(raw)} bytes",
            "Mend it there if it was edited; if it ends too early, the copy was cut off (`qwenrt pull` fetches it).",
        ) from error


def not_the_file(head: bytes) -> tuple[str, str] | None:
    """(found, remedy) where the first bytes of a file show that something else was saved in its place."""
    if not head.strip():
        return "an empty file", "The download did not finish: fetch the file again."
    if head.startswith(b"version https://git-lfs"):
        return (
            "a git-lfs pointer, not the file itself",
            "Run `git lfs install && git lfs pull` in the repository, or use `qwenrt pull`.",
        )
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML page, not the file itself",
            "A proxy or login page was saved in its place: fetch the file again.",
        )
    return None


def bad(where: str, name: str, value: object, wanted: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigError(f"reading {where}", f"{name} is {shown}", f"It must be {wanted}.")


def integer(
    config: Mapping[str, Any],
    name: str,
    where: str,
    low: int = 1,
    high: int | None = None,
    default: int | None = None,
) -> int:
    value = config.get(name, default)
    if value is None:
        if name in config and default is not None:
            return default
        raise ConfigError(
            f"reading {where}",
            f"no {name}",
            f"A config.json of this kind has one: add it, or check that {where} is this model's own file.",
        )
    high = LIMITS.get(name, 2**31) if high is None else high
    value = whole(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise bad(where, name, value, f"an integer from {low} to {high}")
    return value


def number(
    config: Mapping[str, Any],
    name: str,
    where: str,
    low: float,
    high: float,
    default: float,
    *,
    low_open: bool = False,
) -> float:
    value = config.get(name)
    value = default if value is None else value
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (low_open and value == low):
        raise bad(where, name, value, f"a number {'above' if low_open else 'from'} {low:g} to {high:g}")
    return float(value)


def boolean(config: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is int and value in (0, 1):
        value = bool(value)
    if not isinstance(value, bool):
        raise bad(where, name, value, "true or false")
    return value


def whole(value: object) -> object:
    """A float without a fraction, as tools write sizes that they computed (131072.0), as the integer it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def first_given(
    config: Mapping[str, Any], names: Sequence[str], where: str, default: Any = None, *, strict: bool = True
) -> Any:
    """The value of one setting that has several names, the first that is given (null: not given), or ``default``.

    Two names with different values: a ConfigError that names both or, unless ``strict``, a warning.
    """
    given = [(name, config[name]) for name in names if config.get(name) is not None]
    if not given:
        return default
    name, value = given[0]
    for other, second in given[1:]:
        if second != value:
            contradiction(where, f"{name} {value!r:.60}", f"{other} {second!r:.60}", strict=strict)
    return value


def contradiction(where: str, used: str, other: str, *, strict: bool) -> None:
    """One setting in two places that say different things: an error or, unless ``strict``, a warning; both named."""
    if strict:
        remedy = "They are one setting: keep the value that the model was made with."
        raise ConfigError(f"reading {where}", f"it says {used} and {other}", remedy)
    logger.warning("%s says %s and %s: the first is used", where, used, other)


def token_ids(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """One token id or a list of them; null, and what is below zero, as some tools write for none, are none."""
    value = config.get(name)
    ids = [whole(i) for i in value] if isinstance(value, list) else [] if value is None else [whole(value)]
    checked = [i for i in ids if type(i) is int and i < 2**31]
    if len(checked) < len(ids):
        raise bad(where, name, value, "a token id or a list of them")
    if any(i < 0 for i in checked):
        logger.warning("%s says %s %r: an id below zero counts as none", where, name, value)
    return tuple(i for i in checked if i >= 0)
