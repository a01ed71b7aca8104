"""qwenrt estimate: what a model needs on a device, and which settings would fit, from its config alone."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.cli.options import add_load_option, example
from qwenrt.cli.terminal import Terminal, billions, counted
from qwenrt.config import Environment, ModelConfig, parse_model_config, read_json, read_model_config
from qwenrt.config.layers import least_state_bytes, num_active_parameters, num_parameters, with_mtp
from qwenrt.config.quant import rounding_description
from qwenrt.errors import BackendError, CheckpointError, RequestError
from qwenrt.files import expanded, is_there
from qwenrt.load_options import CHOICES

if TYPE_CHECKING:
    from qwenrt.loader.memory.fit import DeviceLayout, Option, Workload
    from qwenrt.loader.memory.footprint import MemoryNeed

GIB = 2**30
DEVICES = ("cpu", "cuda", "npu", "dcu")
_USUAL_CONTEXT = 8192
_MOST = 2**24
EXAMPLES = """examples:
  qwenrt estimate Qwen2.5-7B --device cuda --memory 24 --ctx 32768
  qwenrt estimate ./my-model --quantize int4 --kv int8 --users 8

Needs config.json alone, and no torch. The exit code is 0 where the model fits
and where the device's memory is not known, 1 where it does not fit.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="how much memory a model needs, and what would fit",
        description="Say what a model needs on a device before it is fetched or loaded.",
        **example(EXAMPLES),
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a directory, a GGUF file, a config.json, a model in the cache, or a released shape such as Qwen3-8B",
    )
    add_load_option(
        parser, "device", help='where the model is to run: "auto", "cpu", "cuda", "cuda:1", "npu" or "dcu"'
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="free memory of the device (default: what it has free now)",
    )
    parser.add_argument(
        "--ctx",
        type=int,
        metavar="N",
        help=f"prompt and answer of each user, in tokens (default: {_USUAL_CONTEXT})",
    )
    parser.add_argument(
        "--users", type=int, default=1, metavar="N", help="conversations at the same time (default: 1)"
    )
    add_load_option(parser, "max_num_seqs")
    add_load_option(parser, "dtype")
    add_load_option(parser, "quantize", choices=("none", *CHOICES["quantize"]), default="none")
    add_load_option(parser, "kv_cache_dtype", "--kv", dest="kv")
    add_load_option(parser, "draft")
    add_load_option(parser, "draft_tokens")
    parser.add_argument("--finetune", choices=("full", "lora"), help="what training it takes instead")
    parser.add_argument(
        "--rank", type=int, default=16, metavar="N", help="of an adapter, at all linears (default: 16)"
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="N", help="trained on at a time (default: 4096)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=estimate)


@dataclass(frozen=True)
class Report:
    """Everything that is printed. ``free`` and ``total`` are bytes, None where nothing here can tell."""

    model: str
    source: str
    config: ModelConfig
    device: str
    free: int | None
    total: int | None
    work: Workload
    quantize: str | None
    kv: str
    layout: DeviceLayout
    need: MemoryNeed
    options: list[Option]
    draft_tokens: int = 0

    @property
    def state_bytes(self) -> int:
        """Of the cache, what does not grow with the context."""
        itemsize = self.layout.storage.activation
        return least_state_bytes(self.config, itemsize, self.work.sequences, self.draft_tokens)

    @property
    def needed(self) -> int:
        return self.need.total + self.layout.runtime

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.needed <= self.free


def estimate(args: argparse.Namespace) -> int:
    """0 where it fits or the memory is not known, 1 where it does not fit."""
    report = examine(args)
    terminal = Terminal()
    if args.finetune:
        return _training(args, report, terminal)
    if args.json:
        terminal.result(as_json(report))
    else:
        _show(report, terminal)
    return 1 if report.fits is False else 0


def _training(args: argparse.Namespace, report: Report, terminal: Terminal) -> int:
    """What training takes, with all activations kept and with them computed again: 1 where neither fits."""
    from qwenrt.loader.memory.training import lora_numbers, training_need

    for name, value in (("--rank", args.rank), ("--tokens", args.tokens)):
        if not 1 <= value <= _MOST:
            raise RequestError(name, f"got {value}", f"It must be from 1 to {_MOST}.")
    numbers = lora_numbers(report.config, args.rank) if args.finetune == "lora" else None
    itemsize = 4 if _on_cpu(report) else 2
    needs = {}
    for recompute in ("none", "all"):
        needs[recompute] = training_need(
            report.config,
            itemsize,
            lora=numbers,
            tokens=args.tokens,
            recompute=recompute == "all",
            quantize=report.quantize if numbers is not None else None,
        )
    fits = None if report.free is None else min(n.total for n in needs.values()) <= report.free
    if args.json:
        terminal.result({name: asdict(need) | {"total": need.total} for name, need in needs.items()})
    else:
        what = "all parameters" if numbers is None else f"an adapter of {numbers} numbers"
        terminal.say(f"{report.model}: training {what}, {args.tokens} tokens at a time", "bold")
        for name, need in needs.items():
            kept = "activations computed again" if name == "all" else "all activations kept"
            terminal.say(f"\n{kept} (recompute {name}):\n{need.format()}")
        if report.free is not None:
            terminal.say(f"{'memory':<12} {gib(report.free):>12}   free on {report.device}", _colour(fits))
    return 1 if fits is False else 0


def examine(args: argparse.Namespace) -> Report:
    from qwenrt.loader.memory.fit import MOST_USERS, Workload, device_layout, options
    from qwenrt.loader.memory.footprint import BATCH_TOKENS, memory_need

    numbers = (("--ctx", args.ctx), ("--users", args.users), ("--max-num-seqs", args.max_num_seqs))
    for (name, value), most in zip(numbers, (_MOST, MOST_USERS, MOST_USERS), strict=True):
        if value is not None and not 1 <= value <= most:
            raise RequestError(name, f"got {value}", f"It must be from 1 to {most}.")
    if args.memory is not None and not 0 < args.memory <= 2**20:
        raise RequestError("--memory", f"got {args.memory:g}", "Give the free memory in GiB.")
    config, source = find_config(args.model)
    config = with_mtp(config, args.draft, args.model)
    device, free, total = device_and_memory(args.device, args.memory)
    quantize = None if args.quantize == "none" else args.quantize
    layout_of = partial(device_layout, config, device, args.dtype, free)
    layout = layout_of(quantize)
    context = args.ctx or usual_context(config)
    sequences = max(args.users, args.max_num_seqs)
    need = memory_need(
        *(config, layout.storage, context),
        users=args.users,
        sequences=sequences,
        quantize=quantize,
        kv_cache_dtype=args.kv,
        draft_tokens=args.draft_tokens,
    )
    work = Workload(context, args.users, sequences)
    found = options(config, layout_of, work, free, BATCH_TOKENS, args.draft_tokens) if free else []
    return Report(
        *(args.model, source, config, device, free, total, work, quantize, args.kv),
        *(layout, need, found, args.draft_tokens),
    )


def usual_context(config: ModelConfig) -> int:
    """The tokens that are counted with unless the user says otherwise."""
    return min(_USUAL_CONTEXT, config.max_position_embeddings)


def find_config(name: str) -> tuple[ModelConfig, str]:
    """A config and where it is from: a file, a directory, the cache, or the table of released shapes."""
    from qwenrt.config.released import names_like, released_config
    from qwenrt.loader.hub.resolve import resolve

    path = expanded(name, CheckpointError)
    if os.path.isfile(path) and path.suffix.lower() != ".gguf":
        sidecar = path.with_name("quantize_config.json")
        quantize = read_json(sidecar) if is_there(sidecar, CheckpointError) else None
        return parse_model_config(read_json(path), quantize), str(path)
    try:
        directory = resolve(name, offline=True, weights=False)
    except CheckpointError as missing:
        config_of_shape = released_config(meant_by(name))
        if config_of_shape is not None:
            return config_of_shape, "the built-in table of released shapes"
        if name.count("/") > 1 or name.startswith((".", "~", os.sep)) or "\\" in name:
            raise
        raise CheckpointError(
            f"estimating {name[:120]!r}",
            "it is no file, no directory, not in the cache, and no released shape",
            names_like(name.rpartition("/")[2]),
        ) from missing
    return config_as_stored(read_model_config(directory), directory), str(directory)


def meant_by(name: str) -> str:
    """The repository that a name means, or the name itself."""
    from qwenrt.loader.hub.names import understand

    try:
        return understand(name).repo
    except CheckpointError:
        return name


def config_as_stored(config: ModelConfig, directory: Path) -> ModelConfig:
    """With what the weights say where they are here and whole; else as config.json says."""
    from qwenrt.loader.checkpoint.as_stored import as_stored
    from qwenrt.loader.checkpoint.checkpoint import open_checkpoint

    try:
        return as_stored(config, open_checkpoint(directory))
    except CheckpointError:
        return config


def device_and_memory(wanted: str, memory: float | None = None) -> tuple[str, int | None, int | None]:
    """The device's name, and its free and whole memory where that can be told."""
    from qwenrt.loader.memory.device import device_memory

    name, _, index = wanted.partition(":")
    if wanted != "auto" and (name not in DEVICES or (":" in wanted and not index.isdecimal())):
        raise BackendError(
            f"--device {wanted[:80]}", "no such device", f"Use auto, {', '.join(DEVICES)}, or cuda:1."
        )
    if wanted == "auto":
        preferred = Environment.read().backend or ""
        known = preferred.partition(":")[0] in DEVICES
        wanted = preferred if known else "cpu" if device_memory("cuda") is None else "cuda"
    if memory is not None:
        return wanted, int(memory * GIB), None
    found = device_memory(wanted)
    return wanted, *(found or (None, None))


# ---- for programs and for people


def as_json(report: Report) -> dict[str, Any]:
    config = report.config
    return {
        "model": report.model,
        "source": report.source,
        "model_type": config.model_type,
        "parameters": num_parameters(config),
        "active_parameters": num_active_parameters(config),
        "device": report.device,
        "dtype": report.layout.dtype,
        "context": report.work.context,
        "users": report.work.users,
        "max_num_seqs": report.work.sequences,
        "quantize": report.quantize,
        "kv_cache_dtype": report.kv,
        "weight_bytes": report.need.weights,
        "kv_bytes_per_token": _token_bytes(report),
        "cache_bytes": report.need.cache,
        "state_bytes": report.state_bytes,
        "workspace_bytes": report.need.workspace,
        "runtime_bytes": report.layout.runtime,
        "total_bytes": report.needed,
        "memory_free_bytes": report.free,
        "memory_total_bytes": report.total,
        "fits": report.fits,
        "options": [asdict(option) for option in report.options],
        "assumed": _assumed(report),
    }


def _token_bytes(report: Report) -> int:
    from qwenrt.loader.memory.footprint import cache_bytes

    return cache_bytes(report.config, 1, report.layout.storage.activation, report.kv)


def _show(report: Report, terminal: Terminal) -> None:
    config, need = report.config, report.need

    def row(label: str, size: str, text: str = "", style: str = "") -> None:
        terminal.say(f"{label:<12} {size:>12}   {text}".rstrip(), style)

    origin = "" if report.source == report.model else f", from {report.source}"
    terminal.say(f"{report.model}: model type {config.model_type}{origin}", "bold")
    active = num_active_parameters(config)
    part = "" if active == num_parameters(config) else f"{billions(active)} of them active for a token"
    row("parameters", billions(num_parameters(config)), part)
    row("weights", gib(need.weights), _weights(report))
    cached = f"{report.work.context} tokens of {_token_bytes(report) / 1024:.1f} KiB in {_kv(report)}"
    states = report.state_bytes
    row("KV cache", gib(need.cache - states), f"{counted(report.work.users, 'user')} with {cached}")
    if states:
        row(
            "states",
            gib(states),
            f"of linear attention, for max_num_seqs={report.work.sequences} and prefixes",
        )
    row("workspace", gib(need.workspace), "for the activations of a step, or for loading if that takes more")
    row("runtime", gib(report.layout.runtime), "Python and torch" if _on_cpu(report) else "the driver")
    row("total", gib(report.needed), style="bold")
    if report.free is None:
        row("memory", "not known", f"of {report.device}: say how much it has with --memory GIB", "yellow")
    else:
        whole = "" if report.total is None else f" of {gib(report.total)}"
        words = "it fits" if report.fits else f"{gib(report.needed - report.free)} are missing"
        row("memory", gib(report.free), f"free{whole} on {report.device}: {words}", _colour(report.fits))
        _show_options(report, terminal)
    terminal.say()
    terminal.say(f"these figures assume: {_assumed(report)}", "dim")


def _show_options(report: Report, terminal: Terminal) -> None:
    """What would fit: a line for each way to load."""
    terminal.say()
    terminal.say("what fits, by what the model is loaded with:")
    head = (f"context for {counted(report.work.users, 'user')}", f"users with {report.work.context}")
    terminal.say(f"{'quantize':<10} {'KV cache':<9} {'weights':>12}   {head[0]:>20}   {head[1]:>16}", "bold")
    for option in report.options:
        kv = "int8" if option.kv_cache_dtype == "int8" else report.layout.dtype
        quantize = option.quantize or "none"
        whole = option.longest == report.config.max_position_embeddings
        longest = f"{option.longest}{' (all)' if whole else ''}" if option.longest else "none"
        asked = (option.quantize, option.kv_cache_dtype) == (report.quantize, report.kv)
        line = f"{quantize:<10} {kv:<9} {gib(option.need.weights):>12}   {longest:>20}   "
        line += f"{option.most_users or 'none':>16}"
        terminal.say(line + ("   <- as asked for" if asked else ""), _colour(bool(option.longest)))


def _assumed(report: Report) -> str:
    """What the figures rest on, in one line."""
    config = report.config
    said = ["with the compiled kernels" if _on_cpu(report) else "in plain torch", "512 tokens a step"]
    said.insert(0, f"computed in {report.layout.dtype}")
    if config.dtype is None and report.layout.storage.stored == 2:
        said.append("16-bit weights in the file")
    if config.quant is not None and not config.quant.has_codes and report.quantize is None:
        said.append("FP8 weights turned into 16 bits at load")
    if report.work.context > config.max_position_embeddings:
        said.append(f"a context beyond the {config.max_position_embeddings} tokens the model was made for")
    return ", ".join(said)


def _weights(report: Report) -> str:
    quant, storage = report.config.quant, report.layout.storage
    dense = f"{8 * storage.dense}-bit"
    if quant is not None and quant.has_codes:
        from qwenrt.loader.memory.footprint import forms_of

        groups = {-1: "whole rows"}
        forms = [f"int{bits} in groups of {groups.get(size, size)}" for bits, size in forms_of(report.config)]
        return f"{quant.method} {' and '.join(forms)}, the rest {dense}"
    if report.quantize:
        return f"linear layers rounded to {rounding_description(report.quantize)}, the rest {dense}"
    return dense


def _kv(report: Report) -> str:
    return "int8" if report.kv == "int8" else report.layout.dtype


def _on_cpu(report: Report) -> bool:
    return report.device == "cpu"


def _colour(good: bool | None) -> str:
    return "green" if good else "red"


def gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB // 10 else f"{nbytes / 2**20:.1f} MiB"
