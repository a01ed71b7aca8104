"""qwenrt chat: a conversation in the terminal, or one question per line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from qwenrt.cli.chat_commands import Mistaken, Order, Typed, meaning
from qwenrt.cli.interrupt import one_interrupt
from qwenrt.cli.keeping import Kept
from qwenrt.cli.lines import Lines, Undecodable
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
from qwenrt.cli.session import Asking, Leave, Session, shortened
from qwenrt.cli.terminal import Terminal, counted
from qwenrt.cli.typeahead import unseen_keys
from qwenrt.config import Environment
from qwenrt.errors import ConfigError, QwenrtError, RequestError
from qwenrt.files import expanded, is_there
from qwenrt.outputs import Delta

DEFAULT_SEED = 1234
NOT_BEGUN = "Stopped before the answer began; the conversation is as it was. :retry asks again."
EXAMPLES = """examples:
  qwenrt chat                                   the built-in demo model
  qwenrt chat Qwen-1_8B-Chat --quantize int4    an alias; downloaded once
  qwenrt chat ./my-model --temperature 0
  qwenrt chat --continue                        the conversation held last
  cat questions.txt | qwenrt chat > answers.txt

In the conversation, :help lists the commands. Ctrl-C stops an answer; twice
at the prompt it leaves with status 1. Lines that were typed and conversations
are kept for their user alone, in ~/.local/state/qwenrt; --no-history or
QWENRT_HISTORY=0 keeps nothing.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Answers appear as they are written.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument(
        "--continue",
        dest="reopen",
        action="store_true",
        help="go on with the conversation held last, with its model unless another is named",
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        help="keep neither the lines that are typed nor the conversation",
    )
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
    add_adapter_option(parser, "the first answers")
    add_model_options(parser)
    parser.set_defaults(command=chat)


def chat(args: argparse.Namespace) -> int:
    changes = sampling_changes(args)
    terminal = Terminal()
    directory = Environment.read().history
    kept = Kept(directory) if directory is not None and not args.no_history else None
    past = None
    if args.reopen:
        if kept is None:
            raise RequestError(
                "chat --continue",
                "conversations are not kept (--no-history, or QWENRT_HISTORY=0)",
                "Leave out one of the two.",
            )
        past = kept.reopen()
    if args.model is None:
        args.model = (past and past.model) or "demo"
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
            thinking={**thinking_arguments(args), "adapter": first_adapter(args)},
            kept=kept if terminal.interactive else None,
            model=_findable(args.model),
        )
        session.welcome()
        if past is not None:
            session.reopen(past)
            session.system = past.system if args.system is None else args.system
            last = f", the last of them: {shortened(past.history[-1][0])}" if past.history else ""
            terminal.remark(f"[INFO] Going on after {counted(len(past.history), 'turn')}{last}")
        typed_lines = kept.typed_lines() if kept is not None and terminal.interactive else None
        return converse(session, Lines(terminal, typed_lines))


def converse(session: Session, lines: Lines) -> int:
    """Until the input ends or the user leaves; 1 after Ctrl-C at the prompt or where a piped question failed."""
    terminal = session.terminal
    failed = False
    try:
        while True:
            typed = _message(terminal, lines)
            try:
                respond(session, typed, lines.by_key)
            except KeyboardInterrupt:
                if not terminal.interactive:
                    raise
                terminal.warn(NOT_BEGUN)  # the key came before an answer was asked for
            except QwenrtError as error:
                terminal.error(str(error))
                failed = not terminal.interactive
    except EOFError:
        if terminal.interactive:
            terminal.say()
    except Leave as leave:
        failed = failed or leave.status != 0
    if session.kept is not None and session.turns:
        terminal.remark("[INFO] The conversation is kept: qwenrt chat --continue goes on with it.")
    return int(failed)


def _message(terminal: Terminal, lines: Lines) -> Typed:
    """The next message that is readable. Raises EOFError, and Leave after Ctrl-C twice; in a pipe after once."""
    warned = not terminal.interactive
    before = "" if lines.by_key else "\n"  # without an editor the cursor stays behind the ^C
    while True:
        try:
            return lines.message()
        except Undecodable:
            terminal.error("That was not readable text; please type it again.")
        except KeyboardInterrupt:
            if warned:
                terminal.remark(f"{before}[INFO] Left with Ctrl-C.")
                raise Leave(1) from None
            warned = True
            terminal.remark(f"{before}[INFO] Ctrl-C once more leaves, and so does Ctrl-D.")


def respond(session: Session, typed: Typed, by_key: bool = False) -> None:
    """Do what a line asks for. Raises Leave, and in a pipe RequestError where it looks like a command and is none."""
    meant = meaning(typed)
    if isinstance(meant, Mistaken):
        if not session.terminal.interactive:
            raise RequestError(meant.said)
        if meant.plainly is None:
            session.terminal.remark(f"[INFO] {meant.said}")
            return
        meant = meant.plainly
    asking = session.obey(meant) if isinstance(meant, Order) else Asking(meant.text)
    if asking is None:
        return
    if asking.query:
        ask(session, asking, by_key)
    else:
        session.terminal.error("The question is empty; please type something (:help lists the commands).")


def ask(session: Session, asking: Asking, by_key: bool = False) -> None:
    """Stream one answer and remember it. One that is stopped is remembered as far as it came, at a terminal; in a
    pipe KeyboardInterrupt is raised. Where one fails, the conversation stays as it was."""
    terminal = session.terminal
    pieces: list[str] = []
    last = None
    with contextlib.ExitStack() as meanwhile:
        meanwhile.enter_context(one_interrupt())
        try:
            try:
                if terminal.interactive:
                    meanwhile.enter_context(unseen_keys(sys.stdin, by_key=by_key))
                    terminal.say("Qwen> ", "bold", end="")
                with contextlib.closing(session.stream(asking)) as deltas:
                    for last in deltas:
                        pieces.append(last.text)
                        terminal.answer(last.text, last.reasoning)
            finally:
                if pieces or terminal.interactive:
                    terminal.stream("\n")
        except KeyboardInterrupt:
            if not terminal.interactive:
                raise
            _stopped(session, asking, "".join(pieces).strip())
            return
    session.remember(asking, "".join(pieces).strip(), last or Delta(""))
    if last is not None and last.finish_reason == "length":
        terminal.remark("[INFO] The answer was cut at max_tokens; :conf max_tokens=N allows more.")


def _stopped(session: Session, asking: Asking, so_far: str) -> None:
    if so_far:
        session.remember(asking, so_far, None)
        said = "Answer stopped; what there is of it is kept. :retry asks again, :undo takes it back."
    else:
        said = NOT_BEGUN
    session.terminal.warn(said)


def _findable(model: str) -> str:
    """A model's name by which it is found from any directory."""
    path = expanded(model, ConfigError)
    return str(path.resolve()) if is_there(path, ConfigError) else model
