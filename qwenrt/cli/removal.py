"""qwenrt rm: delete a model from this machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal, counted, is_tty, readable_bytes, width, wrapped
from qwenrt.config import Environment
from qwenrt.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from qwenrt.loader.hub.removal import Removal
    from qwenrt.loader.hub.stores import Copy

EXAMPLES = """examples:
  qwenrt rm Qwen3-4B
  qwenrt rm Qwen3-4B --from huggingface --dry-run

Asks before it deletes. A model that a program has open, or that is being
downloaded, is not deleted, and no link is followed out of its cache.
"""
# who uses a cache beside qwenrt
_OTHERS = {"huggingface": "transformers, vLLM", "modelscope": "modelscope, ms-swift"}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "rm",
        help="delete a model from this machine",
        description="Delete a model from this machine, with all of its revisions.",
        **example(EXAMPLES),
    )
    parser.add_argument("model", metavar="NAME", help="a name that `qwenrt list` shows")
    parser.add_argument(
        "--from",
        dest="whose",
        choices=("qwenrt", "huggingface", "modelscope"),
        help="which copy, where there are several: qwenrt's own, or that of HuggingFace's or ModelScope's tools",
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be deleted, and delete nothing"
    )
    parser.set_defaults(command=rm)


def rm(args: argparse.Namespace) -> int:
    """0 when it is deleted (or would be), 1 where the user says no."""
    from qwenrt.loader.hub.removal import carry_out, check_unused, plan

    env = Environment.read()
    removal = plan(_copy(args.model, args.whose, env), env)
    terminal = Terminal()
    _announce(removal, terminal)
    check_unused(removal)
    if args.dry_run:
        terminal.remark("nothing was deleted (--dry-run)")
        return 0
    if not args.yes and not _agreed(terminal):
        terminal.remark("nothing was deleted")
        return 1
    carry_out(removal)
    terminal.say(f"deleted; {readable_bytes(removal.freed)} are free again")
    return 0


def _copy(name: str, whose: str | None, env: Environment) -> Copy:
    """The one copy that is meant. Raises where there is none, or several and nothing says which."""
    from qwenrt.loader.hub.about import meant, models_of

    if name == "demo":
        raise CheckpointError(
            "deleting 'demo'", "it is a part of the package", "Uninstall qwenrt to be rid of it."
        )
    model, copies, others, gguf = meant(name, env)
    found = [copy for copy in copies if whose in (None, copy.store.whose)]
    if not found:
        place = f" from {whose}" if whose else ""
        raise CheckpointError(
            f"deleting {model}{place}",
            "it is not on this machine" if whose is None else "there is no such copy",
            f"`qwenrt list` shows what is. {others}".strip(),
        )
    if len({copy.store.whose for copy in found}) > 1:
        places = " and ".join(copy.store.label for copy in found)
        raise CheckpointError(
            f"deleting {model}",
            f"there are {len(found)} copies, in {places}",
            f"Say which: {' or '.join(f'--from {copy.store.whose}' for copy in found)}.",
        )
    held = [one for one, _ in models_of(found[0], env)] if gguf else []
    if len(held) > 1:
        raise CheckpointError(
            f"deleting {name}",
            f"the copy of {model} has {len(held)} GGUF models: {', '.join(held)}",
            f"`qwenrt rm {model}` deletes all of them.",
        )
    return found[0]


def _announce(removal: Removal, terminal: Terminal) -> None:
    copy = removal.copy
    terminal.say(f"{copy.repo} in {copy.store.label}", "bold")
    for path in removal.paths:
        if path.is_dir() or path.lstat().st_size:  # not the empty files that note what was checked
            terminal.say(f"  {path}")
    revisions = f"{counted(len(copy.snapshots), 'revision')}, " if copy.store.hub == "huggingface" else ""
    terminal.say(f"  {revisions}{readable_bytes(removal.nbytes)}")
    if removal.freed < removal.nbytes:
        terminal.say(
            f"  {readable_bytes(removal.nbytes - removal.freed)} of it stay, as another cache has them too"
        )
    if not copy.store.own:
        others = f"{_OTHERS[copy.store.whose]} and other programs"
        terminal.say(
            wrapped("", f"{others} use these files too, and would have to fetch them again.", width(), 2),
            "yellow",
        )


def _agreed(terminal: Terminal) -> bool:
    if not is_tty(sys.stdin):
        raise RequestError("deleting a model", "nobody can be asked: stdin is no terminal", "Add --yes.")
    terminal.say("Delete it? [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
