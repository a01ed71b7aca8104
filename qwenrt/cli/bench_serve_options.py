"""What `qwenrt bench serve` may be told, and what a load test makes of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.config.environment import Environment
from qwenrt.errors import ConfigError, RequestError
from qwenrt.files import read

if TYPE_CHECKING:
    from qwenrt.load_test.client import OpenAIServer
    from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
    from qwenrt.load_test.workloads import Conversation, Workload

SIZES = ("prompt_words", "prefix_words", "prefixes", "new_tokens", "turns", "range_ratio")
_LONGEST_KEY_FILE = 1 << 16  # bytes


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the load, the server and the report. `plan` checks what is in them."""
    _add_load(parser)
    _add_server(parser)
    _add_report(parser)


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


def _add_server(parser: argparse.ArgumentParser) -> None:
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
        help="its first key is shown to the server (default: OPENAI_API_KEY)",
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
class Plan:
    """A load, as the options say. ``goals``: in ms, by the short names of latencies. ``count``: what counts the tokens
    of a text that the server did not; ``key``: the server's, which is never shown."""

    workload: Workload
    conversations: list[Conversation]
    pace: ClosedLoop | OpenLoop
    goals: dict[str, float]
    count: Callable[[str], int] | None
    key: str | None


def plan(args: argparse.Namespace) -> Plan:
    """Before a server is started or asked for it. Raises RequestError and ConfigError for what makes no sense."""
    from qwenrt.load_test.figures import parse_goals
    from qwenrt.load_test.pacing import ClosedLoop, OpenLoop
    from qwenrt.load_test.workloads import WORKLOADS, conversations

    if args.warmups < 0:
        raise RequestError("--warmups", f"got {args.warmups}", "It must be at least 0.")
    if not args.timeout > 0:
        raise RequestError("--timeout", f"got {args.timeout:g}", "It must be a number of seconds above 0.")
    workload = WORKLOADS[args.workload].changed(**{name: getattr(args, name) for name in SIZES})
    return Plan(
        workload,
        conversations(workload, args.num_prompts, args.seed),
        ClosedLoop(args.concurrency)
        if args.request_rate is None
        else OpenLoop(args.request_rate, args.burstiness, args.seed),
        parse_goals(args.goodput),
        _counting(args.tokenizer),
        _api_key(args.api_key_file),
    )


def server_at(url: str, args: argparse.Namespace, key: str | None) -> OpenAIServer:
    """Who is asked. Raises RequestError for what is no URL of a server."""
    from qwenrt.load_test.client import OpenAIServer
    from qwenrt.load_test.connections import Address

    extra = ({"ignore_eos": True} if args.ignore_eos else {}) | {"temperature": 0} | args.extra_body
    return OpenAIServer(
        Address.of(url),
        key=key,
        model=args.served_model_name or "",
        endpoint=args.endpoint,
        extra=extra,
        timeout=args.timeout,
    )


def _api_key(file: Path | None) -> str | None:
    """The key in a file, or else in the environment. Raises ConfigError, which shows nothing of it."""
    if file is None:
        asked, key = "the API key in OPENAI_API_KEY", (Environment.read().openai_api_key or "").strip()
        if not key:
            return None
    else:
        asked = f"the API key in {file}"
        raw = read(file, _LONGEST_KEY_FILE, ConfigError, asked=asked, what="file of keys")
        lines = (line.split() for line in raw.decode("utf-8", "replace").splitlines())
        key = next((line[0] for line in lines if line and not line[0].startswith("#")), "")
        if not key:
            raise ConfigError(asked, "no key in it", "Write the key in its first line.")
    if not key.isprintable() or not key.isascii():
        raise ConfigError(asked, "characters that no key has", "Write printable ASCII characters alone.")
    return key


def _counting(tokenizer: str | None) -> Callable[[str], int] | None:
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
