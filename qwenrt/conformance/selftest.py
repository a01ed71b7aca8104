"""A whole model on a device beside what its definitions give on a CPU, which was written down before.

What is kept of the logits is a digest: the likeliest tokens with their values, and sums over the whole vocabulary with
weights that go up and down, so that no part of it can be wrong unseen. And the tokens of greedy answers, each with how
far it was ahead of the next one: two that are as likely may be either.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qwenrt.demo
from qwenrt.backends.selfcheck import TOLERANCE
from qwenrt.config import Environment
from qwenrt.config.fields import read_json
from qwenrt.errors import CheckpointError, ConfigError
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with
from qwenrt.sampling_params import SamplingParams

DEMO = Path(qwenrt.demo.__file__).parent / "selftest.json"
VERSION = 1
TEXTS = (
    "What is the capital of France?",
    "你好，请给我讲一个关于小猫的故事。",
    "7 + 5 = ",
    "法国的首都是哪里？ The answer is",
    "“引号”、全角，。！？ and half-width, all in one line: ①②③ 𠮷 é ñ",
    "从前有一座山，山里有一座庙。Once upon a time there was a hill, and on it a house. " * 24,
)
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "int8 weights": {"quantize": "int8"},
    "int4 weights": {"quantize": "int4"},
    "int8 cache": {"kv_cache_dtype": "int8"},
}
_CONTEXT = 1024
_NEW = 16  # tokens of each answer
_BEST = 5
_WAVES = (1.0, 2.3, 0.1)
# Some layers make more of what single operations are allowed (backends/selfcheck.py).
_LAYERS_ADD = 5.0


@dataclass(frozen=True)
class Finding:
    """One text in one way to load. ``error``: the largest difference of logits, relative to the largest of them;
    ``wrong``: what is, or nothing."""

    way: str
    text: int
    error: float
    allowed: float
    wrong: str


def record(model: str, note: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """What a model's definitions give on this CPU in float32, in each way to load that it has, ready for JSON."""
    ways = {}
    for name, options in WAYS.items():
        note(f"{name}, as defined, on the CPU")
        try:
            llm = _load(model, "cpu", "float32", options, "off")
        except ConfigError:  # quantised already
            continue
        with llm:
            ways[name] = [_digest(llm, llm.tokenizer.encode(text)) for text in TEXTS]
    return {"version": VERSION, "texts": len(TEXTS), "ways": ways}


def compare(
    model: str,
    digests: dict[str, Any],
    *,
    device: str = "auto",
    dtype: str = "float32",
    note: Callable[[str], object] = lambda _: None,
) -> Iterator[Finding]:
    """The same on a device, by the kernels that serve there, with all texts answered in one batch."""
    if digests.get("version") != VERSION or not isinstance(digests.get("ways"), dict):
        raise CheckpointError(
            "digests of logits", "of another version", "Record them again with this qwenrt."
        )
    for name, texts in digests["ways"].items():
        note(f"{name}, on {device}")
        with _load(model, device, dtype, WAYS[name], Environment.read().kernels) as llm:
            allowed = _LAYERS_ADD * TOLERANCE[getattr(torch, llm.stats()["dtype"])]
            answers = _answers(llm, [text["ids"] for text in texts])
            for i, (text, tokens) in enumerate(zip(texts, answers, strict=True)):
                error = _error(llm, text)
                wrong = "" if error <= allowed else f"logits differ by {error:.2g} of their largest"
                yield Finding(name, i, error, allowed, wrong or _strayed(text, tokens, allowed))


def kept_digests(path: Path) -> dict[str, Any]:
    """A file that `record` made."""
    return read_json(path, CheckpointError)


def write(digests: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(digests, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _load(model: str, device: str, dtype: str, options: dict[str, Any], kernels: str) -> LLM:
    """``kernels``: of the CPU; "off" computes as defined."""
    environment = dataclasses.replace(Environment.read(), kernels=kernels)
    asked = {"device": device, "dtype": dtype, "activations": "exact", "fallback": "silent"}
    chosen: dict[str, Any] = {**asked, "progress": False, "max_model_len": _CONTEXT, **options}
    return load_with(model, LoadOptions(**chosen), environment)


def _answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=_NEW, ignore_eos=True)
    return [
        list(answer.token_ids) for answer in llm.generate(prompt_token_ids=prompts, sampling_params=params)
    ]


def _digest(llm: LLM, ids: list[int]) -> dict[str, Any]:
    (tokens,) = _answers(llm, [ids])
    logits = llm.logits([*ids, *tokens])
    ahead = logits[len(ids) - 1 : -1].topk(2).values
    places = sorted({0, len(ids) // 2, len(ids) - 1})
    rows = []
    for place in places:
        best = logits[place].topk(_BEST)
        rows.append(
            {
                "place": place,
                "size": _short(float(logits[place].abs().max())),
                "best": [[int(i), _short(float(v))] for i, v in zip(best.indices, best.values, strict=True)],
                "sums": [_short(value) for value in _sums(logits[place])],
            }
        )
    margins = [_short(float(a - b)) for a, b in ahead]
    return {"ids": ids, "rows": rows, "tokens": tokens, "ahead": margins}


def _sums(row: torch.Tensor) -> list[float]:
    """Logits [V] weighted by waves over the ids, each sum as large as one logit."""
    at = torch.arange(len(row), dtype=torch.float64)
    return [float((row.double() * (at * wave).cos()).sum() / math.sqrt(len(row))) for wave in _WAVES]


def _short(value: float) -> float:
    return float(f"{value:.7g}")


def _error(llm: LLM, text: dict[str, Any]) -> float:
    logits = llm.logits(text["ids"])
    worst = 0.0
    for row in text["rows"]:
        got = logits[row["place"]]
        apart = [abs(float(got[i]) - value) for i, value in row["best"]]
        apart += [abs(a - b) for a, b in zip(_sums(got), row["sums"], strict=True)]
        error = max(apart) / row["size"]
        worst = math.inf if math.isnan(error) else max(worst, error)
    return worst


def _strayed(text: dict[str, Any], tokens: list[int], allowed: float) -> str:
    """What is wrong with an answer: its first other token, unless the wanted one was hardly ahead. What follows such a
    one is another text."""
    size = max(row["size"] for row in text["rows"])
    for i, (got, wanted, ahead) in enumerate(zip(tokens, text["tokens"], text["ahead"], strict=True)):
        if got != wanted:
            near = ahead <= 2 * allowed * size
            return (
                ""
                if near
                else f"token {i} of the answer is {got} in place of {wanted}, which was {ahead:.2g} ahead"
            )
    return ""
