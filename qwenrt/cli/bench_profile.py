"""qwenrt bench --profile: Qwen-1's table of speed and memory, for any model and precision.

The protocol is that of the README of 2023: one token of context, 2048 generated, their number over the seconds, and the
memory at its peak. Each row is measured in a process of its own, whose memory nothing else was in.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenrt import __version__
from qwenrt.cli import machine
from qwenrt.cli.options import given_options, load_model_or_shape
from qwenrt.cli.terminal import Terminal, readable_bytes
from qwenrt.errors import RequestError
from qwenrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from qwenrt.llm import LLM

PRECISIONS = ("stored", "int8", "int4")
_WARM_UP = 8  # tokens
ORDINARY = 151643  # ids below are no control tokens


def profile(args: argparse.Namespace) -> int:
    """Measure every row, print the table. Returns 1 where a row could not be measured; the others are shown."""
    terminal = Terminal()
    if args.plot is not None:
        from qwenrt.cli.plots import check_can_draw

        check_can_draw(args.plot)
    if args.context < 1:
        raise RequestError("--context", f"got {args.context}", "It must be at least 1.")
    if args.precisions is None:
        args.precisions = PRECISIONS if args.quantize is None else (args.quantize,)
    args.quantize = None  # each row has its own
    wanted = [(precision, tokens) for tokens in args.tokens for precision in args.precisions]
    if len(wanted) == 1 and args.json:
        terminal.result(measure(args, *wanted[0]))
        return 0
    rows = []
    for number, (precision, tokens) in enumerate(wanted, 1):
        if len(wanted) > 1:
            terminal.remark(f"{number} of {len(wanted)}: {precision}, {tokens} tokens")
        rows.append(_in_a_process(args, precision, tokens))
    measured = [row for row in rows if "error" not in row]
    if args.json:
        terminal.result(rows)
    else:
        terminal.say("\n".join([*table(rows), "", *(how_measured(measured) if measured else ())]))
    if args.plot is not None and measured:
        _draw(args.plot, measured, terminal)
    return 0 if len(measured) == len(rows) else 1


def measure(args: argparse.Namespace, precision: str, tokens: int) -> dict[str, Any]:
    """One row, in this process: loads the model, generates, and reads what memory that took at most."""
    context = args.context
    with _load(args, precision, context + tokens) as llm:
        longest = int(llm.stats()["max_model_len"])
        if context + tokens > longest:
            asked = f"{context} tokens of context and {tokens} generated"
            raise RequestError(asked, f"this model's context is {longest} tokens", "Lower --tokens.")
        _generate(llm, context, min(_WARM_UP, tokens), shown=False)
        seconds = _generate(llm, context, tokens, shown=True)
        stats, memory = llm.stats(), _device_peak(llm)
        return {
            "model": llm.name,
            "precision": precision,
            "label": f"{precision} ({llm.summary.split(' weights')[0].split(': ')[-1]})",
            "context": context,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": (context + tokens) / seconds,
            "memory_bytes": memory if memory is not None else machine.peak_rss_bytes(),
            "memory_of": "process" if memory is None else "device",
            "dtype": stats["dtype"],
            "kernels": stats["kernels"],
            "kv_cache_dtype": args.kv_cache_dtype,
            "device": str(llm.device),
            "machine": machine.in_words(machine.describe()),
            "torch": _torch_version(),
            "qwenrt": __version__,
        }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| Model | Precision | Context | Generated | Speed (tokens/s) | Memory at its peak |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['model']} | {row['precision']} | {row['context']} | {row['tokens']} | {row['error']} | |"
            )
            continue
        memory = "not known" if row["memory_bytes"] is None else readable_bytes(row["memory_bytes"])
        lines.append(
            f"| {row['model']} | {row['label']} | {row['context']} | {row['tokens']} "
            f"| {row['tokens_per_s']:.2f} | {memory} |"
        )
    return lines


def how_measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the figures are, on what, in words that go below the table."""
    first = rows[0]
    memory = (
        "the most that the process held, with Python, torch and the pages of mapped files"
        if first["memory_of"] == "process"
        else "the most that torch allocated on the device"
    )
    return [
        "One greedy answer of exactly that length, after a short one that is not counted.",
        f"Speed: (context + generated) / seconds. Memory: {memory}.",
        "Each row is a process of its own, with a cache for one answer.",
        f"{first['machine']}; device {first['device']}, {first['kernels']}; "
        f"qwenrt {first['qwenrt']}, torch {first['torch']}.",
    ]


def _load(args: argparse.Namespace, precision: str, length: int) -> LLM:
    return load_model_or_shape(
        args,
        max_num_seqs=1,
        quantize=None if precision == "stored" else precision,
        max_model_len=args.max_model_len or length + _WARM_UP,
    )


def _generate(llm: LLM, context: int, tokens: int, shown: bool) -> float:
    """Seconds for one answer of ``tokens`` to random ids."""
    from qwenrt.loader.progress import quiet_tqdm

    source = random.Random(context)
    ids = [source.randrange(min(llm.config.vocab_size, ORDINARY)) for _ in range(context)]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with quiet_tqdm(None if shown else False)(total=tokens, unit="token", leave=False, mininterval=1) as bar:
        began = time.perf_counter()
        written = 0
        for delta in llm.submit(llm.prepare(prompt_token_ids=ids, sampling_params=params)):
            written += len(delta.token_ids)
            bar.update(len(delta.token_ids))
        took = time.perf_counter() - began
    if written != tokens:
        raise RequestError(f"{tokens} tokens", f"the model wrote {written}", "Lower --tokens.")
    return took


def _in_a_process(args: argparse.Namespace, precision: str, tokens: int) -> dict[str, Any]:
    """A row, measured by this same command for one row. What goes wrong there is said on stderr by it."""
    model = args.shape if args.model is None else args.model
    command = [sys.executable, "-m", "qwenrt", "bench", "--model" if args.shape is None else "--shape", model]
    command += ["--profile", "--json", "--precisions", precision, "--tokens", str(tokens)]
    command += ["--context", str(args.context), *given_options(args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout)
        return row
    asked = {"model": model, "precision": precision, "context": args.context, "tokens": tokens}
    return asked | {"error": "failed: see its message"}


def _device_peak(llm: LLM) -> int | None:
    """The most that torch has allocated on an accelerator; None for a CPU, or a device that does not tell."""
    import torch

    if llm.device.type == "cpu":
        return None
    module = getattr(torch, llm.device.type, None)
    peak = getattr(module, "max_memory_allocated", None)
    return None if peak is None else int(peak(llm.device))


def _torch_version() -> str:
    import torch

    return torch.__version__


def _draw(path: Path, rows: Sequence[dict[str, Any]], terminal: Terminal) -> None:
    from qwenrt.cli.plots import draw_profile

    first = rows[0]
    several = len({row["tokens"] for row in rows}) > 1
    for row in rows:
        row["label"] += f", {row['tokens']} tokens" if several else ""
    sizes = (
        f"{first['context']} token of context"
        if first["context"] == 1
        else f"{first['context']} tokens of context"
    )
    generated = "" if several else f", {first['tokens']} generated"
    draw_profile(path, f"{first['model']} on {first['device']}: {sizes}{generated}", rows)
    terminal.remark(f"Drawn: {path}")
