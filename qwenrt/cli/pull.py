"""qwenrt pull: fetch a model's files and print the directory they are in."""

from __future__ import annotations

import argparse
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_source_options, example
from qwenrt.cli.terminal import Terminal


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "pull",
        help="download a model and print its directory",
        description="Download a model, or its newest version, and print the directory it is in. What HuggingFace's or "
        "ModelScope's own tools already fetched is found and not fetched again.",
        **example("example:\n  qwenrt pull Qwen-1_8B-Chat --source modelscope\n"),
    )
    parser.add_argument("model", help=MODEL_HELP)
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=pull)


def pull(args: argparse.Namespace) -> int:
    from qwenrt.loader.hub.resolve import resolve

    directory = resolve(
        args.model, source=args.source, revision=args.revision, offline=args.offline, newest=True
    )
    terminal = Terminal()
    if args.json:
        terminal.result({"model": args.model, "directory": str(directory)})
    else:
        terminal.say(str(directory))
    return 0
