"""The command line: qwenrt chat | run | serve | list | show | pull | rm | doctor | bench | estimate | ...."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qwenrt import __version__
from qwenrt.cli import (
    bench,
    bench_serve,
    chat,
    details,
    doctor,
    estimate,
    evaluation,
    finetuning,
    listing,
    merging,
    pull,
    quantizing,
    removal,
    run,
    selftest,
    serve,
    tuning,
)
from qwenrt.cli.imports import said_of_torch
from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal, forgive_encoding, stand_in_for_closed_streams
from qwenrt.errors import QwenrtError, memory_errors
from qwenrt.other_names import advice_for_option

COMMANDS = (
    chat,
    run,
    serve,
    listing,
    details,
    pull,
    removal,
    doctor,
    selftest,
    bench,
    bench_serve,
    estimate,
    evaluation,
    finetuning,
    merging,
    quantizing,
    tuning,
)
EXIT_OK, EXIT_ERROR, EXIT_INTERRUPTED = 0, 1, 130


class Parser(argparse.ArgumentParser):
    """One that knows other programs' options by name, and says what they are called here."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            words = [word for word in message.split() if word.startswith("-")]
            told = [f"{word}: {said}" for word in words if (said := advice_for_option(word))]
            message = "\n  ".join([message, *told])
        super().error(message)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Each command module adds itself and sets ``command`` to its function."""
    parser = Parser(
        prog="qwenrt",
        description="Run every Qwen on every device.",
        **example("example:\n  qwenrt chat            talk to the built-in demo model\n"),
    )
    parser.add_argument("--version", action="version", version=f"qwenrt {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(subparsers)
    return parser


def _of_two_words(argv: Sequence[str]) -> list[str]:
    """["bench", "serve", ...] -> ["bench serve", ...]: `bench` alone takes a model there (one named "serve" is
    `bench --model serve`)."""
    return ["bench serve", *argv[2:]] if list(argv[:2]) == ["bench", "serve"] else list(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 when done, 1 after an error (one message on stderr), 130 after Ctrl-C.

    Wrong usage raises SystemExit(2), as argparse does.
    """
    if not stand_in_for_closed_streams():
        sys.stderr.write(
            "qwenrt: error: stdout is closed, and results go there. Use > /dev/null to drop them.\n"
        )
        return EXIT_ERROR
    forgive_encoding()
    parser = build_parser()
    args = parser.parse_args(_of_two_words(sys.argv[1:] if argv is None else argv))
    if not hasattr(args, "command"):
        parser.print_help()
        return EXIT_OK
    try:
        with memory_errors(f"qwenrt {args.command.__name__}"):
            code: int = args.command(args)
        sys.stdout.flush()
        return code
    except QwenrtError as error:
        Terminal().fail(str(error))
        return EXIT_ERROR
    except KeyboardInterrupt as stopped:
        if stopped.args:  # what became of the work
            Terminal().remark(str(stopped))
        return EXIT_INTERRUPTED
    except (ImportError, RuntimeError, OSError) as error:
        if said := said_of_torch(error):
            Terminal().fail(said)
            return EXIT_ERROR
        if not isinstance(error, OSError) or error.filename is not None:
            raise
        # stdout took no more; what is buffered for it is dropped, so that the interpreter's own flush says nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # the other way its reader has gone on purpose, e.g. `qwenrt run ... | head -1`
        if not isinstance(error, BrokenPipeError):
            Terminal().fail(
                f"writing the result: {error.strerror or error}. Make room, or send it elsewhere."
            )
        return EXIT_ERROR
