"""What a user may choose for a training run, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwenrt.arguments import as_integer, as_number, flag
from qwenrt.errors import RequestError, shown

Method = Literal["auto", "full", "lora", "qlora"]  # the last is turned into the one before (job.py)
Precision = Literal["auto", "float32", "bfloat16", "bfloat16-pure", "float16"]
Recompute = Literal["auto", "all", "none"]
Keep = Literal["best", "last"]
Router = Literal["auto", "trained", "frozen"]
Shard = Literal["no", "optimizer", "all"]
Moments = Literal["float32", "bfloat16"]
FULL_RATE, LORA_RATE = 1e-5, 2e-4  # learning rates where none is given


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the result of a training run.

    ``epochs``; ``max_steps`` (ends earlier); ``learning_rate`` with cosine decay over ``decay_steps`` (None: all) down
    to ``min_learning_rate_ratio`` of it, after ``warmup_ratio`` of them; ``batch_tokens`` per step, of which
    ``micro_tokens`` are computed at a time (None: all); ``max_length``: longer samples are cut on the right, and where
    more than ``max_dropped`` of the entries then have nothing to learn, they are refused; ``weight_decay`` and
    ``adam_beta2`` of AdamW; ``max_grad_norm``; ``seed``; ``from_scratch`` begins with random weights of the shape in
    config.json. ``precision``: "float32"; "bfloat16" or "float16", in which the network computes while updates are
    made in float32; "bfloat16-pure", which keeps nothing in float32 and is less exact; "auto". ``recompute``: "all"
    keeps one layer's activations at a time, "none" all of them, "auto" all where they fit. ``moments``: "bfloat16"
    keeps those of AdamW so, rounded up or down by chance, and gradients in what the network computes in. ``shard``:
    what the processes of a run share out instead of having it each: "optimizer" what is trained, with its gradients
    and moments; "all" what a layer computes with too, but while it does; "no" nothing. ``router`` "frozen" leaves
    what chooses experts as it is. ``eval_every`` steps (None: ten times) the loss on what is held out is measured, and
    the ``keep`` "best" step is written, or the "last".
    """

    method: Method = "auto"
    epochs: int = 5
    max_steps: int | None = None
    decay_steps: int | None = None
    learning_rate: float | None = None
    min_learning_rate_ratio: float = 0.0
    batch_tokens: int = 4096
    micro_tokens: int | None = None
    max_length: int = 512
    warmup_ratio: float = 0.01
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    from_scratch: bool = False
    precision: Precision = "auto"
    recompute: Recompute = "auto"
    router: Router = "auto"
    moments: Moments = "float32"
    shard: Shard = "no"
    eval_every: int | None = None
    keep: Keep = "best"
    max_dropped: float = 0.1

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("epochs", "batch_tokens", "max_length")}
        optional = ("max_steps", "decay_steps", "micro_tokens", "eval_every")
        counts |= {name: getattr(self, name) for name in optional if getattr(self, name) is not None}
        for name, value in counts.items():
            object.__setattr__(self, name, whole_number(name, value, 1))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        object.__setattr__(self, "from_scratch", flag("from_scratch", self.from_scratch))
        limits = {
            "min_learning_rate_ratio": (0.0, 1.0),
            "warmup_ratio": (0.0, 1.0),
            "weight_decay": (0.0, 10.0),
            "adam_beta2": (0.0, 0.999999),
            "max_grad_norm": (1e-6, 1e6),
            "max_dropped": (0.0, 1.0),
        }
        if self.learning_rate is not None:
            limits["learning_rate"] = (0.0, 10.0)
        for name, (low, high) in limits.items():
            object.__setattr__(self, name, number_between(name, getattr(self, name), low, high))
        choices = {
            "method": get_args(Method),
            "precision": ("auto", "float32", "bfloat16", "bfloat16-pure", "float16"),
            "recompute": ("auto", "all", "none"),
            "router": ("auto", "trained", "frozen"),
            "keep": ("best", "last"),
            "moments": get_args(Moments),
            "shard": get_args(Shard),
        }
        for name, known in choices.items():
            chosen(name, getattr(self, name), known)

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LORA_RATE if self.method == "lora" else FULL_RATE


def whole_number(name: str, value: object, least: int) -> int:
    """An integer from ``least`` to 2^31. Raises RequestError."""
    number = as_integer(value)
    if number is None or not least <= number <= 2**31:
        remedy = f"Use an integer of at least {least}."
        raise RequestError(f"{name}={shown(value)}", "not a usable number", remedy)
    return number


def number_between(name: str, value: object, low: float, high: float) -> float:
    """A number from ``low`` to ``high``. Raises RequestError."""
    number = as_number(value)
    if number is None or not low <= number <= high:
        remedy = f"Use a number from {low:g} to {high:g}."
        raise RequestError(f"{name}={shown(value)}", "not a number in range", remedy)
    return number


def chosen(name: str, value: object, known: tuple[str, ...]) -> None:
    """RequestError where ``value`` is none of the words."""
    if not isinstance(value, str) or value not in known:
        raise RequestError(f"{name}={shown(value)}", "not known", f"Use one of {', '.join(known)}.")
