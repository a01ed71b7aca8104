"""What rounding weights costs a model's predictions: python -m benchmarks.quality DIR.

The same texts go through the model as its file has it, in float32, and with the linears of its layers rounded in each
of several ways; embedding and head stay as they are. For each way: bits a weight with scales and zeros, the mean
divergence (Kullback-Leibler) of the next token's probabilities from the exact ones with its standard error, the share
of places where the likeliest token is the same, and the perplexity. The texts are files of this repository, which
change with it, or what the model writes: figures are compared within one run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.workers import ROOT
from qwenrt.backends.cpu import CPUBackend
from qwenrt.config import read_model_config
from qwenrt.engine.model_runner import ntk_alpha
from qwenrt.loader.weights import load_weights
from qwenrt.loading import load_tokenizer
from qwenrt.model.qwen import Qwen
from qwenrt.ops.steps import StepPlan
from qwenrt.ops.types import CanonicalWeight
from qwenrt.quantize import QuantizeSettings
from qwenrt.quantize.self_written import write_texts
from qwenrt.text.tokenizer.tokenizer import Tokenizer

TEXTS = ("README.md", "README_zh.md", "qwenrt/engine/scheduler.py", "csrc/pool/thread_pool.cpp")
WRITTEN = 16
CPU = torch.device("cpu")
Rounding = Callable[[torch.Tensor, "torch.Tensor | None", str], CanonicalWeight]


@dataclass(frozen=True)
class Way:
    """``quantize`` as of qwenrt.load; ``rounding``, if any, is used in place of what that stands for. ``directory``: of
    the same model, quantised before."""

    quantize: str | None = None
    rounding: Rounding | None = None
    directory: Path | None = None


@dataclass(frozen=True)
class Quality:
    """``divergence`` in nats a token, with the standard error of its mean; ``agreement`` from 0 to 1."""

    bits: float
    divergence: float
    error: float
    agreement: float
    perplexity: float


class RoundedCPU(CPUBackend):
    """The CPU's backend with another way of rounding dense weights."""

    rounding: Rounding | None = None

    def quantize_dense(
        self, weight: torch.Tensor, bits: int, group_size: int, bias: torch.Tensor | None, name: str
    ) -> CanonicalWeight:
        if self.rounding is None:
            return super().quantize_dense(weight, bits, group_size, bias, name)
        return self.rounding(weight, bias, name)


def groups_of(size: int, bits: int = 4) -> Way:
    """qwenrt's own rounding in groups of another size."""

    def rounding(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> CanonicalWeight:
        return CPUBackend(CPU).quantize_dense(weight, bits, size, bias, name)

    return Way("int4", rounding)


def q4_0(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> CanonicalWeight:
    """llama.cpp's Q4_0, bit for bit: the value furthest from zero of 32 becomes -8 steps, the others are rounded to
    steps of that size; the scale is kept in float16, with its sign."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // 32, 32)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scales = furthest / -8
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = (groups * inverse[..., None] + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return CanonicalWeight(
        codes=codes.view(rows, columns).t().contiguous(),
        scales=scales.to(torch.float16).t().contiguous(),
        zeros=torch.full((columns // 32, rows), 8, dtype=torch.int16),
        bits=4,
        group_size=32,
        bias=bias,
    )


WAYS = {
    "int8": Way("int8"),
    "int4": Way("int4"),
    "int4 in groups of 128": groups_of(128),
    "int4 in groups of 64": groups_of(64),
    "Q4_0": Way("int4", q4_0),
}


def network(directory: Path, way: Way, threads: int | None = None) -> Qwen:
    """The model of a directory with qwenrt's own kernels. What these round on the way is 1e-7 of what is measured."""
    backend = RoundedCPU(CPU)
    backend.configure(num_threads=threads)
    backend.rounding = way.rounding
    directory = way.directory or directory
    config = read_model_config(directory)
    model = Qwen(config, backend, torch.float32)
    load_weights(model, directory, config, backend, torch.float32, quantize=way.quantize, progress=False)
    model.bind()
    return model


@torch.no_grad()
def log_probabilities(model: Qwen, ids: Sequence[int]) -> torch.Tensor:
    """Of every next token -> float32 [len(ids), vocab_size]."""
    n = len(ids)
    hidden = model.forward(torch.tensor(ids), StepPlan([n], [n]), [ntk_alpha(n, model.config)])
    return model.logits(hidden).log_softmax(-1)


def bits_a_weight(model: Qwen) -> float:
    """Of the layers' linears, biases left out."""
    layers = [
        packed for name, packed in zip(model.linear_specs, model.linears(), strict=True) if name != "lm_head"
    ]
    nbytes = sum(packed.nbytes - (0 if packed.bias is None else packed.bias.nbytes) for packed in layers)
    return 8 * nbytes / sum(packed.out_features * packed.in_features for packed in layers)


def compare(model: Qwen, texts: Sequence[Sequence[int]], exact: Sequence[torch.Tensor]) -> Quality:
    """``exact``: log_probabilities of the same ``texts`` without rounding."""
    divergences, same, likelihoods = [], [], []
    for ids, wanted in zip(texts, exact, strict=True):
        got = log_probabilities(model, ids)
        divergences.append((wanted.exp() * (wanted - got)).sum(-1))
        same.append(wanted.argmax(-1) == got.argmax(-1))
        likelihoods.append(_likelihoods(got, ids))
    divergence = torch.cat(divergences)
    return Quality(
        bits_a_weight(model),
        float(divergence.mean()),
        float(divergence.std() / len(divergence) ** 0.5),
        float(torch.cat(same).float().mean()),
        _perplexity(likelihoods),
    )


def _likelihoods(found: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    return found[:-1].gather(-1, torch.tensor(ids)[1:, None])


def _perplexity(likelihoods: Sequence[torch.Tensor]) -> float:
    return math.exp(-float(torch.cat(list(likelihoods)).mean()))


def our_texts(directory: Path, tokens: int) -> list[list[int]]:
    """The beginnings of TEXTS."""
    tokenizer = Tokenizer.from_dir(directory)
    return [tokenizer.encode((ROOT / name).read_text(encoding="utf-8"))[:tokens] for name in TEXTS]


def written_texts(directory: Path, tokens: int, seed: int) -> list[list[int]]:
    """Conversations that the model writes, as `qwenrt quantize` has them written to calibrate on."""
    settings = QuantizeSettings(samples=WRITTEN, sample_length=tokens, seed=seed)
    return write_texts(directory, load_tokenizer(directory), settings, progress=False)


def measure(
    directory: Path, ways: dict[str, Way], texts: Sequence[Sequence[int]], say: Callable[[str], None]
) -> dict[str, Any]:
    """-> the exact model's perplexity of ``texts``, and a Quality for each way."""
    model = network(directory, Way())
    exact = [log_probabilities(model, ids) for ids in texts]
    whole = _perplexity([_likelihoods(found, ids) for found, ids in zip(exact, texts, strict=True)])
    say(f"{directory.name}: {sum(map(len, texts))} tokens, perplexity {whole:.3f}")
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found: dict[str, Any] = {"model": directory.name, "tokens": len(texts[0]), "when": when}
    found |= {"perplexity": whole, "ways": {}}
    for name, way in ways.items():
        del model  # one at a time in memory
        model = network(directory, way)
        quality = compare(model, texts, exact)
        say(row(name, quality))
        found["ways"][name] = asdict(quality)
    return found


def row(name: str, q: Quality) -> str:
    return (
        f"| {name} | {q.bits:.2f} | {q.divergence:.4f} ± {q.error:.4f} | {100 * q.agreement:.1f} % "
        f"| {q.perplexity:.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, help="a checkpoint with dense weights and a tokenizer")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of: %(default)s")
    parser.add_argument(
        "--quantized",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="what `qwenrt quantize` made of it",
    )
    parser.add_argument("--tokens", type=int, default=300, help="of each text (default: %(default)s)")
    parser.add_argument(
        "--written",
        type=int,
        metavar="SEED",
        help=f"{WRITTEN} conversations that the model writes with this seed, not texts of this repository",
    )
    parser.add_argument("--json", type=Path, help="a file that the figures go into as well")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.ways.split(",") if name not in WAYS]
    if unknown:
        raise SystemExit(f"--ways {','.join(unknown)}: unknown. There are: {', '.join(WAYS)}.")
    ways = {name: WAYS[name] for name in args.ways.split(",")}
    ways |= {directory.name: Way(directory=directory) for directory in args.quantized}
    if args.written is None:
        texts = our_texts(args.directory, args.tokens)
    else:
        texts = written_texts(args.directory, args.tokens, args.written)
    found = measure(args.directory, ways, texts, lambda text: print(text, flush=True))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
