"""qwenrt list: the models on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal, billions, counted, readable_bytes, width, wrapped
from qwenrt.config import Environment
from qwenrt.config.layers import num_parameters

if TYPE_CHECKING:
    from qwenrt.loader.hub.about import Facts

EXAMPLES = """examples:
  qwenrt list
  qwenrt list --json

Looks into qwenrt's own place (QWENRT_HOME), HuggingFace's cache (HF_HUB_CACHE,
HF_HOME) and ModelScope's (MODELSCOPE_CACHE). Every name can be given to chat,
serve and the other commands; `qwenrt show NAME` says more of one.
"""
_HEAD = ("NAME", "FROM", "ARCHITECTURE", "PARAMS", "WEIGHTS", "SIZE", "LAST USED")
_TO_THE_RIGHT = (3, 5)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "list",
        help="the models on this machine",
        description="List the models on this machine, those that other tools fetched included.",
        **example(EXAMPLES),
    )
    parser.add_argument(
        "--all", action="store_true", help="also models of other kinds, which qwenrt does not run"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    parser.set_defaults(command=list_models)


def list_models(args: argparse.Namespace) -> int:
    from qwenrt.loader.hub.about import on_this_machine

    found = on_this_machine(Environment.read())
    known = [model for model in found if model.config is not None or args.all or _unfinished(model)]
    loaded, terminal = _loaded(found), Terminal()
    if args.json:
        terminal.result([as_json(model) | {"loaded": model in loaded} for model in known])
        return 0
    for line in _lines([_row(model) for model in known], width()):
        terminal.say(line)
    whole = {model.name for model in loaded}
    notes = [_not_complete(model, model.name in whole) for model in known if model.lacks]
    if len({model.name for model in known}) < len(known):
        notes.append("a name that is listed twice means the first that is complete")
    if len(found) > len(known):
        others = counted(len(found) - len(known), "model")
        notes.append(f"{others} of other kinds, which qwenrt does not run: --all lists them")
    for note in notes:
        terminal.remark(note)
    return 0


def as_json(model: Facts) -> dict[str, Any]:
    from qwenrt.loader.hub.about import precision

    config, copy = model.config, model.copy
    return {
        "name": model.name,
        "repository": None if copy is None else copy.repo,
        "from": model.whose,
        "architecture": None if config is None else config.model_type,
        "parameters": None if config is None else num_parameters(config),
        "weights": precision(model) or None,
        "bytes": model.nbytes,
        "last_used": None if model.used is None else _moment(model.used).isoformat(timespec="seconds"),
        "complete": not model.lacks,
        "lacks": model.lacks or None,
        "problem": model.problem or None,
        "revisions": [] if copy is None else sorted(copy.snapshots),
        "directory": str(model.directory),
    }


def how_long_ago(moment: float | None) -> str:
    """A moment in seconds since the epoch -> "today", "3 days ago"."""
    if moment is None:
        return "-"
    days = (datetime.now().date() - datetime.fromtimestamp(moment).date()).days
    if days < 1:
        return "today"
    if days == 1:
        return "yesterday"
    for unit, length in (("year", 365), ("month", 30)):
        if days >= 2 * length:
            return f"{days // length} {unit}s ago"
    return f"{days} days ago"


def _unfinished(model: Facts) -> bool:
    """Whether it is a download of qwenrt's that did not get as far as its config.json."""
    return model.whose == "qwenrt" and model.config is None


def _not_complete(model: Facts, elsewhere: bool) -> str:
    """What a copy lacks, and what to do unless there is a complete one ``elsewhere``."""
    remedy = "" if elsewhere or model.copy is None else f"; `qwenrt pull {model.name}` fetches the rest"
    return f"{model.name} ({model.whose}) is not complete: {model.lacks}{remedy}"


def _loaded(found: Sequence[Facts]) -> list[Facts]:
    """Of each name the copy that is loaded by it: the first that is complete."""
    first: dict[str, Facts] = {}
    for model in found:
        if not model.lacks and model.config is not None:
            first.setdefault(model.name, model)
    return [*first.values()]


def _row(model: Facts) -> tuple[str, ...]:
    from qwenrt.loader.hub.about import precision

    config = model.config
    return (
        model.name,
        model.whose,
        "-" if config is None else config.model_type,
        "-" if config is None else billions(num_parameters(config)),
        "another kind" if config is None else "not complete" if model.lacks else precision(model) or "-",
        readable_bytes(model.nbytes),
        how_long_ago(model.used),
    )


def _lines(rows: Sequence[tuple[str, ...]], columns: int) -> list[str]:
    """A table, or where it does not fit into ``columns`` a name and below it what is said of the model."""
    widths = [max(map(len, column)) for column in zip(_HEAD, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) - 2 <= columns:
        return [_aligned(row, widths) for row in (_HEAD, *rows)]
    lines = []
    for name, whose, *others in rows:
        said = ", ".join(cell for cell in (*others, whose) if cell != "-")
        lines += [name, wrapped("", said, columns, indent=2)]
    return lines


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        f"{cell:>{widths[i]}}" if i in _TO_THE_RIGHT else f"{cell:<{widths[i]}}" for i, cell in enumerate(row)
    ]
    return "  ".join(cells).rstrip()


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=timezone.utc)
