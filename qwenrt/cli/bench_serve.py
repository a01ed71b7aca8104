"""qwenrt bench serve: any server of OpenAI's dialect under load, or one that is started for it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt import __version__
from qwenrt.cli import machine
from qwenrt.cli.options import MODEL_HELP, add_load_option, add_model_options, example, given_options
from qwenrt.cli.terminal import Terminal, counted, readable_bytes
from qwenrt.config.environment import Environment
from qwenrt.errors import ConfigError, RequestError
from qwenrt.files import read

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
_SHARING = ("max_num_seqs", "max_num_batched_tokens", "step_target_ms")
_SIZES = ("prompt_words", "prefix_words", "prefixes", "new_tokens", "turns", "range_ratio")
_LONGEST_KEY_FILE = 1 << 16  # bytes


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
    _add_load(parser)
    group = parser.add_argument_group("the server")
    group.add_argument(
        "--endpoint",
        choices=("chat", "completions"),
        default="chat",
        help="which route is asked (default: chat)",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="model in requests (default: the server's first)"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="its first line is the key (default: OPENAI_API_KEY)",
    )
    group.add_argument(
        "--extra-body", type=_json_object, default={}, metavar="JSON", help="fields of every request"
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for answers of full length, which OpenAI's own API refuses (default: yes)",
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for a whole answer (default: 600)"
    )
    group.add_argument(
        "--tokenizer", metavar="MODEL", help="counts tokens where the server tells no usage: a model's name"
    )
    _add_report(parser)
    add_model_options(parser)
    group = parser.add_argument_group("how requests share the model")
    for name in _SHARING:
        add_load_option(group, name)
    parser.set_defaults(command=bench_serve)


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--workload",
        choices=("chat", "shared-prefix", "random", "agent"),
        default="chat",
        help="chat: turns that follow each other; shared-prefix: a system prompt that all share; random: no two "
        "alike; agent: a long prompt that grows by results of tools (default: chat)",
    )
    group.add_argument(
        "--num-prompts", type=int, default=64, metavar="N", help="requests in all (default: 64)"
    )
    group.add_argument("--prompt-words", type=int, metavar="N", help="of each question or result of a tool")
    group.add_argument("--prefix-words", type=int, metavar="N", help="of the system prompt")
    group.add_argument(
        "--prefixes", type=int, metavar="N", help="how many system prompts there are; 0: each its own"
    )
    group.add_argument("--new-tokens", type=int, metavar="N", help="of each answer")
    group.add_argument("--turns", type=int, metavar="N", help="of each conversation")
    group.add_argument(
        "--range-ratio",
        type=float,
        metavar="R",
        help="numbers of words and tokens vary between 1 - R and 1 + R times these",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of words, sizes and times")
    group.add_argument(
        "--warmups", type=int, default=1, metavar="N", help="requests before the first counted one"
    )
    group = parser.add_argument_group("when it is asked")
    loop = group.add_mutually_exclusive_group()
    loop.add_argument(
        *("--concurrency", "--max-concurrency"),
        type=int,
        default=8,
        metavar="N",
        help="a closed loop: N clients, each of which waits for its answer (default: 8)",
    )
    loop.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="an open loop: R requests a second on average, whatever the server does; the later turns of a "
        "conversation still wait for its answers",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="1: a Poisson process (default); below: bursts; above: more even; inf: a metronome",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is reported")
    group.add_argument(
        *("--percentiles", "--metric-percentiles"),
        type=_percentiles,
        default=(99.0,),
        metavar="P,...",
        help="of each latency (default: 99)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="also count the requests that keep ttft, tpot and e2el within these",
    )
    group.add_argument("--json", action="store_true", help="print a JSON object in place of the table")
    group.add_argument(
        "--save", type=Path, metavar="FILE", help="write the same JSON to a file, with each request's times"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw latencies and throughput (.svg, .png, .pdf)"
    )


@dataclass(frozen=True)
class _Measured:
    """The figures of a run and its raw times; ``interrupted``: by Ctrl-C."""

    found: dict[str, Any]
    run: LoadRun
    interrupted: bool


def bench_serve(args: argparse.Namespace) -> int:
    """Measure, then report. Returns 1 where the server has gone or answered nothing, 130 after Ctrl-C."""
    check_installed()
    terminal = Terminal()
    if args.plot is not None:
        from qwenrt.cli.plots import check_can_draw

        check_can_draw(args.plot)
    workload, key = _workload(args), _api_key(args)
    with _target(args, terminal) as (url, process):
        measured = _measure(args, workload, key, url, process, terminal)
    _report(args, measured, terminal)
    if measured.run.gone:
        found = measured.found
        done = f"{found['completed']} of {counted(found['num_prompts'], 'request')} answered before"
        terminal.fail(f"the server at {found['base_url']} has gone ({measured.run.gone}): {done}.")
        return 1
    if measured.interrupted:
        return 130
    return 0 if measured.found["completed"] else 1


def check_installed() -> None:
    """Raises ConfigError where what speaks HTTP is not installed."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        found = f"{', '.join(missing)} is not installed"
        raise ConfigError("qwenrt bench serve", found, 'Install what it needs: pip install "qwenrt[server]"')


@contextlib.contextmanager
def _target(args: argparse.Namespace, terminal: Terminal) -> Iterator[tuple[str, ServerProcess | None]]:
    """The URL to measure, and the process of a server that was started for it."""
    from qwenrt.load_test.server_process import server_process

    if args.target.startswith(("http://", "https://")):
        if unused := given_options(args, also=_SHARING):
            raise RequestError(
                unused[0], f"{args.target} runs already", "Give it to the server, or name a model here."
            )
        yield args.target, None
        return
    from qwenrt.loader.progress import quiet_tqdm

    with quiet_tqdm(None)(bar_format="starting qwenrt serve: {elapsed}", leave=False) as bar:
        arguments = [args.target, *given_options(args, also=_SHARING)]
        with server_process(arguments, lambda seconds: bar.refresh()) as process:
            bar.close()
            yield process.url, process


def _measure(
    args: argparse.Namespace,
    workload: Workload,
    key: str | None,
    url: str,
    process: ServerProcess | None,
    terminal: Terminal,
) -> _Measured:
    from qwenrt.load_test.client import OpenAIServer
    from qwenrt.load_test.connections import Address
    from qwenrt.load_test.figures import figures, parse_goals
    from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
    from qwenrt.load_test.running import LoadRun
    from qwenrt.load_test.server_process import cpu_seconds, peak_rss_bytes
    from qwenrt.load_test.workloads import conversations

    goals = parse_goals(args.goodput)
    pace = (
        ClosedLoop(args.concurrency)
        if args.request_rate is None
        else OpenLoop(args.request_rate, args.burstiness, args.seed)
    )
    count = _counting(args.tokenizer)
    extra = ({"ignore_eos": True} if args.ignore_eos else {}) | {"temperature": 0} | args.extra_body
    server = OpenAIServer(
        Address.of(url),
        key=key,
        model=args.served_model_name or "",
        endpoint=args.endpoint,
        extra=extra,
        timeout=args.timeout,
    )
    run = LoadRun(conversations(workload, args.num_prompts, args.seed), server, pace)
    before: list[float | None] = []

    async def whole() -> None:
        try:
            await _prepare(server, workload, args.warmups)
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
    found = _settings(args, workload, server) | figures(
        run, percentiles=args.percentiles, goals=goals, count=count
    )
    if process is not None:
        after = cpu_seconds(process.pid)
        used = after - before[0] if after is not None and before[0] is not None else None
        found |= {"server_cpu_s": used, "server_peak_rss_bytes": peak_rss_bytes(process.pid)}
        if run.gone and process.exit_code is not None:
            run.gone = f"it exited with {process.exit_code}: {process.last_words()}"
    return _Measured(found, run, interrupted)


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


def _settings(args: argparse.Namespace, workload: Workload, server: OpenAIServer) -> dict[str, Any]:
    """What was measured, where and with what."""
    here = machine.describe()
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if args.endpoint == "chat" else "openai",
        "base_url": str(server.address),
        "model_id": server.model,
        "tokenizer_id": args.tokenizer or server.model,
        "qwenrt": __version__,
        "machine": f"{here['processor'] or here['system']}, {here['cores_allowed']} logical cores",
        "workload": {"name": workload.name, "seed": args.seed}
        | {name: getattr(workload, name) for name in _SIZES},
        "ignore_eos": args.ignore_eos,
        "extra_body": args.extra_body,
    }


def _workload(args: argparse.Namespace) -> Workload:
    from qwenrt.load_test.workloads import WORKLOADS

    return WORKLOADS[args.workload].changed(**{name: getattr(args, name) for name in _SIZES})


def _api_key(args: argparse.Namespace) -> str | None:
    """The key for the server, which is never shown."""
    if args.api_key_file is None:
        return Environment.read().openai_api_key
    asked = f"the API key in {args.api_key_file}"
    raw = read(args.api_key_file, _LONGEST_KEY_FILE, ConfigError, asked=asked, what="file of keys")
    lines = (line.split() for line in raw.decode("ascii", "replace").splitlines())
    key = next((line[0] for line in lines if line and not line[0].startswith("#")), "")
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(asked, "no key in it", "Write the key in its first line.")
    return key


def _counting(tokenizer: str | None) -> Any:
    if tokenizer is None:
        return None
    from qwenrt.loading import load_tokenizer

    encode = load_tokenizer(tokenizer).encode
    return lambda text: len(encode(text))


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"top_p": 0.9}}')
    return found


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < p < 100 for p in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no percentiles, such as 50,90,99")
    return found


def _report(args: argparse.Namespace, measured: _Measured, terminal: Terminal) -> None:
    from qwenrt.load_test.figures import details, warnings

    found = measured.found
    if args.json:
        terminal.result(found)
    else:
        _show(found, measured, args.percentiles, terminal)
    for warning in warnings(found):
        terminal.warn(warning)
    if args.save is not None:
        text = json.dumps(found | details(measured.run, _counting(args.tokenizer)), ensure_ascii=False)
        args.save.write_text(text + "\n", encoding="utf-8")
        terminal.remark(f"Written: {args.save}")
    if args.plot is not None and found["completed"]:
        from qwenrt.cli.plots import draw_run

        draw_run(args.plot, found, measured.run)
        terminal.remark(f"Drawn: {args.plot}")


def _show(
    found: dict[str, Any], measured: _Measured, percentiles: tuple[float, ...], terminal: Terminal
) -> None:
    from qwenrt.load_test.figures import LATENCIES

    def row(label: str, text: str, style: str = "") -> None:
        terminal.say(f"{label:<15} {text}", style)

    row("server", f"{found['base_url']}, model {found['model_id']}, {found['backend']}")
    row("load", _load_in_words(found))
    row("answers", _answers_in_words(found, measured.interrupted))
    cached = found["total_cached_tokens"]
    row(
        "prompt tokens",
        _tokens(found["total_input_tokens"]) + (f", {cached} of them from a cache" if cached else ""),
    )
    by = found["tokens_counted_by"]
    row("answer tokens", f"{_tokens(found['total_output_tokens'])}, counted by {by}")
    if found["output_throughput"] is not None:
        row("throughput", f"{found['output_throughput']:.1f} answer tokens/s", "bold")
        row(
            "",
            f"{found['total_token_throughput']:.1f} tokens/s with prompts, "
            f"{found['max_output_tokens_per_s']:.0f} answer tokens in the busiest second"
            if found["total_token_throughput"] is not None
            else "",
        )
    if found["request_goodput"] is not None:
        row("goodput", f"{found['request_goodput']:.2f} requests/s within the goals")
    if found["completed"]:
        heads = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
        row("latency, ms", " " * 13 + "".join(f"{head:>10}" for head in heads))
        for name, label in LATENCIES.items():
            values = [found[f"{head}_{name}_ms"] for head in heads]
            terminal.say(
                f"  {label:<27}" + "".join(f"{'-' if v is None else f'{v:.1f}':>10}" for v in values)
            )
        if found["tokens_per_event"] is not None:
            row("", f"{found['tokens_per_event']:.2f} tokens in an event on average")
    for failure in found["failures"]:
        row("failed", f"{failure['count']} x {failure['kind']}: {failure['first']}", "red")
    _show_cost(found, row)


def _show_cost(found: dict[str, Any], row: Any) -> None:
    client = found["client"]
    each = client["cpu_us_per_token"]
    late = client["lag_p99_ms"]
    row(
        "this client",
        f"{100 * client['share_of_a_core']:.0f} % of a core"
        + (f", {each:.0f} us a token" if each is not None else "")
        + (f"; late by {late:.1f} ms (p99)" if late is not None else ""),
    )
    if found.get("server_cpu_s") is not None:
        row(
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
