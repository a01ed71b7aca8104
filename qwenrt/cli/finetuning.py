"""qwenrt finetune: train a checkpoint on conversations."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from qwenrt.cli.deepspeed import instead_of
from qwenrt.cli.options import MODEL_HELP, add_source_options, example
from qwenrt.cli.plots import check_can_draw, draw_training
from qwenrt.cli.terminal import Terminal
from qwenrt.config import read_json

EXAMPLES = """example:
  qwenrt finetune Qwen-1_8B-Chat talks.jsonl ./my-model --epochs 3
  qwenrt finetune Qwen-7B-Chat-Int4 talks.jsonl ./my-adapter --rank 64

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
        "what is computed in: float32, bfloat16, float16, or auto, which is float32 on a CPU, else bfloat16; "
        "updates are made in float32, of bfloat16-pure in bfloat16",
    ),
    "recompute": (str, ("auto", "all", "none"), "auto", "compute activations again, which saves memory"),
    "moments": (
        str,
        ("float32", "bfloat16"),
        "float32",
        "of AdamW; bfloat16: 4 bytes less for each parameter, and 2 more of its gradient where that is in 16 bits",
    ),
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
    "method": (
        str,
        ("auto", "full", "lora", "qlora"),
        "auto",
        "train all parameters, or an adapter; qlora: one beside a model in codes; auto: an adapter where its settings "
        "are given, or the model has codes",
    ),
    "seed": (int, None, "0", "the same seed and threads give the same weights"),
    "device": (str, None, "auto", "cpu, cuda, npu, ..."),
    "threads": (int, None, "", "of torch, on the CPU"),
    "processes": (int, None, "1", "so many share each step"),
    "shard": (
        str,
        ("no", "optimizer", "all"),
        "no",
        "what processes share out: what is trained with its gradients and moments, or all weights as well",
    ),
    "save_every": (int, None, "", "keep the state every N steps, to go on after a cut"),
}

_LORA: dict[str, tuple[type, tuple[str, ...] | None, str, str]] = {
    "rank": (int, None, "16", "inner width of the adapter's pairs"),
    "alpha": (float, None, "32", "a pair adds alpha / rank times what it computes"),
    "dropout": (float, None, "0.0", "share of inputs that pairs do not see in training"),
    "targets": (str, None, "all", "modules that get a pair, as q_proj,v_proj; all: of attention and MLP"),
    "lora_plus": (float, None, "1.0", "by how much B's learning rate is higher"),
    "train_tokens": (
        str,
        None,
        "",
        "tokens whose rows of embedding and head are trained; auto: those that the base never had to say",
    ),
    "keep_modules": (
        str,
        ("auto", "none", "all"),
        "auto",
        "all: train embedding and head whole; auto: where the model knows no conversations, without --train-tokens",
    ),
    "quantize": (str, ("int8", "int4"), "", "round the base when it is loaded"),
    "moe_layout": (str, ("experts", "fused"), "experts", "how pairs of experts are written"),
}
_SWITCHES = {
    "rslora": "a pair adds alpha / sqrt(rank) times what it computes",
    "dora": "train the magnitudes of rows too",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="train a model on conversations",
        description="Train a checkpoint on conversations and write a new one, or an adapter for it.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("data", help="JSON or JSON lines of conversations, or a directory of such files")
    parser.add_argument("out", help="directory for the new checkpoint or the adapter")
    group = parser.add_argument_group("settings")
    lora = parser.add_argument_group("settings of adapters")
    for there, settings in ((group, _SETTINGS), (lora, _LORA)):
        for name, (kind, choices, default, text) in settings.items():
            metavar = {} if choices else {"metavar": "NAME" if kind is str else "N"}
            if name == "precision":  # its choices fill a line
                metavar = {"metavar": "DTYPE"}
            about = f"{text} ({default})" if default else text
            there.add_argument(
                "--" + name.replace("_", "-"), type=kind, choices=choices, help=about, **metavar
            )
    for name, text in _SWITCHES.items():
        lora.add_argument("--" + name, action="store_true", default=None, help=text)
    lora.add_argument(
        "--preset", choices=("seed",), help="seed: as the first Qwen's scripts (rank 64, alpha 16, ...)"
    )
    group.add_argument(
        "--eval", metavar="FILE", help="conversations to measure on, or a share of the data, as 0.05"
    )
    group.add_argument("--allow-special", action="store_true", help="read control tokens in contents as such")
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the losses: .svg, .png or .pdf, with the extra plot"
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="say what memory and time it takes, and stop; 1 where it does not fit",
    )
    group.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    group.add_argument(
        "--no-resume", action="store_true", help="begin anew even if OUT holds a cut run's state"
    )
    group.add_argument(
        "--overwrite", action="store_true", help="even if OUT holds a model, or is the model's own directory"
    )
    group.add_argument(
        "--deepspeed", type=Path, metavar="FILE", help="say which options do what DeepSpeed's file asks for"
    )
    add_source_options(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=finetune)


def finetune(args: argparse.Namespace) -> int:
    if args.deepspeed is not None:
        raise instead_of(args.deepspeed)
    from qwenrt.finetune import finetune as train
    from qwenrt.finetune.processes import speaks
    from qwenrt.loader.hub.resolve import resolve

    given = {name: getattr(args, name) for name in (*_SETTINGS, *_LORA, *_SWITCHES, "preset")}
    settings = {name: value for name, value in given.items() if value is not None}
    if args.eval is not None:
        settings["eval_data"] = _share(args.eval)
    directory = resolve(args.model, source=args.source, revision=args.revision, offline=args.offline)
    if args.plan:
        return _plan(args, directory, settings)
    if args.plot is not None:
        check_can_draw(args.plot)
    report = train(
        directory,
        args.data,
        args.out,
        resume=not args.no_resume,
        overwrite=args.overwrite,
        from_scratch=args.from_scratch,
        allow_special=args.allow_special,
        base_name=args.model,
        say=None if args.json else print_to_stderr,
        **settings,
    )
    if not speaks():
        return 0
    if args.plot is not None:
        draw_training(args.plot, read_json(report.output_dir / "loss_curve.json"))
    terminal = Terminal()
    if args.json:
        terminal.result(dataclasses.asdict(report))
    else:
        terminal.say(report.format())
    return 0


def _plan(args: argparse.Namespace, directory: Path, settings: dict[str, Any]) -> int:
    from qwenrt.finetune.job import prepare

    for name in ("threads", "save_every"):
        settings.pop(name, None)
    eval_data, preset = settings.pop("eval_data", None), settings.pop("preset", None)
    device, processes = settings.pop("device", "auto"), settings.pop("processes", 1)
    settings |= {"from_scratch": args.from_scratch, "allow_special": args.allow_special}
    job = prepare(directory, args.data, eval_data, preset, device, settings, processes)
    Terminal().say(job.plan())
    return 0 if job.need(job.recompute).total <= job.memory[0] else 1


def _share(text: str) -> str | float:
    """A share of the data, or the name of a file."""
    try:
        return float(text)
    except ValueError:
        return text


def print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
