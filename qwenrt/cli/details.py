"""qwenrt show: what one model on this machine is, in a user's words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.cli.estimate import config_as_stored, device_and_memory, gib, usual_context
from qwenrt.cli.listing import as_json, how_long_ago
from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal, billions, counted, readable_bytes, width, wrapped
from qwenrt.config import Environment, ModelConfig
from qwenrt.config.layers import num_active_parameters, num_parameters
from qwenrt.errors import CheckpointError, QwenrtError
from qwenrt.files import opened
from qwenrt.load_options import LoadOptions

if TYPE_CHECKING:
    from qwenrt.loader.hub.about import Facts
    from qwenrt.prompting import Prompter

EXAMPLES = """examples:
  qwenrt show demo
  qwenrt show Qwen3-4B
  qwenrt show ./my-model --json

Reads what is on this machine and opens no connection. For a model that is not
here, `qwenrt estimate NAME` says how much memory it takes.
"""
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class Memory:
    """What a way to load takes, in bytes, for one user with the usual context; ``fits``: None where the device does not
    say how much it has."""

    quantize: str | None
    total: int
    fits: bool | None


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "show",
        help="what a model on this machine is, and what it needs",
        description="Say what a model on this machine is: its network, its files, whether they are complete, how it "
        "talks, and how much memory it takes.",
        **example(EXAMPLES),
    )
    parser.add_argument(
        "model", metavar="NAME", help='a name that `qwenrt list` shows, "demo", or a directory'
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=show)


def show(args: argparse.Namespace) -> int:
    """0 for a model that can be loaded, 1 for one that is incomplete or of another kind."""
    model = find(args.model)
    if model.config is not None:
        model = replace(model, config=config_as_stored(model.config, model.directory))
    prompter = _prompter(model)
    terminal = Terminal()
    if args.json:
        terminal.result(_as_json(model, prompter))
    else:
        columns = width()
        terminal.say(model.name, "bold")
        for label, text in _said(model, prompter):
            terminal.say(wrapped(label, text, columns))
    return 1 if model.lacks or model.config is None else 0


def find(name: str) -> Facts:
    """The model that a name means on this machine: of several copies the one that is loaded, else the first.

    Raises CheckpointError, with the nearest names, where there is none.
    """
    from qwenrt.loader.hub.about import facts, meant, models_of
    from qwenrt.loader.hub.resolve import local_directory

    env = Environment.read()
    directory = local_directory(name, env)
    if directory is not None:
        return facts(directory, name, headers=True)
    model, copies, others, gguf = meant(name, env)
    found = [
        facts(directory, called, copy, headers=True)
        for copy in copies
        for called, directory in models_of(copy, env)
        if not gguf or called.partition(":")[2].lower() == gguf.lower()
    ]
    if not found:
        raise CheckpointError(
            f"looking for {model}",
            "it is not on this machine",
            f"`qwenrt list` shows what is, `qwenrt pull {model}` fetches it, and `qwenrt estimate {model}` "
            f"says what it needs. {others}".strip(),
        )
    return next((model for model in found if not model.lacks), found[0])


def _prompter(model: Facts) -> Prompter | str:
    """How the model talks, or why that cannot be told."""
    from qwenrt.prompting import Prompter

    if model.config is None:
        return "not known"
    try:
        return Prompter.load(model.name, model.directory, model.config)
    except QwenrtError as error:
        return f"not known: {error.found}"


def memory(config: ModelConfig) -> tuple[list[Memory], str]:
    """What each way to load takes, from the most to the least exact, and what that is said for."""
    from qwenrt.loader.memory.fit import device_layout
    from qwenrt.loader.memory.footprint import memory_need

    device, free, _ = device_and_memory("auto")
    context = usual_context(config)
    coded = config.quant is not None and config.quant.has_codes
    found = []
    for quantize in (None,) if coded else (None, "int8", "int4"):
        layout = device_layout(config, device, "auto", free, quantize)
        need = memory_need(
            config, layout.storage, context, quantize=quantize, sequences=LoadOptions.max_num_seqs
        )
        total = need.total + layout.runtime
        found.append(Memory(quantize, total, None if free is None else total <= free))
    room = "" if free is None else f", which has {gib(free)} free"
    return found, f"for {context} tokens on {device}{room}"


# ---- for people


def _said(model: Facts, prompter: Prompter | str) -> Iterator[tuple[str, str]]:
    """Label and text, line by line."""
    yield "from", f"{'the package' if model.copy is None and model.name == 'demo' else _place(model)}"
    yield "directory", str(model.directory)
    yield "complete", f"no: {model.lacks}" if model.lacks else "yes"
    yield "last used", how_long_ago(model.used)
    licence = _licence(model.directory)
    if licence:
        yield "licence", licence
    config = model.config
    if config is None:
        yield "network", f"none that qwenrt runs: {model.problem}"
    else:
        yield from _network(model, config)
        yield from _talk(model, prompter)
        yield from _memory_lines(config)
    yield from _file_lines(model.directory)


def _place(model: Facts) -> str:
    if model.copy is None:
        return "a directory"
    revisions = len(model.copy.snapshots)
    return model.copy.store.label + (f", in {revisions} revisions" if revisions > 1 else "")


def _network(model: Facts, config: ModelConfig) -> Iterator[tuple[str, str]]:
    from qwenrt.loader.hub.about import precision

    active = num_active_parameters(config)
    part = "" if active == num_parameters(config) else f", {billions(active)} of them for a token"
    yield "network", f"{config.model_type}, {billions(num_parameters(config))} parameters{part}"
    yield "layers", f"{config.num_layers}, {config.hidden_size} wide"
    shared = "" if config.num_kv_heads == config.num_heads else f", {config.num_kv_heads} of keys and values"
    yield "heads", f"{config.num_heads}{shared}, {config.head_dim} wide"
    if config.moe is not None:
        beside = ", and one for every token" if config.moe.shared_intermediate_size else ""
        yield "experts", f"{config.moe.num_experts}, {config.moe.top_k} of them for a token{beside}"
    yield "context", f"{config.max_position_embeddings} tokens{_stretched(config)}"
    yield "vocabulary", f"{config.vocab_size} tokens"
    group = config.quant.group_size if config.quant is not None and config.quant.has_codes else 0
    yield "weights", (precision(model) or "not known") + (f" in groups of {group}" if group > 0 else "")


def _stretched(config: ModelConfig) -> str:
    """How a context is reached that is longer than the one the model was trained with."""
    if config.yarn is not None:
        return f", {config.yarn.original_length} stretched by YaRN"
    if config.use_dynamic_ntk and config.train_length < config.max_position_embeddings:
        return f", beyond {config.train_length} stretched by dynamic NTK"
    return ""


def _talk(model: Facts, prompter: Prompter | str) -> Iterator[tuple[str, str]]:
    from qwenrt.loader.hub.names import about_base

    if isinstance(prompter, str):
        yield "talks", prompter
        return
    base = about_base(model.name)
    talks = "yes" if prompter.can_chat else "no, it continues texts"
    if isinstance(prompter.chat_format, QwenrtError):
        talks = f"its chat template cannot be used: {prompter.chat_format.found}"
    yield "talks", base or talks
    if prompter.can_chat:
        always = "before every answer"
        yield (
            "thinks",
            {"never": "no", "always": always, "optional": "yes, can be switched off"}[prompter.thinking],
        )
        yield "tools", "yes" if prompter.takes_tools else "no"
    yield "sampling", _sampling(prompter)


def _sampling(prompter: Prompter) -> str:
    chosen = prompter.generation.sampling
    if chosen.temperature == 0:
        return "the most probable token"
    said = [f"temperature {chosen.temperature:g}", f"top_p {chosen.top_p:g}"]
    if chosen.top_k:
        said.append(f"top_k {chosen.top_k}")
    if chosen.repetition_penalty != 1:
        said.append(f"repetition_penalty {chosen.repetition_penalty:g}")
    return ", ".join(said)


def _memory_lines(config: ModelConfig) -> Iterator[tuple[str, str]]:
    ways, words = memory(config)
    yield "memory", words
    for way in ways:
        fits = {None: "", True: ", fits", False: ", does not fit"}[way.fits]
        name = "as it is" if way.quantize is None else f"--quantize {way.quantize}"
        yield "", f"{name:<16} {gib(way.total):>10}{fits}"


def _file_lines(directory: Path) -> Iterator[tuple[str, str]]:
    from qwenrt.loader.hub.about import files

    found = [(name, size) for name, size in files(directory) if not name.endswith((".py", ".pyc"))]
    total = sum(size or 0 for _, size in found)
    yield "files", f"{counted(len(found), 'file')}, {readable_bytes(total)}"
    for name, size in found:
        yield "", f"{'missing' if size is None else readable_bytes(size):>10}  {name}"


def _licence(directory: Path) -> str:
    """The heading of a licence's text."""
    for name in _LICENCES:
        try:
            with opened(directory / name, CheckpointError) as file:
                text = file.read(4096).decode("utf-8", "replace")
        except (CheckpointError, OSError):
            continue
        lines = [line.strip(" #*\t") for line in text.splitlines()]
        heading = " ".join([line for line in lines if line][:2])
        return "".join(c for c in heading if c.isprintable())[:100]
    return ""


# ---- for programs


def _as_json(model: Facts, prompter: Prompter | str) -> dict[str, Any]:
    from qwenrt.loader.hub.about import files

    config = model.config
    told: dict[str, Any] = as_json(model) | {"licence": _licence(model.directory) or None}
    if config is not None:
        ways, _ = memory(config)
        told |= {
            "active_parameters": num_active_parameters(config),
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "experts": None if config.moe is None else config.moe.num_experts,
            "context": config.max_position_embeddings,
            "vocabulary": config.vocab_size,
            "memory": [{"quantize": way.quantize, "bytes": way.total, "fits": way.fits} for way in ways],
            "memory_context": usual_context(config),
        }
    if not isinstance(prompter, str):
        sampling = prompter.generation.sampling
        told |= {
            "chat": prompter.can_chat,
            "thinking": prompter.thinking,
            "tools": prompter.takes_tools,
            "sampling": {
                name: getattr(sampling, name)
                for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            },
        }
    return told | {"files": [{"name": name, "bytes": size} for name, size in files(model.directory)]}
