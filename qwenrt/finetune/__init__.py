"""Fine-tuning a checkpoint on conversations, through the same network and templates that generate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qwenrt.backends.registry import create
from qwenrt.called import as_function
from qwenrt.config import ModelConfig
from qwenrt.config.layers import num_parameters
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.files import is_there
from qwenrt.finetune.building import Base, build, build_adapter
from qwenrt.finetune.checkpoint import dtype_of, make_it_chat, write_checkpoint
from qwenrt.finetune.data import Counts
from qwenrt.finetune.job import Data, Job, prepare
from qwenrt.finetune.lora import LoraSettings, TrainedAdapter, num_trained
from qwenrt.finetune.processes import Group, device_of, group_of, in_processes
from qwenrt.finetune.settings import TrainingSettings, whole_number
from qwenrt.finetune.state import BEST_FILE, OUR_FILES, STATE_FILE
from qwenrt.finetune.trainer import Trainer
from qwenrt.loader.adapters import BaseWeights, write_adapter
from qwenrt.loader.checkpoint.writing import check_room, claim_directory
from qwenrt.loader.hub.resolve import source_of

logger = logging.getLogger("qwenrt")
as_function(__name__)

# the first arguments of `prepare`
Asked = tuple[Path, Data, Data | float | None, str | None, str, dict[str, Any]]


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
    model: str | Path,
    data: Data,
    output_dir: str | Path,
    *,
    eval_data: Data | float | None = None,
    preset: str | None = None,
    base_name: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    processes: int = 1,
    progress: bool | None = None,
    say: Callable[[str], None] | None = None,
    save_every: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneReport:
    """Train ``model``, a directory or a name as of `load`, and write a new one, or an adapter for it, to
    ``output_dir``.

    ``method``: "full" trains all parameters; "lora" an adapter, which is written as peft writes it and may be served
    beside the model or merged into it; "qlora" one beside a base in codes, which a dense base becomes at load (int4);
    "auto": an adapter where settings of one are given, or the model's weights are codes. ``preset`` "seed": the
    settings of the first Qwen's own scripts for adapters. ``base_name``: what the adapter calls its base, a hub's name
    or a directory of which the last word is kept (None: ``model``).

    ``data``: a JSON file (a list) or JSON-lines file of entries, several, a directory of them, or the entries
    themselves: conversations in the shapes of OpenAI, ShareGPT, Alpaca or the first Qwen, or ``{"text": str}``.
    Conversations become tokens by the checkpoint's own chat template, as a server would make them; learned is what the
    assistant says. ``eval_data``: the same, or a share of ``data``, on which the loss is measured on the way.

    Other keywords: the fields of TrainingSettings, FormSettings (``train_on``, ``thinking``, ``allow_special``) and
    LoraSettings (``rank``, ``alpha``, ``targets``, ``train_tokens``, ...). ``say`` is told what became of the data,
    with a sample of it, before training begins. ``processes``: so many share each step (torchrun starts them as well).

    Every ``save_every`` steps, and at Ctrl-C or SIGTERM (which raise KeyboardInterrupt after the step), the state is
    kept in ``output_dir``, and the same call goes on from there (``resume``); one with another model, data or setting
    is refused. The same seed and number of ``threads`` (of torch, on the CPU) and processes give the same weights. An
    ``output_dir`` that holds anything else is refused unless ``overwrite``, and so is the model's own. Raises
    RequestError for settings, data and ``output_dir``, CheckpointError and ConfigError for the model's files,
    CapacityError where memory is too small.
    """
    how = Where(
        Path(output_dir),
        base_name,
        None if threads is None else whole_number("threads", threads, 1),
        None if save_every is None else whole_number("save_every", save_every, 1),
        resume,
        overwrite,
        progress,
        say,
    )
    asked = (source_of(model), data, eval_data, preset, device, settings)
    if whole_number("processes", processes, 1) == 1:
        return _train(how, asked)
    job = prepare(*asked, processes)  # what is wrong with it is said here, once
    if say is not None:
        say(job.about_data())
    work = {"how": replace(how, say=None), "asked": asked}
    report: FinetuneReport = in_processes(processes, job.device, _train, work)
    return report


@dataclass(frozen=True)
class Where:
    """How a run is done, which does not change what comes of it, but for ``threads``."""

    target: Path
    base_name: str | None
    threads: int | None
    save_every: int | None
    resume: bool
    overwrite: bool
    progress: bool | None
    say: Callable[[str], None] | None


def _train(how: Where, asked: Asked) -> FinetuneReport:
    """The run, in this process or its share of it."""
    device = create(asked[4]).device
    with group_of(device) as group:
        threads = how.threads
        if threads is None and group.size > 1 and device.type == "cpu":
            threads = max(1, torch.get_num_threads() // group.size)
        job = prepare(*asked, group.size)
        with _threads(threads):
            return _trained(how, job, group)


def _trained(how: Where, job: Job, group: Group) -> FinetuneReport:
    target = how.target
    if group.rank == 0:
        if how.say is not None:
            how.say(job.about_data())
        _claim(target, job.base.source, how.overwrite)
        check_room(target, _room(job.base.config, job.options, job.lora, bool(how.save_every)))
    recompute = job.check_memory()
    group.wait()
    about: dict[str, Any] = {"recompute": recompute, "held_out": job.held_out, "group": group}
    about["identity"] = {**vars(job.form), "threads": how.threads}
    device, adapter = device_of(job.device, group.rank) if group.size > 1 else job.device, None
    if job.options.method == "lora":
        trainer, adapter = build_adapter(
            job.base, job.corpus, job.options, job.lora, job.tokenizer, device, talks=job.talks, **about
        )
    else:
        trainer = build(job.base, job.corpus, job.options, device, **about)
    _run(trainer, how)
    if adapter is None:
        notes = _write(trainer, job, target)
    elif group.rank == 0:
        notes = _write_adapter(adapter, job.base, target, how.base_name or str(job.base.source.resolve()))
    else:
        notes = []
    report = _finished(trainer, target, notes)
    group.wait()
    return report


def _run(trainer: Trainer, how: Where) -> None:
    first, state = trainer.group.rank == 0, how.target / STATE_FILE
    if first and (short := trainer.too_short_to_learn()) is not None:
        logger.warning("%s", short)
    if how.resume and is_there(state, CheckpointError):
        trainer.load_state(state)
    trainer.group.wait()
    trainer.run(how.target, how.save_every, how.progress if first else False)


def _write(trainer: Trainer, job: Job, target: Path) -> list[str]:
    exact = {name.removeprefix("weight."): tensor for name, tensor in trainer.optimizer.weights().items()}
    if trainer.group.rank > 0:  # all are asked for them, and one writes
        return []
    write_checkpoint(trainer.network.model, job.base.source, target, job.base.checkpoint, exact)
    end = job.tokenizer.im_end_id
    note = make_it_chat(target, job.base.config.model_type, end) if job.talks and end is not None else None
    return [] if note is None else [note]


def _write_adapter(adapter: TrainedAdapter, base: Base, target: Path, name: str) -> list[str]:
    assert base.checkpoint is not None
    lora = adapter.settings
    with torch.no_grad():
        weights = adapter.weights()
    write_adapter(
        target,
        base.config,
        weights,
        base=BaseWeights(base.checkpoint, base.config),
        base_name=name,
        rslora=lora.rslora,
        dropout=lora.dropout,
        moe_layout=lora.moe_layout,
    )
    return [
        f"an adapter of {adapter.num_parameters} numbers; qwenrt chat MODEL --adapter NAME={target} talks with it"
    ]


def _finished(trainer: Trainer, target: Path, notes: list[str]) -> FinetuneReport:
    if trainer.group.rank == 0:
        trainer.save_curve(target)
        for file in (STATE_FILE, BEST_FILE):
            (target / file).unlink(missing_ok=True)
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


def _claim(target: Path, source: Path, overwrite: bool) -> None:
    """Create the output directory. RequestError where it is the model's own, holds other files, or cannot be written
    to."""
    if not overwrite and target.resolve() == source.resolve():
        found = "it is the model's own directory: its weights would be replaced"
        remedy = "Give another one, or overwrite=True (--overwrite)."
        raise RequestError(f"writing the new checkpoint to {target}", found, remedy)
    claim_directory(target, overwrite, lambda names: STATE_FILE in names or OUR_FILES.issuperset(names))


def _room(config: ModelConfig, options: TrainingSettings, lora: LoraSettings, keeps_state: bool) -> int:
    """Bytes that training writes."""
    if options.method == "lora":
        numbers, weights = num_trained(config, lora), num_trained(config, lora) * 4
    else:
        numbers, weights = num_parameters(config), num_parameters(config) * dtype_of(config).itemsize
    return weights + (numbers * 3 * 4 if keeps_state else 0)  # what is trained and two moments in float32


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
