"""Options that several commands share, and how they become load() arguments and SamplingParams."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from qwenrt.errors import ConfigError
from qwenrt.load_options import ABOUT, CHOICES, LoadOptions, dtype_name
from qwenrt.sampling_params import SamplingParams
from qwenrt.text.chat.efforts import EFFORTS

if TYPE_CHECKING:
    from qwenrt.llm import LLM

# Options of `qwenrt.load` that commands have: how a model runs, and where its files come from.
RUN_OPTIONS = (
    *("device", "dtype", "quantize", "quantize_head", "kv_cache_dtype", "activations"),
    *("max_model_len", "fallback", "packed_cache", "draft", "draft_tokens"),
)
SOURCE_OPTIONS = ("source", "revision", "offline")
# And those that matter where many requests share a model.
SHARING_OPTIONS = (
    *("max_num_seqs", "max_num_batched_tokens", "step_target_ms"),
    *("prefix_store", "prefix_store_bytes", "merge_system_messages", "max_adapters"),
)
_TYPES = get_type_hints(LoadOptions)
MODEL_HELP = (
    '"demo", a name such as Qwen3-4B or qwen3:4b, a repository as Qwen/Qwen3-4B, a directory or a GGUF file'
)


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves text that has lines (the examples) as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def example(text: str) -> dict[str, Any]:
    """Keywords for add_parser that put an example below the help."""
    return {"epilog": text, "formatter_class": _HelpFormatter}


def add_load_option(parser: Any, name: str, *aliases: str, **changes: Any) -> None:
    """An option of `qwenrt.load` as one of the command line: its name, default, choices and help are LoadOptions'.

    ``changes`` go to add_argument: where the option differs for this command.
    """
    (option,) = (field for field in dataclasses.fields(LoadOptions) if field.name == name)
    types = get_args(_TYPES[name]) or (_TYPES[name],)
    told: dict[str, Any] = {"default": option.default, "help": ABOUT[name]}
    if name in CHOICES:
        told |= {"choices": CHOICES[name]} | ({"type": dtype_name} if name == "dtype" else {})
    elif int in types:
        told |= {"type": int, "metavar": "N"}
    elif bool in types and str in types:  # alone it means yes
        told |= {"nargs": "?", "const": True, "metavar": "DIR"}
    elif bool in types:
        told["action"] = "store_true"
    parser.add_argument(*aliases, "--" + name.replace("_", "-"), **told | changes)


def add_adapter_option(parser: argparse.ArgumentParser, which: str) -> None:
    """Adapters to load beside the model; ``which``: which of them serves."""
    parser.add_argument(
        "--adapter",
        dest="adapters",
        type=_named_directory,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help=f"a LoRA adapter to load as well, under a name or that of its directory; may be repeated; {which}",
    )


def _named_directory(text: str) -> tuple[str, str]:
    name, named, directory = text.partition("=")
    if not named:
        name, directory = os.path.basename(os.path.abspath(text)), text
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, directory


def first_adapter(args: argparse.Namespace) -> str | None:
    """The name of the first of ``add_adapter_option``'s, if there is one."""
    return args.adapters[0][0] if args.adapters else None


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where a model's files come from."""
    group = parser.add_argument_group("where the files come from")
    for name in SOURCE_OPTIONS:
        add_load_option(group, name)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """All options of `qwenrt.load` that the command line has."""
    group = parser.add_argument_group("how the model runs")
    for name in RUN_OPTIONS:
        add_load_option(group, name)
    add_source_options(parser)


def add_sharing_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qwenrt.load` for a server's model."""
    group = parser.add_argument_group("how requests are served")
    for name in SHARING_OPTIONS:
        add_load_option(group, name)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how tokens are chosen (default: the checkpoint's own settings)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="0 always takes the most probable token"
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the most probable tokens that add up to P"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("thinking (models that think before they answer)")
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="for models that can do both (default: the model's own)",
    )
    group.add_argument(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="longest thought, in tokens; then the answer begins",
    )
    group.add_argument(
        "--reasoning-effort",
        choices=tuple(EFFORTS),
        help="the same in a word: what the model is told where it was taught to listen, else a budget",
    )


def thinking_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of chat and stream that the options of ``add_thinking_options`` stand for."""
    given = {}
    if args.thinking is not None:
        given["enable_thinking"] = args.thinking == "on"
    if args.thinking_budget is not None:
        given["thinking_budget"] = args.thinking_budget
    if args.reasoning_effort is not None:
        given["reasoning_effort"] = args.reasoning_effort
    return given


def load_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of qwenrt.load that the options of ``add_model_options`` stand for."""
    return {name: getattr(args, name) for name in (*RUN_OPTIONS, *SOURCE_OPTIONS)}


def given_options(args: argparse.Namespace, also: tuple[str, ...] = ()) -> list[str]:
    """The options of ``add_model_options``, and ``also`` others of `qwenrt.load`, that differ from their defaults, as a
    command line has them."""
    given: list[str] = []
    defaults = {field.name: field.default for field in dataclasses.fields(LoadOptions)}
    for name in (*RUN_OPTIONS, *SOURCE_OPTIONS, *also):
        value = getattr(args, name)
        if value != defaults[name] and value is not False:
            given.append("--" + name.replace("_", "-"))
            if value is not True:
                given.append(str(value))
    return given


def load_model(args: argparse.Namespace, **changes: Any) -> LLM:
    """The model of ``args``, with ``changes`` to what its options say."""
    from qwenrt.loading import load

    adapters = dict(getattr(args, "adapters", ()))
    if adapters:
        changes.setdefault("adapters", adapters)
    return load(args.model, **load_arguments(args) | changes)


def load_model_or_shape(args: argparse.Namespace, **changes: Any) -> LLM:
    """The same for commands that also have --shape: random weights, which come from nowhere."""
    if args.shape is None:
        return load_model(args, **changes)
    from qwenrt.loading import load_random

    arguments = {name: value for name, value in load_arguments(args).items() if name not in SOURCE_OPTIONS}
    return load_random(args.shape, **arguments | changes)


def check_installed(command: str, needed: Sequence[str]) -> None:
    """Raises ConfigError where a module that the command needs is not installed; all are in one extra."""
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        found = f"{', '.join(missing)} is not installed"
        raise ConfigError(command, found, 'Install what it needs: pip install "qwenrt[server]"')


def check_can_write(option: str, path: Path) -> None:
    """Raises ConfigError where no file could be written, before anything is measured for it."""
    if os.path.isdir(path):  # unlike Path's, false where it may not be looked at
        found = "it is a directory"
    elif not os.path.isdir(path.parent):
        found = f"there is no directory {path.parent}"
    elif not os.access(path if os.path.lexists(path) else path.parent, os.W_OK):
        found = "it may not be written"
    else:
        return
    raise ConfigError(
        f"{option} {path}", found, "Choose a file in a directory that exists and can be written."
    )


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the user set, checked now: a bad number should not wait for a model to load."""
    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    changes = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**changes)
    return changes
