"""qwenrt finetune: train all parameters of a checkpoint on conversations."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_source_options, example
from qwenrt.cli.terminal import Terminal

EXAMPLES = """example:
  qwenrt finetune Qwen-1_8B-Chat talks.jsonl ./my-model --epochs 3

Each line of talks.jsonl is one conversation:
  {"conversations": [{"from": "user", "value": "Hi"},
                     {"from": "assistant", "value": "Hello!"}]}
or, in OpenAI's shape:
  {"messages": [{"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"}]}
"""
# option -> (type, help); each is a setting of qwenrt.finetune.finetune, whose own default holds where none is given
_SETTINGS: dict[str, tuple[type, str]] = {
    "epochs": (int, "how often to go through the data"),
    "max_steps": (int, "end after so many steps"),
    "learning_rate": (float, "its highest value"),
    "batch_tokens": (int, "tokens in one step"),
    "max_length": (int, "longer conversations are cut to so many tokens"),
    "warmup_ratio": (float, "part of the steps until the highest learning rate"),
    "weight_decay": (float, "of AdamW"),
    "seed": (int, "the same seed and threads give the same weights"),
    "threads": (int, "of torch, on the CPU"),
    "save_every": (int, "keep the state every N steps, to go on after a cut"),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="train a model on conversations",
        description="Train all parameters of a checkpoint on conversations and write a new checkpoint.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("data", help="a JSON list or JSON lines of conversations")
    parser.add_argument("out", help="directory for the new checkpoint")
    group = parser.add_argument_group("settings")
    for name, (kind, text) in _SETTINGS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", help=text)
    group.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    group.add_argument(
        "--no-resume", action="store_true", help="begin anew even if OUT holds a cut run's state"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="even if OUT holds a model, or is the model's own directory"
    )
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=finetune)


def finetune(args: argparse.Namespace) -> int:
    from qwenrt.finetune import finetune as train
    from qwenrt.loader.hub.resolve import resolve

    given = {name: getattr(args, name) for name in _SETTINGS}
    settings = {name: value for name, value in given.items() if value is not None}
    directory = resolve(args.model, source=args.source, revision=args.revision, offline=args.offline)
    report = train(
        directory,
        args.data,
        args.out,
        resume=not args.no_resume,
        overwrite=args.overwrite,
        from_scratch=args.from_scratch,
        **settings,
    )
    terminal = Terminal()
    if args.json:
        terminal.result(dataclasses.asdict(report))
    else:
        terminal.say(report.format())
    return 0
