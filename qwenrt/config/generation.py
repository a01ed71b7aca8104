"""generation_config.json: default sampling, the chat format and the end tokens of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenrt.config.fields import bad, boolean, integer, read_json, token_ids, whole
from qwenrt.errors import ConfigError, RequestError
from qwenrt.files import is_there
from qwenrt.sampling_params import SamplingParams

logger = logging.getLogger("qwenrt")
DEFAULT_MAX_WINDOW_SIZE = 6144  # the default of Qwen-1's first chat code


@dataclass(frozen=True)
class GenerationConfig:
    """Default sampling, the chat format and the end tokens of a checkpoint."""

    chat_format: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(top_p=0.8))

    @classmethod
    def from_dict(cls, generation: Mapping[str, Any]) -> GenerationConfig:
        where = "generation_config.json"
        chat_format = generation.get("chat_format")
        if chat_format not in (None, "chatml", "raw"):
            raise bad(where, "chat_format", chat_format, "'chatml' or 'raw'")
        stops = generation.get("stop_words_ids") or []
        if not isinstance(stops, list) or not all(isinstance(s, list) and s for s in stops):
            raise bad(where, "stop_words_ids", stops, "a list of non-empty lists of token ids")
        for token in (t for s in stops for t in s):
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise bad(where, "a token id", token, "an integer >= 0")
        return cls(
            chat_format=chat_format,
            eos_token_ids=token_ids(generation, "eos_token_id", where),
            max_window_size=integer(generation, "max_window_size", where, 1, 2**31, DEFAULT_MAX_WINDOW_SIZE),
            stop_words_ids=tuple(tuple(s) for s in stops),
            sampling=_sampling(generation, where),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> GenerationConfig:
        """Read generation_config.json; without one, the sampling settings of config.json, where old files have them;
        else the defaults."""
        path, fallback = Path(directory) / "generation_config.json", Path(directory) / "config.json"
        if is_there(path, ConfigError):
            return cls.from_dict(read_json(path))
        return (
            cls.from_dict(_sampling_settings(read_json(fallback)))
            if is_there(fallback, ConfigError)
            else cls()
        )


_RENAMED = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
# The defaults that tools wrote into old config.json files.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "do_sample": False}


def _sampling_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings of a config.json, without the defaults that tools write."""
    said = {name: config[name] for name in (*_RENAMED, "do_sample") if config.get(name) is not None}
    return {name: value for name, value in said.items() if _DEFAULTS.get(name) != value}


def _sampling(generation: Mapping[str, Any], where: str) -> SamplingParams:
    """The checkpoint's own sampling. Off are null everywhere, `top_k` and `max_new_tokens` 0 and below; do_sample false
    is greedy, and so is `top_p` 0, which keeps only the most likely token."""
    given: dict[str, Any] = {
        ours: whole(generation[key]) for key, ours in _RENAMED.items() if generation.get(key) is not None
    }
    for name in ("top_k", "max_tokens"):
        value = given.get(name)
        if type(value) is int and value <= 0:
            del given[name]
            if (name, value) != ("top_k", 0):
                logger.warning("%s says %s %r, which counts as not given", where, name, value)
    if given.get("top_p") in (0, 0.0) and type(given["top_p"]) in (int, float):
        logger.warning("%s says top_p 0, which keeps only the most likely token: sampling is greedy", where)
        del given["top_p"]
        given["top_k"] = 1
    if not boolean(generation, "do_sample", where, True):
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(
            f"reading {where}", str(error), "Check it against the repository's file."
        ) from error
