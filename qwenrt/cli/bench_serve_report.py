"""What `qwenrt bench serve` reports: a table for people, JSON for programs, a file and a picture to keep."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenrt import __version__
from qwenrt.cli import machine
from qwenrt.cli.bench_serve_options import SIZES
from qwenrt.cli.terminal import Terminal, counted, readable_bytes

if TYPE_CHECKING:
    from qwenrt.load_test.client import OpenAIServer
    from qwenrt.load_test.running import LoadRun
    from qwenrt.load_test.workloads import Workload


@dataclass(frozen=True)
class Measured:
    """The figures of a run and its raw times. ``count``: what counted tokens that the server did not tell;
    ``interrupted``: by Ctrl-C."""

    found: dict[str, Any]
    run: LoadRun
    count: Callable[[str], int] | None
    interrupted: bool


def settings(args: argparse.Namespace, workload: Workload, server: OpenAIServer) -> dict[str, Any]:
    """What was measured, where and with what."""
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if args.endpoint == "chat" else "openai",
        "base_url": str(server.address),
        "model_id": server.model,
        "tokenizer_id": args.tokenizer or server.model,
        "qwenrt": __version__,
        "machine": machine.in_words(machine.describe()),
        "workload": {"name": workload.name, "seed": args.seed}
        | {name: getattr(workload, name) for name in SIZES},
        "ignore_eos": args.ignore_eos,
        "extra_body": args.extra_body,
    }


def report(args: argparse.Namespace, measured: Measured, terminal: Terminal) -> None:
    """Show it, and keep it where ``args`` say."""
    from qwenrt.load_test.figures import details, warnings

    found, run, count = measured.found, measured.run, measured.count
    if args.json:
        terminal.result(found)
    else:
        _show(measured, args.percentiles, terminal)
    for warning in warnings(found):
        terminal.warn(warning)
    if args.save is not None:
        text = json.dumps(found | details(run, count), ensure_ascii=False)
        args.save.write_text(text + "\n", encoding="utf-8")
        terminal.remark(f"Written: {args.save}")
    if args.plot is not None and found["completed"]:
        from qwenrt.cli.plots import draw_run

        draw_run(args.plot, found, run, count)
        terminal.remark(f"Drawn: {args.plot}")


def _show(measured: Measured, percentiles: Sequence[float], terminal: Terminal) -> None:
    from qwenrt.load_test.figures import LATENCIES

    found = measured.found
    terminal.row("server", f"{found['base_url']}, model {found['model_id']}, {found['backend']}")
    terminal.row("load", _load_in_words(found))
    terminal.row("answers", _answers_in_words(found, measured.interrupted))
    cached = found["total_cached_tokens"]
    terminal.row(
        "prompt tokens",
        _tokens(found["total_input_tokens"]) + (f", {cached} of them from a cache" if cached else ""),
    )
    by = found["tokens_counted_by"]
    terminal.row("answer tokens", f"{_tokens(found['total_output_tokens'])}, counted by {by}")
    if found["output_throughput"] is not None:
        terminal.row("throughput", f"{found['output_throughput']:.1f} answer tokens/s", "bold")
        whole, busiest = found["total_token_throughput"], found["max_output_tokens_per_s"]
        prompts = "" if whole is None else f"{whole:.1f} tokens/s with prompts, "
        terminal.row("", f"{prompts}{busiest:.0f} answer tokens in the busiest second")
    if found["request_goodput"] is not None:
        terminal.row("goodput", f"{found['request_goodput']:.2f} requests/s within the goals")
    if found["completed"]:
        heads = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
        terminal.row("latency, ms", " " * 13 + "".join(f"{head:>10}" for head in heads))
        for name, label in LATENCIES.items():
            values = [found[f"{head}_{name}_ms"] for head in heads]
            terminal.say(
                f"  {label:<27}" + "".join(f"{'-' if v is None else f'{v:.1f}':>10}" for v in values)
            )
        if found["tokens_per_event"] is not None:
            terminal.row("", f"{found['tokens_per_event']:.2f} tokens in an event on average")
    for failure in found["failures"]:
        terminal.row("failed", f"{failure['count']} x {failure['kind']}: {failure['first']}", "red")
    _show_cost(found, terminal)


def _show_cost(found: dict[str, Any], terminal: Terminal) -> None:
    client = found["client"]
    each = client["cpu_us_per_token"]
    late = client["lag_p99_ms"]
    terminal.row(
        "this client",
        f"{100 * client['share_of_a_core']:.0f} % of a core"
        + (f", {each:.0f} us a token" if each is not None else "")
        + (f"; late by {late:.1f} ms (p99)" if late is not None else ""),
    )
    if found.get("server_cpu_s") is not None:
        terminal.row(
            "that server",
            f"{found['server_cpu_s']:.1f} s of processor time"
            + (
                f", {readable_bytes(found['server_peak_rss_bytes'])} at most"
                if found["server_peak_rss_bytes"]
                else ""
            ),
        )


def _load_in_words(found: dict[str, Any]) -> str:
    workload = found["workload"]
    turns = f", {counted(workload['turns'], 'turn')} each" if workload["turns"] > 1 else ""
    if found["max_concurrency"] is not None:
        when = f"{counted(found['max_concurrency'], 'client')} in a closed loop"
    else:
        when = f"{found['request_rate']:g} requests/s in an open loop, burstiness {found['burstiness']}"
    return f"{workload['name']}{turns}, answers of {workload['new_tokens']} tokens; {when}"


def _answers_in_words(found: dict[str, Any], interrupted: bool) -> str:
    text = f"{found['completed']} of {found['num_prompts']} in {found['duration']:.2f} s"
    if found["request_throughput"] is not None:
        text += f", {found['request_throughput']:.2f} a second"
    if found["not_sent"]:
        text += f"; {found['not_sent']} not sent or not finished"
    return text + ("; stopped by Ctrl-C" if interrupted else "")


def _tokens(count: int | None) -> str:
    return "not known" if count is None else str(count)
