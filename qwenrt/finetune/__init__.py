"""Full-parameter fine-tuning of a Qwen-1 checkpoint on conversations, through the same network that generates."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenrt.config import ModelConfig, read_model_config
from qwenrt.config.layers import num_parameters
from qwenrt.errors import CheckpointError, ConfigError, RequestError
from qwenrt.files import is_there
from qwenrt.finetune.checkpoint import dtype_of, write_checkpoint
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.trainer import CURVE_FILE, STATE_FILE, Trainer, TrainingSettings, whole_number
from qwenrt.loader.checkpoint.writing import check_room, claim_directory
from qwenrt.text.entries import read_entries
from qwenrt.text.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger("qwenrt")


@dataclass(frozen=True)
class FinetuneReport:
    """What a training run did. ``losses``: (step, mean loss since the last entry)."""

    output_dir: Path
    steps: int
    entries: int
    tokens: int
    seconds: float
    final_loss: float
    losses: tuple[tuple[int, float], ...]

    def format(self) -> str:
        """The result in one line of text."""
        speed = self.tokens / max(self.seconds, 1e-9)
        return (
            f"{self.steps} steps over {self.entries} entries, {self.tokens} tokens in {self.seconds:.0f} s "
            f"({speed:.0f} tokens/s), loss {self.final_loss:.4f}: {self.output_dir}"
        )


def finetune(
    model_dir: str | Path,
    data: str | Path | Sequence[dict[str, Any]],
    output_dir: str | Path,
    *,
    threads: int | None = None,
    progress: bool | None = None,
    save_every: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneReport:
    """Train all parameters of the checkpoint in ``model_dir`` and write a new checkpoint to ``output_dir``.

    ``data``: a JSON file (a list) or JSON-lines file of entries, or the entries themselves. An entry is
    ``{"conversations": [{"from": "user" | "assistant", "value": str}, ...]}`` with an optional ``"system"`` text, or
    ``{"text": str}`` for plain text. Content is never read as control tokens. Loss is on what the assistant says and
    on the control tokens that frame turns; plain text carries loss everywhere.

    Keyword settings (see TrainingSettings): ``epochs``, ``max_steps`` (ends earlier), ``learning_rate`` with
    cosine decay over ``decay_steps`` (None: all) after ``warmup_ratio`` of them, ``batch_tokens`` per step,
    ``max_length`` (longer entries are cut on the right), ``weight_decay``, ``adam_beta2``, ``max_grad_norm``,
    ``seed``; ``from_scratch`` begins with random weights of the shape in config.json. ``threads``: of torch, on
    the CPU. Every ``save_every`` steps, and at Ctrl-C (which raises KeyboardInterrupt after the step), the state is
    kept in ``output_dir``, and the same call goes on from there (``resume``); one with another model, data or setting
    is refused. The same seed and number of threads give the same weights. An ``output_dir`` that holds anything else is
    refused unless ``overwrite``, and so is the model's own. Raises RequestError for settings, data and ``output_dir``,
    CheckpointError and ConfigError for the model's files.
    """
    options = TrainingSettings(**settings)
    source, target = Path(model_dir), Path(output_dir)
    save_every = None if save_every is None else whole_number("save_every", save_every, 1)
    threads = None if threads is None else whole_number("threads", threads, 1)
    config = read_model_config(source)
    tokenizer = Tokenizer.from_dir(source)
    entries = read_entries(data) if isinstance(data, (str, Path)) else list(data)
    corpus = Corpus.encode(tokenizer, entries, options.max_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"fine-tuning {source}",
            f"the tokenizer has {tokenizer.vocab_size} tokens, config.json vocab_size {config.vocab_size}",
            "The vocabulary is of another model, or tokens were added to it and the model was not resized.",
        )
    _claim(target, source, overwrite)
    check_room(target, _room(config, bool(save_every)))
    with _threads(threads):
        trainer = Trainer(source, config, corpus, options, tokenizer.eod_id, threads)
        if (short := trainer.too_short_to_learn()) is not None:
            logger.warning("%s", short)
        state = target / STATE_FILE
        if resume and is_there(state, CheckpointError):
            trainer.load_state(state)
        trainer.run(target, save_every, progress)
    write_checkpoint(trainer.model, source, target)
    trainer.save_curve(target)
    state.unlink(missing_ok=True)
    final = trainer.losses[-1][1] if trainer.losses else math.nan
    return FinetuneReport(
        target, trainer.step, len(corpus), trainer.tokens, trainer.seconds, final, tuple(trainer.losses)
    )


def _claim(target: Path, source: Path, overwrite: bool) -> None:
    """Create the output directory. RequestError where it is the model's own, holds other files, or cannot be written
    to."""
    if not overwrite and target.resolve() == source.resolve():
        found = "it is the model's own directory: its weights would be replaced"
        remedy = "Give another one, or overwrite=True (--overwrite)."
        raise RequestError(f"writing the new checkpoint to {target}", found, remedy)
    ours = {STATE_FILE, CURVE_FILE}
    claim_directory(target, overwrite, lambda names: STATE_FILE in names or ours.issuperset(names))


def _room(config: ModelConfig, keeps_state: bool) -> int:
    """Bytes that training writes."""
    weights = num_parameters(config) * dtype_of(config).itemsize
    state = num_parameters(config) * 3 * 4 if keeps_state else 0  # weights and two moments in float32
    return weights + state


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` threads within the block; None leaves the number as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
