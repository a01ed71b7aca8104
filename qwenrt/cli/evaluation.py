"""qwenrt eval: how often a model answers right about the demo's world, and what rounding costs."""

from __future__ import annotations

import argparse
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_model_options, example, load_arguments
from qwenrt.cli.terminal import Terminal

EXAMPLES = """examples:
  qwenrt eval demo
  qwenrt eval demo --quick --failures 5
  qwenrt eval ./my-model --json
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="how often a model answers right",
        description="Ask a model questions about the built-in demo's small world that were not in its training data, "
        "and compare context lengths and quantisations.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", nargs="?", default="demo", help=f"{MODEL_HELP} (default: demo)")
    parser.add_argument(
        "--samples", type=int, default=600, metavar="N", help="questions (default: %(default)s)"
    )
    parser.add_argument("-s", "--seed", type=int, default=1, help="which questions (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="questions only: no long documents, no quantised variants"
    )
    parser.add_argument("--failures", type=int, default=0, metavar="N", help="show N wrong answers")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_model_options(parser)
    parser.set_defaults(command=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    from qwenrt.evaluate import evaluate_demo

    terminal = Terminal()
    report = evaluate_demo(
        args.model,
        samples=args.samples,
        seed=args.seed,
        compare=not args.quick,
        note=terminal.remark if terminal.looked_at else None,
        **load_arguments(args),
    )
    if args.json:
        terminal.result(report.to_dict())
    else:
        terminal.say(report.format(failures=max(0, args.failures)))
    return 0
