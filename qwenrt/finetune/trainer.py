"""One training run: steps over a corpus, what is measured on the way, and going on after a cut."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from qwenrt.errors import CheckpointError, QwenrtError
from qwenrt.files import is_there
from qwenrt.finetune.data import Corpus
from qwenrt.finetune.interrupt import held_interrupt
from qwenrt.finetune.network import Network
from qwenrt.finetune.optimizer import Optimizer
from qwenrt.finetune.processes import Group
from qwenrt.finetune.settings import TrainingSettings
from qwenrt.finetune.state import BEST_FILE, CURVE_FILE, STATE_FILE, read_state, write_state
from qwenrt.loader.checkpoint.directory import write_json

FEW_STEPS = 50
LEAST_CHANGE = (
    0.01  # of a weight's usual size; a run that can change less leaves what the model says as it was
)
_SPIKE, _NORMS, _LEAST_NORMS = 100.0, 200, 50
logger = logging.getLogger("qwenrt")


@dataclass
class Progress:
    """Where a run is, and what it has measured. ``losses``: (step, mean loss since the last entry); ``held_out``:
    (step, loss on what is held out); ``norms``: of the last steps' gradients; ``spikes``: steps left out."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    spikes: int = 0

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the step that did best on what is held out."""
        return min(self.held_out, key=lambda entry: (entry[1], entry[0]), default=None)


class Trainer:
    """``identity``: what decides the result besides settings and data, by name. ``held_out``: what is measured
    and never learned.
    ``group``: the processes that share the run."""

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        corpus: Corpus,
        settings: TrainingSettings,
        identity: Mapping[str, object],
        held_out: Corpus | None = None,
        group: Group | None = None,
    ) -> None:
        self.group = group or Group()
        self.network, self.optimizer, self.settings = network, optimizer, settings
        self.corpus, self.held_out = corpus, held_out
        held_out_digest = None if held_out is None else held_out.digest()
        decides = {name: value for name, value in asdict(settings).items() if name != "shard"}
        self._identity = {
            **decides,
            **identity,
            "data": corpus.digest(),
            "held_out": held_out_digest,
        }
        self.schedule: list[list[list[int]]] = []
        steps = 0
        for epoch in range(settings.epochs):
            if settings.max_steps is None or steps < settings.max_steps:
                self.schedule.append(corpus.batches(settings.seed, epoch, settings.batch_tokens))
                steps += len(self.schedule[-1])
        self.total_steps = min(steps, settings.max_steps or steps)
        self.progress = Progress()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to min_learning_rate_ratio."""
        steps, peak = self.settings.decay_steps or self.total_steps, self.settings.peak_rate
        warmup = max(1, round(self.settings.warmup_ratio * steps))
        if step < warmup:
            return peak * (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        low = self.settings.min_learning_rate_ratio
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))

    def too_short_to_learn(self) -> str | None:
        """A warning where all steps together can hardly change the model, else None. AdamW moves a weight by about the
        learning rate in each step, whatever the gradient."""
        change = sum(map(self.learning_rate, range(self.total_steps)))
        more = "more epochs, a smaller batch_tokens (steps in an epoch now: " + f"{len(self.schedule[0])})"
        matrices = [p.detach() for p in self.optimizer.parameters.values() if p.dim() > 1]
        squares = sum(float(p.float().square().sum()) for p in matrices)
        usual = math.sqrt(squares / max(1, sum(p.numel() for p in matrices)))
        if self.settings.method != "lora" and change < LEAST_CHANGE * usual:
            return (
                f"With a learning_rate of {self.settings.peak_rate:g} all the steps ({self.total_steps}) change "
                f"a weight by about {change:.1g}, where {usual:.1g} is usual: the model will say what it said before. "
                f"Use {more} or a larger learning_rate."
            )
        if self.total_steps < FEW_STEPS:
            return f"{self.total_steps} steps are few to learn from. Use {more}."
        return None

    # ---- steps

    def loss(self, samples: list[int]) -> float:
        """The mean loss over the learned tokens of samples, without learning."""
        return self._measure(self.corpus, samples)

    def _measure(self, corpus: Corpus, samples: list[int]) -> float:
        total, learned = 0.0, 0
        with torch.no_grad():
            for micro in corpus.split(sorted(samples, key=corpus.length), self._micro_tokens):
                total += float(self.network.loss(*corpus.take(micro))[0])
                learned += sum(map(corpus.learned, micro))
        return total / learned

    @property
    def _micro_tokens(self) -> int:
        return self.settings.micro_tokens or self.settings.batch_tokens

    def gradients(self, samples: list[int]) -> float:
        """Add the gradients of the loss of one step's samples; the loss. It is the sum over the learned tokens divided
        by the number of those in the whole step, however the step is cut and whoever computes it."""
        corpus, network = self.corpus, self.network
        learned = sum(map(corpus.learned, samples))
        tokens = sum(map(corpus.length, samples))
        total = torch.zeros((), dtype=torch.float64)
        seed = self.settings.seed * 2**31 + self.progress.step * self.group.size + self.group.rank
        with _seeded(network.backend.device, seed):
            for micro, counts in self._passes(samples):
                summed, balance = network.loss(*corpus.take(micro))
                summed, balance = summed * counts, balance * counts
                objective = summed / learned
                if network.balance:
                    share = sum(map(corpus.length, micro)) / tokens
                    objective = objective + network.balance * balance * share
                (objective * self.optimizer.scale).backward()  # type: ignore[no-untyped-call]
                total += summed.detach().double().cpu()
        self.optimizer.complete()
        if self.group.size > 1:
            total = total.float().to(network.backend.device)
            self.group.sum([*self.optimizer.gradients(shared=False), total])
        return float(total / learned)

    def _passes(self, samples: list[int]) -> Iterator[tuple[list[int], float]]:
        """This process's passes of a step, and how much each counts. Where weights are shared out, who has fewer than
        others makes up for them with passes that count nothing, as layers are gathered by all."""
        ordered = sorted(samples, key=self.corpus.length)
        each = [
            self.corpus.split(ordered[rank :: self.group.size], self._micro_tokens)
            for rank in range(self.group.size)
        ]
        own = each[self.group.rank]
        yield from ((micro, 1.0) for micro in own)
        if self.network.sharding is not None:
            yield from ((ordered[:1], 0.0) for _ in range(max(map(len, each)) - len(own)))

    def train_step(self, samples: list[int]) -> float:
        """One update; the loss before it."""
        now = self.progress
        value = self.gradients(samples)
        if not math.isfinite(value):
            raise QwenrtError(
                f"training step {now.step + 1}",
                f"the loss is {value}{self._first_bad(samples)}",
                "Use a smaller learning_rate.",
            )
        norm = self.optimizer.norm()
        if self.optimizer.overflowed(norm):
            logger.info(
                "step %d: float16 overflowed, the loss is scaled by %g now",
                now.step + 1,
                self.optimizer.scale,
            )
        elif not math.isfinite(norm):
            remedy = "Use a smaller learning_rate."
            raise QwenrtError(f"training step {now.step + 1}", f"the gradient is {norm}", remedy)
        elif not self._is_spike(norm):
            self.optimizer.step(self.learning_rate(now.step), norm)
        now.step += 1
        now.tokens += sum(map(self.corpus.length, samples))
        return value

    def _is_spike(self, norm: float) -> bool:
        """Whether a gradient is so much larger than usual that the step is left out. QwenrtError at the second one in a
        row."""
        now, usual = self.progress, 0.0
        if len(now.norms) >= _LEAST_NORMS:
            usual = statistics.median(now.norms)
        if usual and norm > max(_SPIKE * usual, self.settings.max_grad_norm):
            if now.spikes:
                raise QwenrtError(
                    f"training step {now.step + 1}",
                    f"the gradient is {norm:.3g} after one left out before, {usual:.3g} is usual",
                    "Use a smaller learning_rate, or look for entries that are unlike the others.",
                )
            now.spikes = 1
            logger.warning(
                "step %d is left out: its gradient is %.3g, %.3g is usual", now.step + 1, norm, usual
            )
            self.optimizer.forget()
            return True
        now.spikes = 0
        now.norms = [*now.norms[1 - _NORMS :], norm]
        return False

    def _first_bad(self, samples: list[int]) -> str:
        """Where in the network numbers stop being finite."""
        for micro in self.corpus.split(sorted(samples, key=self.corpus.length), self._micro_tokens):
            ids, _, lengths = self.corpus.take(micro)
            where = self.network.first_not_finite(ids, lengths)
            if where is not None:
                return f", from {where} on"
        return ""

    def remaining(self) -> Iterator[list[int]]:
        """The samples of each step from this one to the end."""
        batches = [batch for epoch in self.schedule for batch in epoch]
        yield from batches[self.progress.step : self.total_steps]

    def run(self, target: Path, save_every: int | None, progress: bool | None) -> None:
        """All remaining steps, with a bar, keeping the state every ``save_every`` steps; then the best step's weights
        are put in place."""
        from tqdm import tqdm

        now, every = self.progress, max(1, self.total_steps // 200)
        disable = None if progress is None else not progress
        began, before = time.monotonic(), now.seconds
        bar = tqdm(total=self.total_steps, initial=now.step, desc="training", unit="step", disable=disable)
        with bar, held_interrupt() as interrupt:
            for samples in self.remaining():
                now.pending.append(self.train_step(samples))
                now.seconds = before + time.monotonic() - began
                bar.update()
                if now.step % every == 0 or now.step == self.total_steps:
                    now.losses.append((now.step, sum(now.pending) / len(now.pending)))
                    now.pending.clear()
                    speed = now.tokens / max(now.seconds, 1e-9)
                    bar.set_postfix_str(f"loss {now.losses[-1][1]:.3f}, {speed:.0f} tokens/s")
                self._look_at_held_out(target)
                pressed = self.group.any(interrupt.pressed, self.network.backend.device)
                keep = pressed or (save_every and now.step % save_every == 0)
                if keep and now.step < self.total_steps:
                    self._keep(target)
                    if pressed:
                        raise KeyboardInterrupt(
                            f"stopped after step {now.step} of {self.total_steps}; they are kept in "
                            f"{target / STATE_FILE}, and the same call goes on from there"
                        )
        self._take_best(target)

    def _keep(self, target: Path) -> None:
        self.save_state(target / STATE_FILE)
        if self.group.rank == 0:
            self.save_curve(target)
        self.group.wait()

    # ---- what is held out

    @property
    def eval_every(self) -> int:
        return self.settings.eval_every or max(1, self.total_steps // 10)

    def _look_at_held_out(self, target: Path) -> None:
        now = self.progress
        if self.held_out is None or (now.step % self.eval_every and now.step != self.total_steps):
            return
        now.held_out.append((now.step, self._measure(self.held_out, list(range(len(self.held_out))))))
        logger.info("step %d: loss %.4f on what is held out", *now.held_out[-1])
        if self.settings.keep == "best" and now.best == now.held_out[-1] and now.step < self.total_steps:
            weights = self.optimizer.weights()
            if self.group.rank == 0:
                write_state(target / BEST_FILE, weights, self.identity(), {"step": now.step})

    def _take_best(self, target: Path) -> None:
        best = self.progress.best
        if best is None or self.settings.keep == "last" or best[0] == self.progress.step:
            return
        self.group.wait()
        tensors, about = read_state(target / BEST_FILE, self.identity())
        assert about["step"] == best[0]
        for name in self.optimizer.masters:
            self.optimizer.set_master(name, tensors[f"weight.{name}"])
        self.group.wait()  # the first one removes the file

    def save_curve(self, target: Path) -> None:
        """The losses so far, for a plot."""
        now = self.progress
        curve = {
            "steps": now.step,
            "total_steps": self.total_steps,
            "tokens": now.tokens,
            "seconds": round(now.seconds, 1),
            "settings": asdict(self.settings),
            "loss": [[step, round(loss, 5)] for step, loss in now.losses],
            "held_out": [[step, round(loss, 5)] for step, loss in now.held_out],
        }
        write_json(target / CURVE_FILE, curve)

    # ---- the state that is kept, so that little is lost when a run is cut

    def identity(self) -> dict[str, object]:
        """Everything that decides the result, by name: what must be the same for a run to be continued."""
        return self._identity

    def save_state(self, path: Path) -> None:
        """What is trained, both moments and the position. All processes call it, and the first one writes."""
        about = {"progress": asdict(self.progress), "optimizer": self.optimizer.about()}
        tensors = self.optimizer.tensors()
        if self.group.rank == 0:
            write_state(path, tensors, self.identity(), {**about, "processes": self.group.size})

    def load_state(self, path: Path) -> None:
        """Go on from what save_state wrote. CheckpointError where it belongs to another run or is damaged."""
        tensors, about = read_state(path, self.identity())
        if self.group.rank == 0 and (before := about.get("processes")) != self.group.size:
            logger.warning(
                "going on with %d processes, where there were %s before: sums are rounded otherwise in their last bits",
                self.group.size,
                before,
            )
        try:
            self.optimizer.restore(tensors, about["optimizer"])
            self.progress = Progress(**about["progress"])
        except (KeyError, TypeError, RuntimeError) as error:
            found = f"not readable ({str(error)[:80]})"
            raise CheckpointError(f"resuming from {path}", found, "Delete it to begin anew.") from error
        for name in ("losses", "held_out"):
            pairs = [(int(step), float(loss)) for step, loss in getattr(self.progress, name)]
            setattr(self.progress, name, pairs)
        best = self.progress.best
        kept = path.with_name(BEST_FILE)
        needed = best is not None and self.settings.keep == "best" and best[0] < self.total_steps
        if best is not None and needed and not is_there(kept, CheckpointError):
            found = f"{kept} is not there, which holds the weights of step {best[0]}, the best so far"
            remedy = f'Put it back, use keep="last" with resume=False, or delete {path.name} to begin anew.'
            raise CheckpointError(f"resuming from {path}", found, remedy)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Within the block chance, as what is dropped out, is that of a seed; outside it goes on as before."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(others, device_type=device.type if others else "cuda"):
        torch.manual_seed(seed)
        yield
