"""qwenrt quantize: a dense checkpoint in int4 or int8, as GPTQ or AWQ."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_source_options, example
from qwenrt.cli.terminal import Terminal

EXAMPLES = """examples:
  qwenrt quantize Qwen3-4B ./int4          the model writes the texts itself
  qwenrt quantize Qwen3-4B ./int4 --calibration talks.jsonl
  qwenrt chat ./int4

A line of talks.jsonl is a conversation or a text:
  {"messages": [{"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"}]}
  {"text": "Once upon a time ..."}
A file of any other name is plain text. A run that was cut goes on.
"""
# option -> (type, choices, help); each is a setting of qwenrt.quantize, whose own default holds where none is given
_SETTINGS: dict[str, tuple[type, tuple[Any, ...] | None, str]] = {
    "method": (str, ("gptq", "awq", "rtn"), "gptq, the default, makes up for each weight's error; awq multiplies "
               "weights of large inputs up; rtn rounds to nearest, without texts"),
    "bits": (int, (4, 8), "bits of a weight: 4, the default, or 8"),
    "group_size": (int, (32, 64, 128, -1), "inputs that share a scale: 128, the default; -1 is all of them"),
    "act_order": (str, ("static", "full", "off"), "static, the default: inputs that matter most first, groups as they "
                  "lie; full: AutoGPTQ's desc_act; off: as they come"),
    "samples": (int, None, "how many texts (128)"),
    "sample_length": (int, None, "tokens of a text (512)"),
    "damp": (float, None, "share of the Hessian's mean that is added to its diagonal (0.01)"),
    "seed": (int, None, "of what the model writes"),
}  # fmt: skip


def add_settings(group: Any, names: tuple[str, ...]) -> None:
    """Options for some of the settings of qwenrt.quantize."""
    for name in names:
        kind, choices, text = _SETTINGS[name]
        metavar = {} if choices else {"metavar": "N"}
        group.add_argument("--" + name.replace("_", "-"), type=kind, choices=choices, help=text, **metavar)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="write a checkpoint in int4 or int8 (GPTQ, AWQ)",
        description="Quantise a dense checkpoint to int4 or int8 and write a complete new one, in the format of GPTQ "
        "or AWQ, which qwenrt, vLLM, transformers and others read.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("out", help="directory for the new checkpoint")
    parser.add_argument(
        "--calibration",
        default="self",
        metavar="FILE",
        help="texts or conversations; self: the model writes them",
    )
    group = parser.add_argument_group("settings")
    add_settings(group, tuple(_SETTINGS))
    group.add_argument(
        "--asym", action="store_true", help="zeros that are not in the middle: a little more exact"
    )
    group.add_argument(
        "--one-pass", action="store_true", help="calibrate all of a layer on the dense one before it: faster"
    )
    group.add_argument(
        "--no-resume", action="store_true", help="begin anew even if OUT holds a cut run's layers"
    )
    group.add_argument("--overwrite", action="store_true", help="even if OUT holds a model")
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=quantize)


def quantize(args: argparse.Namespace) -> int:
    from qwenrt.loader.hub.resolve import resolve
    from qwenrt.quantize import quantize as run

    given = {name: getattr(args, name) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.asym:
        settings["sym"] = False
    if args.one_pass:
        settings["sequential"] = False
    directory = resolve(args.model, source=args.source, revision=args.revision, offline=args.offline)
    report = run(
        directory,
        args.out,
        calibration=args.calibration,
        resume=not args.no_resume,
        overwrite=args.overwrite,
        **settings,
    )
    terminal = Terminal()
    if args.json:
        terminal.result(dataclasses.asdict(report))
    else:
        terminal.say(report.format())
    return 0
