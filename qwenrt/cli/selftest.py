"""qwenrt selftest: a model on a device beside what its definitions give on a CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwenrt.cli.options import MODEL_HELP, add_load_option, example
from qwenrt.cli.terminal import Terminal

EXAMPLES = """examples:
  qwenrt selftest demo --device cuda
  qwenrt selftest Qwen3-0.6B --record digests.json     on a CPU, once
  qwenrt selftest Qwen3-0.6B --digests digests.json --device npu
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "selftest",
        help="whether a model gives on a device what it gives on a CPU",
        description="Compare a model's logits and greedy tokens on a device, texts in English and Chinese, with what "
        "its definitions gave on a CPU: for the built-in model that comes with the package, for others it is recorded "
        "or, without a record, computed first.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", nargs="?", default="demo", help=f"{MODEL_HELP} (default: demo)")
    add_load_option(parser, "device")
    add_load_option(parser, "dtype", default="float32")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="what was recorded before")
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="compute on this CPU, write it down, and stop"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=selftest)


def selftest(args: argparse.Namespace) -> int:
    """0 where all is as recorded, 1 where not."""
    from qwenrt.conformance import selftest as test
    from qwenrt.conformance.facts import facts

    terminal = Terminal()
    note = terminal.remark if terminal.looked_at else lambda _: None
    if args.record is not None:
        test.write(test.record(args.model, note), args.record)
        terminal.say(f"recorded in {args.record}")
        return 0
    path = args.digests or (test.DEMO if args.model == "demo" else None)
    digests = test.kept_digests(path) if path else test.record(args.model, note)
    found = list(test.compare(args.model, digests, device=args.device, dtype=args.dtype, note=note))
    wrong = [finding for finding in found if finding.wrong]
    if args.json:
        rows = [vars(finding) for finding in found]
        terminal.result({"kind": "selftest", "model": args.model, **facts(args.device), "findings": rows})
        return int(bool(wrong))
    for way in dict.fromkeys(finding.way for finding in found):
        of_way = [finding for finding in found if finding.way == way]
        worst = max(of_way, key=lambda finding: finding.error)
        state = "WRONG" if any(f.wrong for f in of_way) else "right"
        terminal.say(
            f"{way:<14} {state}: logits within {worst.error:.1e} of their largest ({worst.allowed:.1e} allowed)"
        )
    for finding in wrong:
        terminal.say(f"  {finding.way}, text {finding.text}: {finding.wrong}", "red")
    terminal.say(f"{len(found)} texts, {len(wrong)} wrong", "bold red" if wrong else "bold")
    return int(bool(wrong))
