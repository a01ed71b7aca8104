"""generation_config.json: how a checkpoint wants to be sampled, prompted and stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenrt.config.fields import bad, boolean, integer, read_json
from qwenrt.errors import ConfigError, RequestError
from qwenrt.sampling_params import SamplingParams

DEFAULT_MAX_WINDOW_SIZE = 6144  # what Qwen-1's first chat code used where none was given


@dataclass(frozen=True)
class GenerationConfig:
    """generation_config.json: how the checkpoint wants to be sampled, prompted and stopped."""

    chat_format: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(top_p=0.8))

    @classmethod
    def from_dict(cls, generation: Mapping[str, Any]) -> GenerationConfig:
        where = "generation_config.json"
        chat_format = generation.get("chat_format")
        if chat_format not in (None, "chatml", "raw"):
            raise bad(where, "chat_format", chat_format, "'chatml' or 'raw'")
        eos = generation.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        stops = generation.get("stop_words_ids") or []
        if not isinstance(stops, list) or not all(isinstance(s, list) and s for s in stops):
            raise bad(where, "stop_words_ids", stops, "a list of non-empty lists of token ids")
        pad = generation.get("pad_token_id")
        for token in [*eos_ids, *([] if pad is None else [pad]), *(t for s in stops for t in s)]:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise bad(where, "a token id", token, "an integer >= 0")
        return cls(
            chat_format=chat_format,
            eos_token_ids=tuple(eos_ids),
            pad_token_id=pad,
            max_window_size=integer(generation, "max_window_size", where, 1, 2**31, DEFAULT_MAX_WINDOW_SIZE),
            stop_words_ids=tuple(tuple(s) for s in stops),
            sampling=_sampling(generation, where),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> GenerationConfig:
        """Read generation_config.json; a directory without one gets the defaults."""
        path = Path(directory) / "generation_config.json"
        return cls.from_dict(read_json(path)) if path.exists() else cls()


def _sampling(generation: Mapping[str, Any], where: str) -> SamplingParams:
    """The checkpoint's own sampling; `top_k` 0 or null is off, do_sample false is greedy."""
    renamed = {
        "temperature": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
    given = {ours: generation[key] for key, ours in renamed.items() if generation.get(key) is not None}
    if not boolean(generation, "do_sample", where, True):
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(
            f"reading {where}", str(error), "Check it against the repository's file."
        ) from error
