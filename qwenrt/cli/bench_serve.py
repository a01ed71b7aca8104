"""qwenrt bench serve: any server of OpenAI's dialect under load, or one that is started for it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwenrt.cli import bench_serve_options as options
from qwenrt.cli.bench_serve_report import Measured, report, settings
from qwenrt.cli.options import (
    MODEL_HELP,
    SHARING_OPTIONS,
    add_model_options,
    add_sharing_options,
    check_can_write,
    check_installed,
    example,
    given_options,
)
from qwenrt.cli.terminal import Terminal, counted
from qwenrt.errors import RequestError

if TYPE_CHECKING:
    from qwenrt.load_test.client import OpenAIServer
    from qwenrt.load_test.running import LoadRun
    from qwenrt.load_test.server_process import ServerProcess
    from qwenrt.load_test.workloads import Workload

EXAMPLES = """examples:
  qwenrt bench serve demo           starts a server, measures it, stops it
  qwenrt bench serve Qwen3-4B --quantize int4 --workload agent --concurrency 4
  qwenrt bench serve http://127.0.0.1:8000 --workload random --request-rate 2
  qwenrt bench serve http://127.0.0.1:8000 --save run.json --plot run.svg

Any server with /v1/chat/completions or /v1/completions is measured in the same
way: qwenrt, vLLM, SGLang, llama-server, Ollama. docs/benchmarking.md says what
is counted.
"""
_NEEDS = ("h11", "msgspec")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench serve",
        help="how fast a server answers under load",
        description="Send a load to a server of OpenAI's dialect, and report its throughput and latencies.",
        **example(EXAMPLES),
    )
    parser.add_argument(
        "target",
        metavar="URL|MODEL",
        help=f"http://HOST:PORT of a server that runs, or a model to serve meanwhile: {MODEL_HELP}",
    )
    options.add_options(parser)
    add_model_options(parser)
    add_sharing_options(parser)
    parser.set_defaults(command=bench_serve)


def bench_serve(args: argparse.Namespace) -> int:
    """Measure, then report. Returns 1 where the server has gone or answered nothing, 130 after Ctrl-C."""
    check_installed("qwenrt bench serve", _NEEDS)
    terminal = Terminal()
    if args.plot is not None:
        from qwenrt.cli.plots import check_can_draw

        check_can_draw(args.plot)
    if args.save is not None:
        check_can_write("--save", args.save)
    plan = options.plan(args)
    with _target(args) as (url, process):
        measured = _measure(args, plan, options.server_at(url, args, plan.key), process)
    report(args, measured, terminal)
    if measured.run.gone:
        found = measured.found
        done = f"{found['completed']} of {counted(found['num_prompts'], 'request')} answered before"
        terminal.fail(f"the server at {found['base_url']} has gone ({measured.run.gone}): {done}.")
        return 1
    if measured.interrupted:
        return 130
    return 0 if measured.found["completed"] else 1


@contextlib.contextmanager
def _target(args: argparse.Namespace) -> Iterator[tuple[str, ServerProcess | None]]:
    """The URL to measure, and the process of a server that was started for it."""
    from qwenrt.load_test.server_process import server_process

    if args.target.startswith(("http://", "https://")):
        if unused := given_options(args, also=SHARING_OPTIONS):
            raise RequestError(
                unused[0], f"{args.target} runs already", "Give it to the server, or name a model here."
            )
        yield args.target, None
        return
    from qwenrt.loader.progress import quiet_tqdm

    with quiet_tqdm(None)(bar_format="starting qwenrt serve: {elapsed}", leave=False) as bar:
        arguments = [args.target, *given_options(args, also=SHARING_OPTIONS)]
        with server_process(arguments, lambda seconds: bar.refresh()) as process:
            bar.close()
            yield process.url, process


def _measure(
    args: argparse.Namespace, plan: options.Plan, server: OpenAIServer, process: ServerProcess | None
) -> Measured:
    from qwenrt.load_test.figures import figures
    from qwenrt.load_test.running import LoadRun
    from qwenrt.load_test.server_process import cpu_seconds, peak_rss_bytes

    run = LoadRun(plan.conversations, server, plan.pace)
    before: list[float | None] = []

    async def whole() -> None:
        try:
            await _prepare(server, plan.workload, args.warmups)
            before.append(cpu_seconds(process.pid) if process else None)
            with _progress(run):
                await run.go()
        finally:
            server.close()

    interrupted = False
    try:
        asyncio.run(whole())
    except KeyboardInterrupt:
        if not before:  # nothing was measured yet
            raise
        interrupted = True
    found = settings(args, plan.workload, server) | figures(
        run, percentiles=args.percentiles, goals=plan.goals, count=plan.count
    )
    if process is not None:
        after = cpu_seconds(process.pid)
        used = after - before[0] if after is not None and before[0] is not None else None
        found |= {"server_cpu_s": used, "server_peak_rss_bytes": peak_rss_bytes(process.pid)}
        if run.gone and process.exit_code is not None:
            run.gone = f"it exited with {process.exit_code}: {process.last_words()}"
    return Measured(found, run, plan.count, interrupted)


async def _prepare(server: OpenAIServer, workload: Workload, warmups: int) -> None:
    """The model's name, and requests that are not counted: what is wrong shows here, once."""
    from qwenrt.load_test.workloads import conversations

    if not server.model:
        names = await server.models()
        if not names:
            raise RequestError(f"the models of {server.address}", "there is none", "Load one there.")
        server.model = names[0]
    for conversation in conversations(workload.changed(turns=1), warmups, -1) if warmups else ():
        request = conversation.ask()
        assert request is not None
        answer = await server.ask(request)
        if answer.failure is not None:
            raise RequestError(
                f"the first request to {server.address}", f"{answer.failure.kind}: {answer.failure.said}"
            )


@contextlib.contextmanager
def _progress(run: LoadRun) -> Iterator[None]:
    """A line on a terminal, from a thread of its own twice a second: the clients' loop draws nothing."""
    from qwenrt.loader.progress import quiet_tqdm

    ended = threading.Event()
    with quiet_tqdm(None)(total=run.planned, unit="answer", leave=False) as bar:

        def draw() -> None:
            while not ended.wait(0.5):
                failed = sum(answer.failure is not None for answer in run.answers)
                bar.set_postfix_str(f"{run.running} under way, {failed} failed", refresh=False)
                bar.n = len(run.answers)
                bar.refresh()

        thread = threading.Thread(target=draw, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
