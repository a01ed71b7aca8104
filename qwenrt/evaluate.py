"""Evaluation on the built-in model's tasks: held-out questions, long documents, and the loss by quantisation."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qwenrt.config import read_json
from qwenrt.demo.corpus import held_out_samples
from qwenrt.demo.samples import Sample
from qwenrt.demo.world import World
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.files import opened
from qwenrt.llm import LLM
from qwenrt.load_options import LoadOptions
from qwenrt.loading import load_with

TOGETHER = 32  # questions that are answered at the same time
LENGTHS = (1, 2, 4)  # of long documents, in training lengths
DOCUMENTS = 6
# Ways to run the same model: name -> what changes of LoadOptions.
VARIANTS: dict[str, dict[str, Any]] = {
    "int8 weights": {"quantize": "int8"},
    "int4 weights": {"quantize": "int4"},
    "int8 KV cache": {"kv_cache_dtype": "int8"},
}
# Long-context techniques: name -> (use_dynamic_ntk, use_logn_attn).
TECHNIQUES = {
    "NTK + LogN": (True, True),
    "NTK": (True, False),
    "LogN": (False, True),
    "neither": (False, False),
}


@dataclass(frozen=True)
class Score:
    """Right answers out of so many questions."""

    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    def format(self) -> str:
        return f"{self.right:>4} / {self.total:<4} {100 * self.share:6.1f} %"


@dataclass(frozen=True)
class Failure:
    """A question that was answered wrongly: the conversation, the expected answer and the model's."""

    category: str
    asked: str
    expected: str
    answered: str


@dataclass(frozen=True)
class Answers:
    """Scores by category over held-out questions, and the wrong answers."""

    scores: dict[str, Score]
    failures: tuple[Failure, ...]

    @property
    def total(self) -> Score:
        return Score(sum(s.right for s in self.scores.values()), sum(s.total for s in self.scores.values()))


@dataclass(frozen=True)
class DemoReport:
    """All figures. ``perplexity``: technique -> training lengths -> perplexity of held-out documents.
    ``variants``: name -> (score, perplexity at one training length); "float" is the model as it is."""

    name: str
    train_length: int
    answers: Answers
    perplexity: dict[str, dict[int, float]]
    variants: dict[str, tuple[Score, float]]
    seconds: float
    samples: int = field(default=0)

    def format(self, failures: int = 0) -> str:
        """The report as text; ``failures``: how many wrong answers to show."""
        lines = [f"{self.name}: held-out questions, greedy"]
        lines += [f"  {name:<16}{score.format()}" for name, score in self.answers.scores.items()]
        lines.append(f"  {'all':<16}{self.answers.total.format()}")
        if self.perplexity:
            heads = "".join(f"{f'{k}x ({k * self.train_length})':>12}" for k in LENGTHS)
            lines += ["", f"perplexity of held-out documents, by length{'':<3}", f"  {'':<16}{heads}"]
            for name, row in self.perplexity.items():
                lines.append(f"  {name:<16}" + "".join(f"{row[k]:>12.3f}" for k in LENGTHS))
        if self.variants:
            lines += ["", f"  {'':<16}{'right':>20}{'perplexity':>13}"]
            for name, (score, perplexity) in self.variants.items():
                shown = f"{perplexity:>13.3f}" if math.isfinite(perplexity) else f"{'-':>13}"
                lines.append(f"  {name:<16}{score.format():>20}{shown}")
        for failure in self.answers.failures[:failures]:
            lines += ["", f"[{failure.category}] {failure.asked}"]
            lines += [f"  expected: {failure.expected}", f"  answered: {failure.answered}"]
        lines += ["", f"took {self.seconds:.0f} s"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The figures for a program."""
        return {
            "model": self.name,
            "train_length": self.train_length,
            "accuracy": self.answers.total.share,
            "categories": {k: {"right": s.right, "total": s.total} for k, s in self.answers.scores.items()},
            "perplexity": {k: {str(n): p for n, p in row.items()} for k, row in self.perplexity.items()},
            "variants": {
                k: {"right": s.right, "total": s.total, "perplexity": p}
                for k, (s, p) in self.variants.items()
            },
            "seconds": round(self.seconds, 1),
        }


def evaluate_demo(
    model: str | Path = "demo",
    *,
    samples: int = 600,
    seed: int = 1,
    compare: bool = True,
    note: Callable[[str], None] | None = None,
    **options: Any,
) -> DemoReport:
    """Ask ``model`` about ``samples`` held-out questions of the demo's world and measure it on long documents.

    ``compare=False`` leaves out the long documents and the quantised variants. ``note`` is told what is being done.
    ``options``: the fields of LoadOptions. Raises RequestError for numbers that make no sense, and what `load` raises.
    """
    if samples < 1:
        raise RequestError(f"samples={samples}", "nothing to ask", "Use at least 1.")
    tell = note or (lambda text: None)
    began = time.monotonic()
    wanted = LoadOptions(**{"max_num_seqs": TOGETHER, "progress": False, **options})
    questions = held_out_samples(samples, seed)
    with load_with(model, wanted) as llm:
        tell(f"{len(questions)} held-out questions")
        answers = ask_all(llm, questions)
        train_length = llm.config.train_length
        documents = held_out_documents(llm, train_length * max(LENGTHS)) if compare else []
        base = perplexity(llm, documents, train_length) if compare else math.nan
    rows: dict[str, dict[int, float]] = {}
    variants: dict[str, tuple[Score, float]] = {}
    if compare:
        variants["float"] = (answers.total, base)
        for name, (ntk, logn) in TECHNIQUES.items():
            tell(f"long documents: {name}")
            rows[name] = _long_documents(model, ntk, logn, documents, wanted)
        for name, changes in VARIANTS.items():
            tell(name)
            with load_with(model, replace(wanted, **changes)) as llm:
                # logits() runs without a cache, so an int8 cache does not show in the perplexity
                changed = (
                    math.nan if "kv_cache_dtype" in changes else perplexity(llm, documents, train_length)
                )
                variants[name] = (ask_all(llm, questions).total, changed)
    seconds = time.monotonic() - began
    return DemoReport(str(model), train_length, answers, rows, variants, seconds, len(questions))


# ---- questions


def ask_all(llm: LLM, samples: Sequence[Sample]) -> Answers:
    """Ask each sample in a conversation of its own, many at the same time. One is right if every graded turn is."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        failures = list(pool.map(lambda sample: answer(llm, sample), samples))
    scores: dict[str, Score] = {}
    for sample, failure in zip(samples, failures, strict=True):
        so_far = scores.get(sample.category, Score(0, 0))
        scores[sample.category] = Score(so_far.right + (failure is None), so_far.total + 1)
    return Answers(scores, tuple(failure for failure in failures if failure is not None))


def answer(llm: LLM, sample: Sample) -> Failure | None:
    """Hold one conversation, with the model's own answers as its history. -> the first wrong answer, or None."""
    if sample.tools:
        return _with_tools(llm, sample)
    history: list[tuple[str, str]] = []
    for turn in sample.turns:
        if sample.category == "completion":
            response = llm.generate(turn.user, temperature=0.0, max_tokens=16).text
        else:
            response, history = llm.chat(turn.user, history, sample.system, temperature=0.0, max_tokens=128)
        if sample.category == "completion":
            right = response.strip().startswith(turn.accept)
        else:
            right = not turn.accept or turn.is_right(response)
        if not right:
            return _failure(sample, turn.user, " | ".join(turn.accept), response)
    return None


def _with_tools(llm: LLM, sample: Sample) -> Failure | None:
    """A tool call, and the final answer after the tool's result."""
    turn, tools = sample.turns[0], list(sample.tools)
    messages: list[dict[str, Any]] = [{"role": "user", "content": turn.user}]
    reply = llm.chat(messages=messages, tools=tools, temperature=0.0, max_tokens=128)
    calls = reply.message.get("tool_calls") or []
    if sample.call is None:
        if calls or not turn.is_right(reply.message["content"] or ""):
            return _failure(sample, turn.user, " | ".join(turn.accept), reply.text)
        return None
    name, arguments, observation, final = sample.call
    wanted = f"{name} {arguments}"
    if len(calls) != 1 or calls[0]["function"]["name"] != name:
        return _failure(sample, turn.user, wanted, reply.text)
    try:
        given = json.loads(calls[0]["function"]["arguments"])
    except ValueError:
        given = None
    if given != json.loads(arguments):
        return _failure(sample, turn.user, wanted, reply.text)
    result = {"role": "tool", "tool_call_id": calls[0].get("id"), "content": observation}
    last = llm.chat(messages=[*messages, reply.message, result], tools=tools, temperature=0.0, max_tokens=128)
    told = (last.message["content"] or "").strip()
    return None if told == final else _failure(sample, turn.user, final, last.text)


def _failure(sample: Sample, asked: str, expected: str, answered: str) -> Failure:
    return Failure(sample.category, f"{sample.system} / {asked}", expected, answered)


# ---- documents


def held_out_documents(llm: LLM, tokens: int, count: int = DOCUMENTS) -> list[list[int]]:
    """Long texts about the demo's world as token ids, ``tokens`` each, about people and in an order that were not in
    the training data."""
    documents = []
    for number in range(count):
        lines = tokens // 6
        ids: list[int] = []
        while len(ids) < tokens:
            ids = llm.tokenizer.encode(World("test", 1000 + number).document(lines))
            lines *= 2
        documents.append(ids[:tokens])
    return documents


def perplexity(llm: LLM, documents: Sequence[Sequence[int]], length: int) -> float:
    """exp of the mean negative log-likelihood of the first ``length`` tokens of each document."""
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor(document[:length])
        logits = llm.logits(ids.tolist())
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        total, count = total + float(loss), count + len(ids) - 1
    return math.exp(total / count) if count else math.nan


def _long_documents(
    model: str | Path, ntk: bool, logn: bool, documents: list[list[int]], options: LoadOptions
) -> dict[int, float]:
    flags = {"use_dynamic_ntk": ntk, "use_logn_attn": logn}
    with _with_config(model, flags, options) as directory, load_with(directory, options) as llm:
        return {k: perplexity(llm, documents, k * llm.config.train_length) for k in LENGTHS}


@contextmanager
def _with_config(model: str | Path, changes: dict[str, Any], options: LoadOptions) -> Iterator[Path]:
    """A copy of a model's directory with ``changes`` in its config.json."""
    from qwenrt.loader.hub.resolve import resolve

    source = resolve(model, options.source, options.revision, options.offline)
    with tempfile.TemporaryDirectory(prefix="qwenrt-eval-") as scratch:
        for file in source.iterdir():
            if file.suffix in (".json", ".tiktoken", ".safetensors"):
                with opened(file, CheckpointError) as given, (Path(scratch) / file.name).open("wb") as copy:
                    shutil.copyfileobj(given, copy)
        config = {**read_json(source / "config.json"), **changes}
        (Path(scratch) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        yield Path(scratch)
