"""qwenrt merge: LoRA adapters merged into their model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_source_options, example
from qwenrt.cli.quantizing import add_settings
from qwenrt.cli.terminal import Terminal
from qwenrt.errors import CheckpointError, RequestError
from qwenrt.files import is_there

EXAMPLES = """examples:
  qwenrt merge Qwen3-4B ./my-adapter -o ./my-model
  qwenrt merge Qwen3-4B ./law:0.7 ./style:0.3 -o ./both
  qwenrt merge Qwen-7B-Chat-Int4 ./my-adapter -o ./out --base Qwen-7B-Chat
  qwenrt merge Qwen3-4B ./my-adapter -o ./int4 --requantize gptq
  qwenrt chat ./my-model

An adapter is a directory: adapter_config.json and adapter_model.safetensors,
as qwenrt finetune and peft write them. A weight is a factor of what it changes.
A quantised model becomes a dense one, unless --requantize is given.
"""


_QUANTIZING = ("bits", "group_size", "samples")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="merge LoRA adapters into their model",
        description="Write a complete checkpoint of a model with LoRA adapters merged into it, in float32 and rounded "
        "once.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="directory of an adapter; weight 1"
    )
    parser.add_argument("-o", "--out", required=True, help="directory for the new checkpoint")
    parser.add_argument(
        "--base", metavar="MODEL", help="merge into this one, the dense model that MODEL was quantised from"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the result; auto: what each weight has, of a quantised model what config.json says",
    )  # fmt: skip
    group = parser.add_argument_group("quantising the result")
    group.add_argument(
        "--requantize", choices=("gptq", "awq", "rtn"), help="how; refused if it undoes the adapter"
    )
    group.add_argument(
        "--calibration", metavar="FILE", help="texts or conversations; else the model writes them"
    )
    add_settings(group, _QUANTIZING)
    parser.add_argument(
        "--strict", action="store_true", help="refuse adapters that lack what their config lists"
    )
    parser.add_argument(
        "--moe-layout",
        choices=("out_in", "in_out"),
        help="how an adapter's tensors of all experts lie, if both fit",
    )
    parser.add_argument("--overwrite", action="store_true", help="even if OUT holds a model")
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=merge)


def merge(args: argparse.Namespace) -> int:
    from qwenrt.loader.hub.resolve import resolve
    from qwenrt.merging import merge as run

    settings = {name: getattr(args, name) for name in ("calibration", *_QUANTIZING)}
    directory = resolve(
        args.base or args.model, source=args.source, revision=args.revision, offline=args.offline
    )
    report = run(
        directory,
        [_with_weight(text) for text in args.adapters],
        args.out,
        dtype=args.dtype,
        requantize=args.requantize,
        strict=args.strict,
        moe_layout=args.moe_layout,
        overwrite=args.overwrite,
        **{name: value for name, value in settings.items() if value is not None},
    )
    terminal = Terminal()
    if args.json:
        terminal.result(dataclasses.asdict(report))
    else:
        terminal.say(report.format())
    return 0


def _with_weight(text: str) -> tuple[str, float]:
    """("./law", 0.7) of "./law:0.7"; a directory whose own name has a colon is taken as it is."""
    path, colon, share = text.rpartition(":")
    if not colon or is_there(Path(text), CheckpointError):
        return text, 1.0
    try:
        return path, float(share)
    except ValueError:
        if "/" in share or "\\" in share:  # C:\\adapters
            return text, 1.0
        raise RequestError(
            f"merging {text}", f"{share!r} is no weight", "Write DIRECTORY or DIRECTORY:0.5."
        ) from None
