"""qwenrt bench: prefill and decode speed, beside the memory bandwidth measured in the same run."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt import __version__
from qwenrt.cli import bench_profile, machine
from qwenrt.cli.options import MODEL_HELP, add_model_options, example, load_model_or_shape
from qwenrt.cli.terminal import Terminal, counted, readable_bytes
from qwenrt.errors import RequestError
from qwenrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

    from qwenrt.llm import LLM

_READ_BYTES = 512 * 2**20  # far more than any cache holds
EXAMPLES = """examples:
  qwenrt bench --shape Qwen-1_8B --quantize int4
  qwenrt bench --model demo --prompt-tokens 128 --new-tokens 32 --json
  qwenrt bench demo --profile --tokens 512

--shape takes random weights of that shape, so nothing is downloaded.
Every figure is the median over the rounds. Decode reads every weight once for
each step; bandwidth_fraction (--json) is the share of the memory's measured
read speed that this takes.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="how fast a model runs here",
        description="Measure how fast prompts are read (prefill), answers are written (decode), and memory is read.",
        **example(EXAMPLES),
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=MODEL_HELP)
    what.add_argument("--model", help="the same")
    what.add_argument(
        "--shape", help="random weights shaped like a released model: Qwen-1_8B, Qwen2.5-0.5B, Qwen3-4B, ..."
    )
    work = parser.add_argument_group("what is measured")
    work.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    work.add_argument("--new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    work.add_argument("--batch", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    work.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    _add_profile(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_model_options(parser)
    parser.set_defaults(command=bench)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the table of speed and memory")
    group.add_argument(
        "--profile",
        action="store_true",
        help="print that table in Markdown instead, one row for each precision: 2048 tokens after one, speed over "
        "all of them, memory at its peak",
    )
    group.add_argument(
        "--precisions",
        type=_precisions,
        default=None,
        metavar="P,...",
        help="of stored (as the files have the weights), int8, int4 (default: all; with --quantize, that one)",
    )
    group.add_argument(
        "--tokens",
        type=_token_counts,
        default=(2048,),
        metavar="N,...",
        help="generated, one set of rows for each (default: 2048; the table of 2023 had 8192 too)",
    )
    group.add_argument("--context", type=int, default=1, metavar="N", help="tokens before them (default: 1)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="also draw it (.svg, .png, .pdf)")


def _precisions(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(bench_profile.PRECISIONS):
        raise argparse.ArgumentTypeError(f"{text!r}: use some of {','.join(bench_profile.PRECISIONS)}")
    return found


def _token_counts(text: str) -> tuple[int, ...]:
    found = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r}: use numbers of tokens, such as 2048,8192")
    return found


@dataclass(frozen=True)
class Work:
    """What every round does."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int

    def __post_init__(self) -> None:
        for name, low in (("prompt_tokens", 1), ("new_tokens", 1), ("batch", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value < low:
                option = "--" + name.replace("_", "-")
                raise RequestError(option, f"got {value}", f"It must be at least {low}.")


@dataclass(frozen=True)
class Round:
    """Seconds for the prompts (their first tokens included), seconds for the other tokens, read bandwidth."""

    prefill_s: float
    decode_s: float
    read_bytes_per_s: float


def bench(args: argparse.Namespace) -> int:
    if args.profile:
        return bench_profile.profile(args)
    work = Work(args.prompt_tokens, args.new_tokens, args.batch, args.rounds)
    terminal = Terminal()
    with load_model_or_shape(args, max_num_seqs=max(16, args.batch)) as llm:
        _check_fits(llm, work)
        _generate(llm, random.Random(1), work, 2)  # warm up
        peak = machine.peak_rss_bytes()  # before the buffer below adds to it
        report = _report(llm, work, measure(llm, work, _buffer(llm), terminal))
        report["peak_rss_bytes"] = peak
        report["quantize"] = args.quantize
    if args.json:
        terminal.result(report)
    else:
        _show(report, terminal)
    return 0


def _check_fits(llm: LLM, work: Work) -> None:
    longest = llm.stats().get("max_model_len")
    needed = work.prompt_tokens + work.new_tokens + 1
    if longest is not None and needed > longest:
        raise RequestError(
            f"{work.prompt_tokens} prompt and {work.new_tokens} new tokens",
            f"this model's context is {longest} tokens",
            "Ask for fewer, or raise --max-model-len.",
        )


def measure(llm: LLM, work: Work, buffer: torch.Tensor, terminal: Terminal) -> list[Round]:
    """``work.rounds`` rounds. Each: read ``buffer``, then prefill alone, then prefill and decode.

    Prompts are random and new every time, so that nothing comes from the prefix cache.
    """
    source = random.Random(0)
    rounds = []
    for number in range(1, work.rounds + 1):
        bandwidth = _read_bandwidth(llm, buffer)
        prefill_s, _ = _generate(llm, source, work, 1)
        whole_s, after_first_s = _generate(llm, source, work, 1 + work.new_tokens)
        # Where the machine was slower at first than the few answers took, the engine's own clock tells.
        decode_s = whole_s - prefill_s if whole_s > prefill_s else after_first_s
        rounds.append(Round(prefill_s, max(decode_s, 1e-9), bandwidth))
        if terminal.looked_at:
            terminal.remark(
                f"round {number} of {work.rounds}: prompt {prefill_s:.2f} s, prompt and answer {whole_s:.2f} s"
            )
    return rounds


def _generate(llm: LLM, source: random.Random, work: Work, new_tokens: int) -> tuple[float, float]:
    """Seconds for a batch of new random prompts with ``new_tokens`` each; and of these, those after the last first
    token."""
    vocabulary = min(llm.config.vocab_size, bench_profile.ORDINARY)
    prompts = [[source.randrange(vocabulary) for _ in range(work.prompt_tokens)] for _ in range(work.batch)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    generations = llm.generate(prompt_token_ids=prompts, sampling_params=params)
    took = time.perf_counter() - started
    for generation in generations:
        if len(generation.token_ids) != new_tokens:
            raise RequestError(
                f"{new_tokens} tokens",
                f"the model wrote {len(generation.token_ids)}",
                "Raise --max-model-len.",
            )
    times = [generation.timing for generation in generations]
    return took, max(time.total_s for time in times) - max(time.first_token_s for time in times)


def _buffer(llm: LLM) -> torch.Tensor:
    """Memory to read, on the model's device; less than usual where there is little."""
    import torch

    free = machine.describe()["memory_free_bytes"] if llm.device.type == "cpu" else None
    size = _READ_BYTES if free is None else max(2**20, min(_READ_BYTES, free // 4))
    return torch.ones(size // 8, dtype=torch.int64, device=llm.device)


def _read_bandwidth(llm: LLM, buffer: torch.Tensor) -> float:
    """Bytes per second of reading ``buffer`` once with all threads: the median of five readings."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        llm.backend.read(buffer)
        times.append(time.perf_counter() - started)
    return buffer.nbytes / statistics.median(times)


def _report(llm: LLM, work: Work, rounds: list[Round]) -> dict[str, Any]:
    import torch

    prefill_s = statistics.median(r.prefill_s for r in rounds)
    decode_s = statistics.median(r.decode_s for r in rounds)
    bandwidth = statistics.median(r.read_bytes_per_s for r in rounds)
    stats = llm.stats()
    weight_bytes = stats["weight_bytes_per_token"]
    fractions = [weight_bytes * work.new_tokens / r.decode_s / r.read_bytes_per_s for r in rounds]
    return {
        "model": llm.name,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "batch": work.batch,
        "rounds": work.rounds,
        "prefill_tokens_per_s": work.batch * work.prompt_tokens / prefill_s,
        "decode_tokens_per_s": work.batch * work.new_tokens / decode_s,
        "weight_bytes_per_token": weight_bytes,
        "read_bandwidth_bytes_per_s": bandwidth,
        "bandwidth_fraction": statistics.median(fractions),
        "load_s": stats["load_s"],
        "kernels": stats["kernels"],
        "activations": stats["activations"],
        "dtype": stats["dtype"],
        "machine": machine.in_words(machine.describe()),
        "device": str(llm.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "qwenrt": __version__,
    }


def _show(report: dict[str, Any], terminal: Terminal) -> None:
    from qwenrt.summary import activations

    quantized = f"rounded to {report['quantize']} at load" if report["quantize"] else "not rounded at load"
    terminal.row("model", f"{report['model']}, computed in {report['dtype']}, {quantized}")
    terminal.row("kernels", report["kernels"])
    rounded = activations(report["activations"].split("+"), report["dtype"]) if report["activations"] else ""
    if rounded:
        terminal.row("activations", f"{rounded} where weights are quantised")
    terminal.row("machine", report["machine"])
    terminal.row(
        "versions",
        f"qwenrt {report['qwenrt']}, torch {report['torch']}, {counted(report['threads'], 'thread')}",
    )
    size = f"{report['prompt_tokens']} prompt and {report['new_tokens']} new tokens"
    terminal.row("work", f"{counted(report['batch'], 'request')} of {size}, {_rounds(report['rounds'])}")
    terminal.row("prefill", f"{report['prefill_tokens_per_s']:.1f} prompt tokens/s", "bold")
    terminal.row("decode", f"{report['decode_tokens_per_s']:.1f} new tokens/s", "bold")
    terminal.row(
        "weights",
        f"{readable_bytes(report['weight_bytes_per_token'])}, all read once for each step of decode",
    )
    terminal.row(
        "memory speed", f"{readable_bytes(report['read_bandwidth_bytes_per_s'])}/s, measured in the same run"
    )
    terminal.row("used by decode", f"{100 * report['bandwidth_fraction']:.0f} % of that speed")
    terminal.row("load", f"{report['load_s']:.1f} s")
    if report["peak_rss_bytes"] is not None:
        terminal.row("peak memory", readable_bytes(report["peak_rss_bytes"]))


def _rounds(count: int) -> str:
    return "one round" if count == 1 else f"median of {count} rounds"
