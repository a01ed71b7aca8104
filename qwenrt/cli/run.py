"""qwenrt run: one prompt, one answer."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwenrt.cli.lines import Undecodable, read_all
from qwenrt.cli.options import (
    MODEL_HELP,
    add_adapter_option,
    add_model_options,
    add_sampling_options,
    add_thinking_options,
    example,
    first_adapter,
    load_model,
    sampling_changes,
    thinking_arguments,
)
from qwenrt.cli.terminal import Terminal, is_tty
from qwenrt.errors import RequestError
from qwenrt.outputs import Delta

if TYPE_CHECKING:
    from qwenrt.llm import LLM
    from qwenrt.outputs import Generation
    from qwenrt.sampling_params import SamplingParams

EXAMPLES = """examples:
  qwenrt run demo "What is the capital of France?"
  qwenrt run Qwen-7B "Once upon a time" --max-tokens 64
  qwenrt run demo - --json < question.txt
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        help="one prompt, one answer",
        description="One prompt, one answer: a turn of a conversation where the model is a chat model, "
        "else the prompt continued.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("prompt", nargs="?", default="-", help='the text, or "-" to read it from stdin')
    parser.add_argument("--raw", action="store_true", help="continue the prompt even if it is a chat model")
    parser.add_argument(
        "--system", metavar="TEXT", help="the system prompt of a chat model (default: its own)"
    )
    parser.add_argument("--json", action="store_true", help="print the complete result as JSON")
    parser.add_argument(
        "-s", "--seed", type=int, help="the same seed gives the same answer (default: a random one)"
    )
    add_sampling_options(parser)
    add_thinking_options(parser)
    add_adapter_option(parser, "the first answers")
    add_model_options(parser)
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    changes = sampling_changes(args)
    if args.seed is not None:
        changes["seed"] = args.seed
    prompt = _prompt(args.prompt)
    terminal, adapter = Terminal(), first_adapter(args)
    with load_model(args) as llm:
        params = llm.generation_config.sampling.with_(**changes)
        as_chat = (
            {"system": args.system, **thinking_arguments(args), "adapter": adapter}
            if llm.can_chat and not args.raw
            else None
        )
        if args.json:
            generation = (
                llm.generate(prompt, params, adapter=adapter)
                if as_chat is None
                else _chat(llm, prompt, params, **as_chat)
            )
            terminal.result(dataclasses.asdict(generation))
            return 0
        for delta in _deltas(llm, prompt, as_chat, params, adapter):
            terminal.answer(delta.text, delta.reasoning)
        terminal.stream("\n")
    return 0


def _prompt(given: str) -> str:
    """The prompt from the command line or stdin, checked to be text before a model is loaded for it."""
    if given != "-":
        text = given
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "the prompt", "not text in this locale's encoding", "Give it as UTF-8."
            ) from error
    else:
        if is_tty(sys.stdin):
            Terminal().remark("Type the prompt; end with Ctrl-D on a line of its own.")
        try:
            text = read_all().rstrip("\n")
        except Undecodable as error:
            raise RequestError("the prompt from stdin", "not readable text", "Give it as UTF-8.") from error
    if not text.strip():
        raise RequestError("the prompt", "it is empty", 'Give some text, e.g. qwenrt run demo "Hello".')
    return text


def _chat(
    llm: LLM, prompt: str, params: SamplingParams, *, system: str | None, **thinking: Any
) -> Generation:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user", "content": prompt}]
    generation: Generation = llm.chat(messages=messages, sampling_params=params, **thinking)
    return generation


def _deltas(
    llm: LLM, prompt: str, as_chat: dict[str, Any] | None, params: SamplingParams, adapter: str | None
) -> Iterator[Delta]:
    """The answer as it is written, or where ``as_chat`` is None the prompt's continuation."""
    if as_chat is not None:
        yield from llm.stream(prompt, sampling_params=params, **as_chat)
    else:
        yield from llm.submit(llm.prepare(prompt=prompt, sampling_params=params, adapter=adapter))
