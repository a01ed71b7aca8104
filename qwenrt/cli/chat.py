"""qwenrt chat: a conversation in the terminal, or one question per line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from qwenrt.cli.interrupt import one_interrupt
from qwenrt.cli.lines import Lines, Undecodable
from qwenrt.cli.options import (
    MODEL_HELP,
    add_model_options,
    add_sampling_options,
    add_thinking_options,
    example,
    load_model,
    sampling_changes,
    thinking_arguments,
)
from qwenrt.cli.session import Leave, Session
from qwenrt.cli.terminal import Terminal
from qwenrt.errors import QwenrtError, RequestError

DEFAULT_SEED = 1234
EXAMPLES = """examples:
  qwenrt chat                                   the built-in demo model
  qwenrt chat Qwen-1_8B-Chat --quantize int4    an alias; downloaded once
  qwenrt chat ./my-model --temperature 0
  cat questions.txt | qwenrt chat > answers.txt

In the conversation, :help lists the commands. Ctrl-C stops an answer; at the
prompt it leaves with status 1.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Answers appear as they are written.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", nargs="?", default="demo", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt (default: the model's own)")
    parser.add_argument(
        "-s",
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="set anew for each question, so that a conversation can be repeated (default: %(default)s)",
    )
    add_sampling_options(parser)
    add_thinking_options(parser)
    add_model_options(parser)
    parser.set_defaults(command=chat)


def chat(args: argparse.Namespace) -> int:
    changes = sampling_changes(args)
    terminal = Terminal()
    with load_model(args) as llm:
        if llm.generation_config.chat_format == "raw":
            raise RequestError(
                f"chatting with {llm.name}",
                "it is a base model, which continues texts and knows no conversation",
                f'Use `qwenrt run {args.model} "..."`, or the -Chat release of the model.',
            )
        session = Session(
            llm,
            terminal,
            params=llm.generation_config.sampling.with_(**changes),
            system=args.system,
            seed=args.seed,
            thinking=thinking_arguments(args),
        )
        return converse(session, Lines(terminal))


def converse(session: Session, lines: Lines) -> int:
    """Until the input ends or the user leaves; 1 after Ctrl-C at the prompt or a piped question failed."""
    terminal = session.terminal
    failed = False
    session.welcome()
    while True:
        try:
            query = lines.message()
        except EOFError:
            if terminal.interactive:
                terminal.say()
            return int(failed)
        except KeyboardInterrupt:
            terminal.remark("\n[INFO] Left with Ctrl-C.")
            return 1
        except Undecodable:
            terminal.error("That was not readable text; please type it again.")
            continue
        if not query:
            terminal.error("The question is empty; please type something (:help lists the commands).")
            continue
        try:
            if not session.obey(query):
                ask(session, query)
        except Leave:
            return int(failed)
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            terminal.warn("Answer stopped; the history is unchanged.")
        except QwenrtError as error:
            terminal.error(str(error))
            failed = not terminal.interactive


def ask(session: Session, query: str) -> None:
    """Stream one answer and remember it. Where it is stopped or fails, the history stays as it was."""
    terminal = session.terminal
    pieces: list[str] = []
    reason = None
    with one_interrupt():
        if terminal.interactive:
            terminal.say("Qwen> ", "bold", end="")
        try:
            with contextlib.closing(session.stream(query)) as deltas:
                for delta in deltas:
                    pieces.append(delta.text)
                    terminal.answer(delta.text, delta.reasoning)
                    reason = delta.finish_reason or reason
        finally:
            if pieces or terminal.interactive:
                terminal.stream("\n")
    session.history.append((query, "".join(pieces).strip()))
    if reason == "length":
        terminal.remark("[INFO] The answer was cut at max_tokens; :conf max_tokens=N allows more.")
