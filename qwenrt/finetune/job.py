"""What is asked of a training run, read and checked: settings, data, the base, and whether memory suffices."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends.registry import create
from qwenrt.config import ModelConfig, read_model_config
from qwenrt.errors import ConfigError, RequestError
from qwenrt.finetune.building import COMPUTES, Base, resolved_precision
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.lora import SEED_PRESET, SEED_TARGETS, LoraSettings, num_trained
from qwenrt.finetune.settings import TrainingSettings, chosen, number_between
from qwenrt.finetune.sharding import check_can_shard
from qwenrt.loader.memory.training import TrainingNeed, check_fits, gib, training_flops, training_need
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.training_form import FormSettings
from qwenrt.text.entries import read_all_entries, unknown_keys

logger = logging.getLogger("qwenrt")
Data = str | Path | Sequence[Any]


@dataclass(frozen=True)
class Job:
    """``talks``: whether conversations are in the data. ``memory``: (free, total) bytes of the device, of a CPU's those
    for each of the ``processes``."""

    base: Base
    options: TrainingSettings
    form: FormSettings
    lora: LoraSettings
    tokenizer: ChatTokenizer
    corpus: Corpus
    held_out: Corpus | None
    talks: bool
    device: torch.device
    memory: tuple[int, int]
    processes: int = 1

    def need(self, recompute: bool) -> TrainingNeed:
        """What the run takes."""
        precision, options = resolved_precision(self.options, self.device), self.options
        trained = num_trained(self.base.config, self.lora) if options.method == "lora" else None
        return training_need(
            self.base.config,
            COMPUTES[precision].itemsize,
            lora=trained,
            tokens=min(options.micro_tokens or options.batch_tokens, self.corpus.starts[-1]),
            recompute=recompute,
            quantize=self.lora.quantize if trained is not None else None,
            pure=precision == "bfloat16-pure",
            moments=2 if options.moments == "bfloat16" else 4,
            parts=1 if options.shard == "no" else self.processes,
            shares_weights=options.shard == "all" or trained is not None,
        )

    def about_data(self) -> str:
        """What became of the data, and a sample of it."""
        shown = self.corpus.shown(self.tokenizer)
        return f"{self.corpus.counts.format()}\nthe first sample, what is learned between ⟦ and ⟧:\n{shown}"

    @property
    def recompute(self) -> bool:
        """Whether activations are computed again: as asked, or where they would not fit."""
        asked = self.options.recompute
        return asked == "all" or (asked == "auto" and self.need(False).total > self.memory[0])

    def check_memory(self) -> bool:
        """`recompute`. CapacityError where there is too little memory either way."""
        (free, total), recompute = self.memory, self.recompute
        options = self.options
        check_fits(
            self.need(recompute), free, total, str(self.device),
            lora=options.method == "lora",
            recompute=recompute,
            halves=options.moments == "float32" and options.precision != "float16",
            shares=self.processes > 1 and options.shard != "all",
        )  # fmt: skip
        return recompute

    def plan(self) -> str:
        """Memory and expected time, in words."""
        (free, total), recompute = self.memory, self.recompute
        need, options, corpus = self.need(recompute), self.options, self.corpus
        lora = options.method == "lora"
        steps = sum(len(corpus.batches(options.seed, e, options.batch_tokens)) for e in range(options.epochs))
        steps = min(steps, options.max_steps or steps)
        tokens = min(corpus.starts[-1] * options.epochs, steps * options.batch_tokens)
        length = corpus.starts[-1] // len(corpus)
        flops = training_flops(self.base.config, tokens, length, lora, recompute)
        seconds = flops / self._speed() / (self.processes if self.device.type != "cpu" else 1)
        what = "all parameters"
        if lora:
            what = f"an adapter of {num_trained(self.base.config, self.lora)} numbers"
        fits = "it fits" if need.total <= free else f"{gib(need.total - free)} are missing"
        return (
            f"{corpus.counts.format()}\n{what}, {steps} steps of {options.batch_tokens} tokens"
            f"{f', memory of each of {self.processes} processes' if self.processes > 1 else ''}, "
            f"{'activations computed again' if recompute else 'all activations kept'}\n{need.format()}\n"
            f"{'memory':<12} {gib(free):>12}   free of {gib(total)} on {self.device}: {fits}\n"
            f"{'time':<12} {seconds:>10.0f} s   at half the speed that a matrix product has here"
        )

    def _speed(self) -> float:
        """Operations a second, half of those of a matrix product of this network's sizes."""
        dtype = COMPUTES[resolved_precision(self.options, self.device)]
        d, inner = self.base.config.hidden_size, self.base.config.intermediate_size
        x, w = (torch.ones(n, d, dtype=dtype, device=self.device) for n in (2048, inner))
        best = 1e9
        for _ in range(3):
            began = time.monotonic()
            (x @ w.t()).float().sum().item()
            best = min(best, time.monotonic() - began)
        return 0.5 * 2 * 2048 * d * inner / best


def prepare(
    model_dir: str | Path,
    data: Data,
    eval_data: Data | float | None,
    preset: str | None,
    device: str,
    settings: dict[str, Any],
    processes: int = 1,
) -> Job:
    """Everything read but the weights. Errors as `finetune` has them."""
    source = Path(model_dir)
    config = read_model_config(source)
    options, form, lora = chosen_settings(settings, config, preset)
    tokenizer = _tokenizer(source, config)
    corpus, held_out, talks = _corpora(tokenizer, data, eval_data, options, form)
    base = Base.open(source, config, options)
    backend = create(device)
    free, total = backend.memory()
    if backend.device.type == "cpu":
        free //= processes
    if options.shard != "no" and processes > 1:
        check_can_shard()
    parts = (base, options, form, lora, tokenizer, corpus, held_out, talks)
    return Job(*parts, backend.device, (free, total), processes)


def chosen_settings(
    given: dict[str, Any], config: ModelConfig, preset: str | None = None
) -> tuple[TrainingSettings, FormSettings, LoraSettings]:
    """Settings by the classes that they belong to. TypeError for a name that none has."""
    given = dict(given)
    if preset is not None:
        chosen("preset", preset, ("seed",))
        targets = {"targets": SEED_TARGETS} if config.model_type == "qwen" else {}
        given = {**SEED_PRESET, **targets, **given}
    if given.get("method") == "qlora":  # an adapter, as people call it where the base is in codes
        given["method"] = "lora"
        if config.quant is None:
            given.setdefault("quantize", "int4")
    form = {field.name: given.pop(field.name) for field in fields(FormSettings) if field.name in given}
    of_lora = {field.name: given.pop(field.name) for field in fields(LoraSettings) if field.name in given}
    options, lora = TrainingSettings(**given), LoraSettings(**of_lora)
    if options.method == "auto":
        method = "lora" if of_lora or config.quant is not None else "full"
        options = replace(options, method=method)  # type: ignore[arg-type]
    if options.method == "full" and of_lora:
        found = f"{', '.join(sorted(of_lora))} {'are' if len(of_lora) > 1 else 'is'} of adapters"
        raise RequestError('method="full"', found, 'Leave it out, or use method="lora".')
    return options, FormSettings(**form), lora


def _tokenizer(source: Path, config: ModelConfig) -> ChatTokenizer:
    tokenizer = ChatTokenizer.from_dir(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"fine-tuning {source}",
            f"the tokenizer has {tokenizer.vocab_size} tokens, config.json vocab_size {config.vocab_size}",
            "The vocabulary is of another model, or tokens were added to it and the model was not resized.",
        )
    return tokenizer


def _corpora(
    tokenizer: ChatTokenizer,
    data: Data,
    eval_data: Data | float | None,
    options: TrainingSettings,
    form: FormSettings,
) -> tuple[Corpus, Corpus | None, bool]:
    """(what is learned, what is held out, whether there are conversations in it)."""
    entries = read_all_entries(data)
    if unknown := unknown_keys(entries):
        logger.warning("keys of entries that mean nothing here: %s", ", ".join(unknown[:10]))
    corpus = Corpus.encode(tokenizer, entries, options.max_length, form, options.max_dropped)
    counts = corpus.counts
    if counts.left_out:
        found = "have nothing to learn in their first"
        logger.warning(
            "%d of %d entries %s %d tokens", counts.left_out, counts.entries, found, options.max_length
        )
    talks = any(isinstance(entry, dict) and "text" not in entry for entry in entries)
    held_out = None
    if isinstance(eval_data, (int, float)):
        corpus, held_out = corpus.apart(number_between("eval_data", eval_data, 1e-6, 0.9), options.seed)
    elif eval_data is not None:
        held_out = Corpus.encode(tokenizer, read_all_entries(eval_data), options.max_length, form)
    return corpus, held_out, talks
