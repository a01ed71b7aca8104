"""Full-parameter fine-tuning of a Qwen-1 checkpoint on conversations, with the network qwenrt serves."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig, read_json
from qwenrt.errors import CheckpointError, ConfigError, QwenrtError, RequestError
from qwenrt.loader.names import table_for
from qwenrt.loader.weights import load_weights
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed, StepPlan
from qwenrt.text.messages import DEFAULT_SYSTEM
from qwenrt.text.tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # a label that carries no loss
STATE_FILE = "training_state.safetensors"  # in the output directory while training goes on
CURVE_FILE = "loss_curve.json"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PAD_TO = 8  # batches are padded to a multiple of this many tokens
_COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken", "*.tiktoken")


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the result of a training run (`finetune` says what each means)."""

    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 1e-5
    min_learning_rate_ratio: float = 0.0
    batch_tokens: int = 4096
    max_length: int = 512
    warmup_ratio: float = 0.01
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    from_scratch: bool = False

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "batch_tokens": self.batch_tokens, "max_length": self.max_length}
        if self.max_steps is not None:
            whole["max_steps"] = self.max_steps
        for name, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**31:
                raise RequestError(f"{name}={value!r}", "not a usable number", "Use an integer of at least 1.")
        limits = {
            "learning_rate": (self.learning_rate, 0.0, 10.0),
            "min_learning_rate_ratio": (self.min_learning_rate_ratio, 0.0, 1.0),
            "warmup_ratio": (self.warmup_ratio, 0.0, 1.0),
            "weight_decay": (self.weight_decay, 0.0, 10.0),
            "adam_beta2": (self.adam_beta2, 0.0, 0.999999),
            "max_grad_norm": (self.max_grad_norm, 1e-6, 1e6),
        }
        for name, (number, low, high) in limits.items():
            if not isinstance(number, (int, float)) or not low <= number <= high:
                raise RequestError(f"{name}={number!r}", "out of range", f"Use a number from {low:g} to {high:g}.")


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
        """One line for a person."""
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
    **settings: Any,
) -> FinetuneReport:
    """Train all parameters of the checkpoint in ``model_dir`` and write a new checkpoint to ``output_dir``.

    ``data``: a JSON file (a list) or JSON-lines file of entries, or the entries themselves. An entry is
    ``{"conversations": [{"from": "user" | "assistant", "value": str}, ...]}`` with an optional ``"system"`` text, or
    ``{"text": str}`` for plain text. Content is never read as control tokens. Loss is on what the assistant says and
    on the control tokens that frame turns; plain text carries loss everywhere.

    Keyword settings (see TrainingSettings): ``epochs``, ``max_steps`` (ends earlier), ``learning_rate`` with cosine decay after
    ``warmup_ratio`` of the steps, ``batch_tokens`` per step, ``max_length`` (longer entries are cut on the right),
    ``weight_decay``, ``adam_beta2``, ``max_grad_norm``, ``seed``; ``from_scratch`` begins with random weights of the
    shape in config.json. ``threads``: of torch, on the CPU. ``save_every`` steps the state is kept in ``output_dir``,
    and the same call goes on from there after a cut (``resume``). The same seed and number of threads give the same
    weights. Raises RequestError for settings and data, CheckpointError and ConfigError for the model's files.
    """
    options = TrainingSettings(**settings)
    source, target = Path(model_dir), Path(output_dir)
    if save_every is not None and save_every < 1:
        raise RequestError(f"save_every={save_every}", "not a number of steps", "Use at least 1.")
    config = ModelConfig.from_dir(source)
    tokenizer = load_tokenizer(source)
    entries = read_entries(data) if isinstance(data, (str, Path)) else list(data)
    corpus = Corpus.encode(tokenizer, entries, options.max_length)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"fine-tuning {source}",
            f"the tokenizer has {tokenizer.vocab_size} tokens, config.json vocab_size {config.vocab_size}",
            "The files do not belong together: fetch them again.",
        )
    target.mkdir(parents=True, exist_ok=True)
    with _threads(threads):
        trainer = Trainer(source, config, corpus, options, pad_id=tokenizer.eod_id)
        state = target / STATE_FILE
        if resume and state.exists():
            trainer.load_state(state)
        trainer.run(target, save_every, progress)
    write_checkpoint(trainer.model, source, target)
    _write_curve(target, trainer)
    state.unlink(missing_ok=True)
    return trainer.report(target)


# ---- data


def read_entries(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a JSON list or of JSON lines (one object a line). RequestError names the line."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RequestError(f"training data {path}", str(error.strerror), "Check the path.") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RequestError(f"training data {path}", f"line {line} is not UTF-8", "Save it as UTF-8.") from error
    if not text.lstrip().startswith("{"):
        return _parse_list(path, text)
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                found = f"line {number} is not JSON ({str(error)[:80]})"
                raise RequestError(f"training data {path}", found, "Correct that line.") from error
    return entries


def _parse_list(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        found = f"line {line} is not JSON ({str(error)[:80]})"
        raise RequestError(f"training data {path}", found, "Correct it, or write one entry a line.") from error
    if not isinstance(entries, list):
        found = f"a JSON {type(entries).__name__}"
        raise RequestError(f"training data {path}", found, "It must be a list of entries.")
    return entries


def encode_entry(tokenizer: Tokenizer, entry: object, number: int = 1) -> tuple[list[int], list[int]]:
    """(token ids, labels) of one entry, in Qwen-1's training form. RequestError names entry ``number``.

    Every turn is <|im_start|>role\\ncontent<|im_end|>\\n. Labels are the ids themselves on im_start, im_end and the
    newline after it for every role, and on the content of the assistant; IGNORE elsewhere.
    """
    if not isinstance(entry, dict):
        raise _bad_entry(number, f"a JSON {type(entry).__name__}", "Each entry must be an object.")
    if "text" in entry:
        ids = [*tokenizer.encode(_text(entry["text"], number, "text")), tokenizer.eod_id]
        return ids, list(ids)
    turns = _turns(entry, number)
    newline = tokenizer.encode("\n")
    start, end = [tokenizer.im_start_id], [tokenizer.im_end_id, *newline]
    ids, labels = [], []
    system = _text(entry.get("system", DEFAULT_SYSTEM), number, "system")
    for role, text in [("system", system), *turns]:
        head, content = [*tokenizer.encode(role), *newline], tokenizer.encode(text)
        ids += [*start, *head, *content, *end]
        spoken = content if role == "assistant" else [IGNORE] * len(content)
        labels += [*start, *[IGNORE] * len(head), *spoken, *end]
    return ids, labels


def _turns(entry: dict[str, Any], number: int) -> list[tuple[str, str]]:
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        remedy = 'Give {"conversations": [{"from": "user", "value": "..."}, ...]} or {"text": "..."}.'
        raise _bad_entry(number, "no list of conversations", remedy)
    pairs = []
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]"
        if not isinstance(turn, dict):
            raise _bad_entry(number, f"{where} is a JSON {type(turn).__name__}", "It must be an object.")
        role = turn.get("from")
        if index == 0 and role != "user":
            continue  # one leading turn of another role is dropped, as the original trainer does
        if role not in ("user", "assistant"):
            raise _bad_entry(number, f"{where} is from {role!r:.40}", "It must be 'user' or 'assistant'.")
        pairs.append((role, _text(turn.get("value"), number, f"{where} value")))
    if not any(role == "assistant" for role, _ in pairs):
        raise _bad_entry(number, "no turn of the assistant", "There is nothing to learn: remove the entry.")
    return pairs


def _text(value: object, number: int, what: str) -> str:
    if not isinstance(value, str):
        raise _bad_entry(number, f"{what} is {type(value).__name__}, not text", "Give a string.")
    return value


def _bad_entry(number: int, found: str, remedy: str) -> RequestError:
    return RequestError(f"training data, entry {number}", found, remedy)


@dataclass(frozen=True)
class Corpus:
    """All entries as tokens: ``ids`` and ``labels`` int32, entry i at starts[i] : starts[i + 1]."""

    ids: torch.Tensor
    labels: torch.Tensor
    starts: list[int]

    @classmethod
    def encode(cls, tokenizer: Tokenizer, entries: Sequence[object], max_length: int) -> Corpus:
        ids: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        starts = [0]
        for number, entry in enumerate(entries, 1):
            entry_ids, entry_labels = encode_entry(tokenizer, entry, number)
            if all(label == IGNORE for label in entry_labels[1:max_length]):
                continue
            ids.append(torch.tensor(entry_ids[:max_length], dtype=torch.int32))
            labels.append(torch.tensor(entry_labels[:max_length], dtype=torch.int32))
            starts.append(starts[-1] + len(ids[-1]))
        if not ids:
            raise RequestError("training data", "no entry with anything to learn", "Give at least one.")
        return cls(torch.cat(ids), torch.cat(labels), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, entry: int) -> int:
        return self.starts[entry + 1] - self.starts[entry]

    def batches(self, seed: int, epoch: int, batch_tokens: int) -> list[list[int]]:
        """Entry numbers of each step of an epoch: entries of like length together, so that little is padding."""
        rng = random.Random(f"{seed}-{epoch}")
        order = list(range(len(self)))
        rng.shuffle(order)
        window = max(256, batch_tokens // 4)
        batches: list[list[int]] = []
        for begin in range(0, len(order), window):
            batch: list[int] = []
            for entry in sorted(order[begin : begin + window], key=self.length):
                if batch and _padded(self.length(entry)) * (len(batch) + 1) > batch_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(entry)
            batches.append(batch)
        rng.shuffle(batches)
        return batches

    def take(self, batch: list[int], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, labels int64 [len(batch), padded length]; padded on the right, without loss."""
        width = _padded(max(self.length(entry) for entry in batch))
        ids = torch.full((len(batch), width), pad_id, dtype=torch.int64)
        labels = torch.full((len(batch), width), IGNORE, dtype=torch.int64)
        for row, entry in enumerate(batch):
            here = slice(self.starts[entry], self.starts[entry + 1])
            ids[row, : self.length(entry)] = self.ids[here]
            labels[row, : self.length(entry)] = self.labels[here]
        return ids, labels

    def digest(self) -> str:
        """A fingerprint of all tokens and labels."""
        parts = (self.ids.numpy().tobytes(), self.labels.numpy().tobytes(), repr(self.starts).encode())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO


# ---- training


class Trainer:
    """One run: the model in float32, AdamW, and where in the corpus it is."""

    def __init__(
        self, source: Path, config: ModelConfig, corpus: Corpus, settings: TrainingSettings, pad_id: int
    ) -> None:
        if config.quant is not None:
            raise ConfigError(
                f"fine-tuning {source}",
                f"its weights are {config.quant.bits}-bit GPTQ codes",
                "Fine-tune the unquantised checkpoint.",
            )
        self.corpus, self.settings, self.pad_id = corpus, settings, pad_id
        backend = Backend(torch.device("cpu"))
        self.model = Qwen(config, backend, torch.float32)
        if settings.from_scratch:
            initialise(self.model, settings.seed, _initializer_range(source))
        else:
            load_weights(self.model, source, config, backend, torch.float32, progress=False)
            self._own_weights()
        self.model.bind()
        self.parameters = dict(self.model.tensors())
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() == 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        betas = (0.9, settings.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=betas, weight_decay=settings.weight_decay, fused=True
        )
        self.schedule = [corpus.batches(settings.seed, e, settings.batch_tokens) for e in range(settings.epochs)]
        steps = sum(map(len, self.schedule))
        self.total_steps = min(steps, settings.max_steps or steps)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[tuple[int, float]] = []

    def _own_weights(self) -> None:
        """Loaded weights may be views of the file: training needs its own copy."""
        for name in self.model.tensor_specs:
            tensor = self.model.get(name)
            assert isinstance(tensor, torch.Tensor)
            self.model.set_tensor(name, tensor.clone())
        for name in self.model.linear_specs:
            packed = self.model.get(name)
            assert isinstance(packed, Packed)
            packed.data["weight"] = packed.data["weight"].clone()
            packed.bias = None if packed.bias is None else packed.bias.clone()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to min_learning_rate_ratio."""
        warmup = max(1, round(self.settings.warmup_ratio * self.total_steps))
        if step < warmup:
            return self.settings.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.total_steps - warmup)
        low = self.settings.min_learning_rate_ratio
        return self.settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def loss(self, batch: list[int]) -> tuple[torch.Tensor, int]:
        """Mean next-token cross-entropy over the labelled tokens of a batch, and the batch's real tokens."""
        ids, labels = self.corpus.take(batch, self.pad_id)
        rows, width = ids.shape
        plan = StepPlan([width] * rows, [width] * rows)
        hidden = self.model.forward(ids.flatten(), plan, [1] * rows)  # training is without NTK and LogN
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        chosen = (targets != IGNORE).nonzero().squeeze(1)
        logits = self.model.logits(hidden.index_select(0, chosen))
        return F.cross_entropy(logits, targets.index_select(0, chosen)), sum(map(self.corpus.length, batch))

    def train_step(self, batch: list[int]) -> float:
        """One update; the loss before it."""
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, tokens = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise QwenrtError(
                f"training step {self.step + 1}", f"the loss is {value}", "Use a smaller learning_rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += tokens
        return value

    def remaining(self) -> Iterator[list[int]]:
        """The batches from this step to the end."""
        batches = [batch for epoch in self.schedule for batch in epoch]
        yield from batches[self.step : self.total_steps]

    def run(self, target: Path, save_every: int | None, progress: bool | None) -> None:
        """All remaining steps, with a bar, keeping the state every ``save_every`` steps."""
        from tqdm import tqdm

        every = max(1, self.total_steps // 200)
        pending: list[float] = []
        disable = None if progress is None else not progress
        began, before = time.monotonic(), self.seconds
        bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", disable=disable)
        with bar:
            for batch in self.remaining():
                pending.append(self.train_step(batch))
                self.seconds = before + time.monotonic() - began
                bar.update()
                if self.step % every == 0 or self.step == self.total_steps:
                    self.losses.append((self.step, sum(pending) / len(pending)))
                    pending.clear()
                    speed = self.tokens / max(self.seconds, 1e-9)
                    bar.set_postfix_str(f"loss {self.losses[-1][1]:.3f}, {speed:.0f} tokens/s")
                if save_every and self.step % save_every == 0 and self.step < self.total_steps:
                    self.save_state(target / STATE_FILE)
                    _write_curve(target, self)

    # ---- state, so that a cut costs little

    def fingerprint(self) -> str:
        """What must be the same for a run to be continued."""
        return json.dumps([asdict(self.settings), self.corpus.digest(), self.total_steps], sort_keys=True)

    def save_state(self, path: Path) -> None:
        """Weights, both moments and the position, in one file that is replaced whole."""
        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        about = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "losses": self.losses}
        _save_atomically(tensors, path, {"fingerprint": self.fingerprint(), "state": json.dumps(about)})

    def load_state(self, path: Path) -> None:
        """Go on from what save_state wrote. CheckpointError where it belongs to another run or is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads(metadata["state"])
        except Exception as error:  # the library has no base class of its own
            raise CheckpointError(
                f"resuming from {path}", f"not readable ({str(error)[:80]})", "Delete it to begin anew."
            ) from error
        if metadata.get("fingerprint") != self.fingerprint():
            raise CheckpointError(
                f"resuming from {path}",
                "it belongs to a run with other data or settings",
                "Use the same ones, another output directory, or resume=False.",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight.{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(about["step"])),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }
        self.step, self.tokens, self.seconds = about["step"], about["tokens"], about["seconds"]
        self.losses = [(int(step), float(loss)) for step, loss in about["losses"]]

    def report(self, target: Path) -> FinetuneReport:
        final = self.losses[-1][1] if self.losses else math.nan
        return FinetuneReport(
            target, self.step, len(self.corpus), self.tokens, self.seconds, final, tuple(self.losses)
        )


def initialise(model: Qwen, seed: int, spread: float = 0.02) -> None:
    """Random weights: normal with deviation ``spread``, less where a residual is fed; norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=generator)

    for name, shape in model.tensor_specs.items():
        model.set_tensor(name, normal(shape, spread) if len(shape) > 1 else torch.ones(shape))
    for name, spec in model.linear_specs.items():
        into_residual = name.endswith(("o_proj", "down_proj"))
        deviation = spread / math.sqrt(2 * model.config.num_layers) if into_residual else spread
        weight = normal((spec.out_features, spec.in_features), deviation)
        bias = torch.zeros(spec.out_features) if spec.bias else None
        model.set_linear(name, Packed("dense", spec.out_features, spec.in_features, {"weight": weight}, bias))


def _initializer_range(source: Path) -> float:
    value = read_json(source / "config.json").get("initializer_range", 0.02)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else 0.02


# ---- writing


def write_checkpoint(model: Qwen, source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """``model`` as a complete Qwen-1 directory: its weights in ``dtype`` (None: the one config.json asks for, else
    bfloat16) under the checkpoint's names, and the configuration and tokenizer files of ``source``."""
    stored = dtype or _DTYPES[model.config.dtype or "bfloat16"]
    names = table_for(model.config.model_type)
    tensors: dict[str, torch.Tensor] = {}
    for param in model.tensor_specs:
        tensor = model.get(param)
        assert isinstance(tensor, torch.Tensor)
        tensors[names.source(param)] = tensor.detach().to(stored).contiguous()
    for param, spec in model.linear_specs.items():
        packed = model.get(param)
        assert isinstance(packed, Packed)
        blocks = names.parts(param)
        rows = [spec.out_features] if len(blocks) == 1 else [count for _, count in spec.parts]
        for kind, whole in (("weight", packed.data["weight"]), ("bias", packed.bias)):
            if whole is not None:
                for block, part in zip(blocks, whole.detach().split(rows), strict=True):
                    tensors[names.source(param, block, kind)] = part.to(stored).contiguous()
    if source.resolve() != target.resolve():
        for pattern in _COPIED:
            for file in sorted(source.glob(pattern)):
                shutil.copyfile(file, target / file.name)
    _save_atomically(tensors, target / "model.safetensors", {"format": "pt"})


def _save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A file that is either the old one or the new one, never half of one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_curve(target: Path, trainer: Trainer) -> None:
    curve = {
        "steps": trainer.step,
        "total_steps": trainer.total_steps,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "settings": asdict(trainer.settings),
        "loss": [[step, round(loss, 5)] for step, loss in trainer.losses],
    }
    partial = target / f"{CURVE_FILE}.partial"
    partial.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target / CURVE_FILE)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's own number of threads, put back afterwards."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
