"""qwenrt finetune: train a checkpoint on conversations."""

from __future__ import annotations

import argparse
import dataclasses
import sys
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
# option -> (type, choices, default as help says it, help); each is a setting of qwenrt.finetune.finetune, whose own
# default holds where none is given
_SETTINGS: dict[str, tuple[type, tuple[str, ...] | None, str, str]] = {
    "epochs": (int, None, "5", "how often to go through the data"),
    "max_steps": (int, None, "", "end after so many steps"),
    "learning_rate": (float, None, "1e-5", "its highest value"),
    "batch_tokens": (int, None, "4096", "tokens in one step"),
    "micro_tokens": (int, None, "all", "tokens of a step that are computed at a time"),
    "max_length": (int, None, "512", "longer conversations are cut to so many tokens"),
    "max_dropped": (float, None, "0.1", "share of entries that may have nothing to learn in that length"),
    "warmup_ratio": (float, None, "0.01", "part of the steps until the highest learning rate"),
    "weight_decay": (float, None, "0.1", "of AdamW"),
    "max_grad_norm": (float, None, "1.0", "gradients are cut to this length"),
    "precision": (
        str,
        ("auto", "float32", "bfloat16", "bfloat16-pure", "float16"),
        "auto",
        "what is computed in; auto: float32 on a CPU, else bfloat16; updates are made in float32, pure: in bfloat16",
    ),
    "recompute": (str, ("auto", "all", "none"), "auto", "compute activations again, which saves memory"),
    "router": (str, ("auto", "trained", "frozen"), "auto", "what chooses experts"),
    "train_on": (
        str,
        ("auto", "answers", "all_frames"),
        "auto",
        "answers, or the tokens that frame turns as well, as the first Qwen was trained; auto: that for it alone",
    ),
    "thinking": (
        str,
        ("auto", "keep", "off"),
        "auto",
        "auto: each answer sees what it will see when it is given; keep: the thoughts of all turns before; off: none",
    ),
    "eval_every": (int, None, "a tenth", "steps between looks at what is held out"),
    "keep": (str, ("best", "last"), "best", "which step on what is held out is written"),
    "seed": (int, None, "0", "the same seed and threads give the same weights"),
    "device": (str, None, "auto", "cpu, cuda, npu, ..."),
    "threads": (int, None, "", "of torch, on the CPU"),
    "save_every": (int, None, "", "keep the state every N steps, to go on after a cut"),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="train a model on conversations",
        description="Train a checkpoint on conversations and write a new one.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("data", help="JSON or JSON lines of conversations, or a directory of such files")
    parser.add_argument("out", help="directory for the new checkpoint")
    group = parser.add_argument_group("settings")
    for name, (kind, choices, default, text) in _SETTINGS.items():
        metavar = {} if choices else {"metavar": "NAME" if kind is str else "N"}
        about = f"{text} ({default})" if default else text
        group.add_argument("--" + name.replace("_", "-"), type=kind, choices=choices, help=about, **metavar)
    group.add_argument(
        "--eval", metavar="FILE", help="conversations to measure on, or a share of the data, as 0.05"
    )
    group.add_argument("--allow-special", action="store_true", help="read control tokens in contents as such")
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
    if args.eval is not None:
        settings["eval_data"] = _share(args.eval)
    directory = resolve(args.model, source=args.source, revision=args.revision, offline=args.offline)
    report = train(
        directory,
        args.data,
        args.out,
        resume=not args.no_resume,
        overwrite=args.overwrite,
        from_scratch=args.from_scratch,
        allow_special=args.allow_special,
        say=None if args.json else print_to_stderr,
        **settings,
    )
    terminal = Terminal()
    if args.json:
        terminal.result(dataclasses.asdict(report))
    else:
        terminal.say(report.format())
    return 0


def _share(text: str) -> str | float:
    """A share of the data, or the name of a file."""
    try:
        return float(text)
    except ValueError:
        return text


def print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
