"""Reading untrusted JSON: files, and single fields with their limits."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenrt.errors import ConfigError, QwenrtError, shown
from qwenrt.files import read_downloaded

logger = logging.getLogger("qwenrt")
MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = (
    100  # whatever is made of it later, be it an error that shows it, stays within Python's stack
)
MAX_JSON_VALUES = 4 * 10**6  # a tokenizer.json of 250,000 tokens and merges has 1.3 million
_SERVERS_WORDS = {
    *("error", "errors", "message", "msg", "detail", "details", "code", "status", "statuscode", "success"),
    *("reason", "type", "title", "timestamp", "path", "url", "data", "requestid", "request_id"),
    *("error_code", "error_type", "error_description", "documentation_url"),
}
_SAYS_WHAT = ("error", "errors", "message", "msg", "detail", "error_description")
_CLOSELY = 1 << 20  # bytes at once
_MARKS = (b",", b":", b"[", b"{")  # one of these stands before every value and key
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
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_key_head_dim": 4096,
    "linear_value_head_dim": 4096,
    "linear_conv_kernel_dim": 64,
}


def read_json(path: Path, kind: type[QwenrtError] = ConfigError) -> dict[str, Any]:
    """A JSON object from an untrusted file. Raises ``kind``, which says what the file really is."""
    value = _read_value(path, kind)
    if not isinstance(value, dict):
        raise kind(
            f"reading {path}",
            f"a JSON {type(value).__name__}, not an object",
            "Put the model's own file in its place.",
        )
    return value


def read_json_list(path: Path) -> list[Any]:
    """The same for a file that holds a list."""
    value = _read_value(path, ConfigError)
    if not isinstance(value, list):
        raise ConfigError(
            f"reading {path}",
            f"a JSON {type(value).__name__}, not a list",
            "Put the model's own file in its place.",
        )
    return value


def _read_value(path: Path, kind: type[QwenrtError]) -> Any:
    asked = f"reading {path}"
    raw = read_downloaded(
        path,
        MAX_JSON_BYTES,
        kind,
        missing="Is this a model directory? It needs config.json, the tokenizer and *.safetensors.",
        what="configuration file",
    )
    try:
        value = parse_json(raw, twice=_Twice(path) if len(raw) <= _CLOSELY else None)
    except ValueError as error:
        raise kind(
            asked,
            f"not valid JSON ({str(error)[:120]}) in {len(raw)} bytes",
            "Correct it there if it was edited; if it ends too early, it was truncated (`qwenrt pull` fetches it).",
        ) from error
    said = _server_error(value) if isinstance(value, dict) else None
    if said is not None:
        found = f"a server's answer instead of the file: {said}"
        raise kind(asked, found, "Delete it and fetch the file again.")
    return value


class _Twice:
    """Makes the objects of a file; a name that has two values, of which readers take the last, is worth a warning."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            for name, value in pairs:
                if value != made[name]:
                    used = f"{name} {shown(made[name], 60)}"
                    contradiction(str(self.path), used, f"before that {shown(value, 60)}", strict=False)
        return made


def parse_json(raw: bytes, most: int = MAX_JSON_VALUES, twice: _Twice | None = None) -> Any:
    """The value of JSON text in UTF-8. ValueError for anything else, for more than ``most`` values, and for nesting
    that Python's reader does not follow; what is made takes at most about 64 bytes a value, beside the text.
    ``twice``: makes the objects, where one is to look at them."""
    if has_more_values(raw, most):
        raise ValueError(f"more than {most} values")
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=twice)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_DEPTH:
        level = [value]
        for _ in range(MAX_JSON_DEPTH):
            inside = (each.values() if isinstance(each, dict) else each for each in level)
            level = [each for values in inside for each in values if isinstance(each, (dict, list))]
            if not level:
                return value
        raise ValueError("nested too deeply")
    return value


def has_more_values(raw: bytes, most: int) -> bool:
    """Whether JSON text holds more than ``most`` values, told from its punctuation before anything is made of it."""
    if sum(map(raw.count, _MARKS)) <= most:
        return False
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # every quote left begins or ends a string
    return _has_more_marks(plain, most)


def _has_more_marks(plain: bytes, most: int) -> bool:
    """Whether more than ``most`` of _MARKS stand outside of strings, where every quote begins or ends one."""
    import numpy as np  # imported here, as few files need it

    count, inside = 0, False
    for start in range(0, len(plain), _CLOSELY):
        piece = np.frombuffer(plain, np.uint8, min(_CLOSELY, len(plain) - start), start)
        within = np.logical_xor.accumulate(piece == ord('"')) ^ inside
        inside = bool(within[-1])
        for mark in _MARKS:
            count += int(np.count_nonzero((piece == mark[0]) & ~within))
        if count > most:
            return True
    return False


def _server_error(value: dict[str, Any]) -> str | None:
    """The message of a server's error that was saved in place of the file."""
    names = {name.lower(): name for name in value}
    if not names or not names.keys() <= _SERVERS_WORDS:
        return None
    said = next((value[names[name]] for name in _SAYS_WHAT if name in names), None)
    return None if said is None else shown(said)


def bad(where: str, name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"reading {where}", f"{name} is {shown(value)}", f"It must be {wanted}.")


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
            f"A file of this kind has one: add it, or check that {where} is this model's own file.",
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
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not low <= value <= high or (low_open and value == low):  # NaN is in no range
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
