"""Fine-tuning a checkpoint on conversations, through the same network and templates that generate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends.registry import create
from qwenrt.config import ModelConfig, read_model_config
from qwenrt.config.layers import num_parameters
from qwenrt.errors import CheckpointError, ConfigError, RequestError
from qwenrt.files import is_there
from qwenrt.finetune.building import Base, build
from qwenrt.finetune.checkpoint import dtype_of, make_it_chat, write_checkpoint
from qwenrt.finetune.data import Corpus, Counts
from qwenrt.finetune.settings import TrainingSettings, number_between, whole_number
from qwenrt.finetune.state import BEST_FILE, OUR_FILES, STATE_FILE
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.checkpoint.writing import check_room, claim_directory
from qwenrt.text.chat.chat_tokenizer import ChatTokenizer
from qwenrt.text.chat.training_form import FormSettings
from qwenrt.text.entries import read_all_entries, unknown_keys

logger = logging.getLogger("qwenrt")
Data = str | Path | Sequence[Any]


@dataclass(frozen=True)
class FinetuneReport:
    """What a training run did. ``losses``: (step, mean loss since the last entry); ``held_out``: (step, loss on what is
    held out), of which ``best_step`` did best; ``data``: what became of the entries; ``notes``: what was changed in the
    directory's files besides."""

    output_dir: Path
    steps: int
    entries: int
    tokens: int
    seconds: float
    final_loss: float
    losses: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    best_step: int | None
    data: Counts
    notes: tuple[str, ...]

    def format(self) -> str:
        """The result in a few lines of text."""
        speed = self.tokens / max(self.seconds, 1e-9)
        lines = [
            f"{self.steps} steps over {self.entries} entries, {self.tokens} tokens in {self.seconds:.0f} s "
            f"({speed:.0f} tokens/s), loss {self.final_loss:.4f}: {self.output_dir}"
        ]
        if self.held_out:
            best = min(loss for _, loss in self.held_out)
            lines.append(
                f"held out: loss {self.held_out[0][1]:.4f} at step {self.held_out[0][0]}, {self.held_out[-1][1]:.4f} "
                f"at the end, {best:.4f} at step {self.best_step}, which is kept"
            )
        return "\n".join([*lines, *self.notes])


def finetune(
    model_dir: str | Path,
    data: Data,
    output_dir: str | Path,
    *,
    eval_data: Data | float | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] | None = None,
    save_every: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneReport:
    """Train the checkpoint in ``model_dir`` and write a new one to ``output_dir``.

    ``data``: a JSON file (a list) or JSON-lines file of entries, several, a directory of them, or the entries
    themselves: conversations in the shapes of OpenAI, ShareGPT, Alpaca or the first Qwen, or ``{"text": str}``.
    Conversations become tokens by the checkpoint's own chat template, as a server would make them; learned is what the
    assistant says. ``train_on``, ``thinking``, ``allow_special``: see FormSettings. ``eval_data``: the same, or a share
    of ``data``, on which the loss is measured every ``eval_every`` steps (None: ten times); the ``keep`` "best" step is
    what is written, or the "last".

    Keyword settings (see TrainingSettings): ``epochs``, ``max_steps`` (ends earlier), ``learning_rate`` with
    cosine decay over ``decay_steps`` (None: all) after ``warmup_ratio`` of them, ``batch_tokens`` per step, of which
    ``micro_tokens`` are computed at a time (None: all), ``max_length`` (longer samples are cut on the right; where more
    than ``max_dropped`` of the entries then have nothing to learn, they are refused), ``weight_decay``,
    ``adam_beta2``, ``max_grad_norm``, ``seed``; ``from_scratch`` begins with random weights of the shape in
    config.json. ``precision``: "float32"; "bfloat16" or "float16", in which the network computes while updates are
    made in float32; "bfloat16-pure", which keeps nothing in float32 and is less exact; "auto". ``recompute``: "all"
    keeps one layer's activations at a time, "none" all. ``router`` "frozen" leaves what chooses experts as it is.

    ``say`` is told what became of the data, with a sample of it, before training begins.

    Every ``save_every`` steps, and at Ctrl-C or SIGTERM (which raise KeyboardInterrupt after the step), the state is
    kept in ``output_dir``, and the same call goes on from there (``resume``); one with another model, data or setting
    is refused. The same seed and number of ``threads`` (of torch, on the CPU) give the same weights. An ``output_dir``
    that holds anything else is refused unless ``overwrite``, and so is the model's own. Raises RequestError for
    settings, data and ``output_dir``, CheckpointError and ConfigError for the model's files.
    """
    options, form = _options(settings)
    source, target = Path(model_dir), Path(output_dir)
    save_every = None if save_every is None else whole_number("save_every", save_every, 1)
    threads = None if threads is None else whole_number("threads", threads, 1)
    config = read_model_config(source)
    tokenizer = _tokenizer(source, config)
    corpus, held_out, talks = _corpora(tokenizer, data, eval_data, options, form)
    if say is not None:
        shown = corpus.shown(tokenizer)
        say(f"{corpus.counts.format()}\nthe first sample, what is learned between ⟦ and ⟧:\n{shown}")
    _claim(target, source, overwrite)
    check_room(target, _room(config, bool(save_every)))
    with _threads(threads):
        base = Base.open(source, config, options)
        identity = {**vars(form), "threads": threads}
        trainer = build(base, corpus, options, create(device).device, identity=identity, held_out=held_out)
        if (short := trainer.too_short_to_learn()) is not None:
            logger.warning("%s", short)
        state = target / STATE_FILE
        if resume and is_there(state, CheckpointError):
            trainer.load_state(state)
        trainer.run(target, save_every, progress)
    notes = _write(trainer, base, target, tokenizer, talks)
    trainer.save_curve(target)
    for file in (STATE_FILE, BEST_FILE):
        (target / file).unlink(missing_ok=True)
    return _report(trainer, target, notes)


def _write(trainer: Trainer, base: Base, target: Path, tokenizer: ChatTokenizer, talks: bool) -> list[str]:
    exact = {name: master.detach() for name, master in trainer.optimizer.masters.items()}
    write_checkpoint(trainer.network.model, base.source, target, base.checkpoint, exact)
    end = tokenizer.im_end_id
    note = make_it_chat(target, base.config.model_type, end) if talks and end is not None else None
    return [] if note is None else [note]


def _report(trainer: Trainer, target: Path, notes: list[str]) -> FinetuneReport:
    now, counts = trainer.progress, trainer.corpus.counts
    final = now.losses[-1][1] if now.losses else math.nan
    best = now.best if trainer.settings.keep == "best" else now.held_out[-1] if now.held_out else None
    return FinetuneReport(
        target,
        now.step,
        counts.entries - counts.left_out,
        now.tokens,
        now.seconds,
        final,
        tuple(now.losses),
        tuple(now.held_out),
        None if best is None else best[0],
        counts,
        tuple(notes),
    )


def _options(given: dict[str, Any]) -> tuple[TrainingSettings, FormSettings]:
    """Settings by the classes that they belong to. TypeError for a name that none has."""
    form = {field.name: given.pop(field.name) for field in fields(FormSettings) if field.name in given}
    options = TrainingSettings(**given)
    return (replace(options, method="full") if options.method == "auto" else options), FormSettings(**form)


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


def _claim(target: Path, source: Path, overwrite: bool) -> None:
    """Create the output directory. RequestError where it is the model's own, holds other files, or cannot be written
    to."""
    if not overwrite and target.resolve() == source.resolve():
        found = "it is the model's own directory: its weights would be replaced"
        remedy = "Give another one, or overwrite=True (--overwrite)."
        raise RequestError(f"writing the new checkpoint to {target}", found, remedy)
    claim_directory(target, overwrite, lambda names: STATE_FILE in names or OUR_FILES.issuperset(names))


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
