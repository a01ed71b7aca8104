"""qwenrt estimate: what a model needs on a device, and which settings would fit, from its config alone."""

from __future__ import annotations

import argparse
import difflib
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrt.cli.options import example
from qwenrt.cli.terminal import Terminal
from qwenrt.config import Environment, ModelConfig, read_json
from qwenrt.config.quant import rounded_form
from qwenrt.errors import BackendError, CheckpointError, RequestError
from qwenrt.files import is_there

if TYPE_CHECKING:
    from qwenrt.loader.fit import Option, Placement
    from qwenrt.loader.footprint import MemoryNeed

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
        help="a directory, a config.json, a model in the cache, or a released shape such as Qwen3-8B",
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", "npu", "dcu"')
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="free memory of the device, in place of what is found"
    )
    parser.add_argument("--ctx", type=int, metavar="N", help=f"tokens a user has (default: {_USUAL_CONTEXT})")
    parser.add_argument("--users", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none", help="at load")
    parser.add_argument(
        "--kv", "--kv-cache-dtype", choices=("auto", "int8"), default="auto", help="how the cache is kept"
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
    context: int
    users: int
    quantize: str | None
    kv: str
    placement: Placement
    need: MemoryNeed
    options: list[Option]

    @property
    def needed(self) -> int:
        return self.need.total + self.placement.runtime

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.needed <= self.free


def estimate(args: argparse.Namespace) -> int:
    """0 where it fits or the memory is not known, 1 where it does not fit."""
    report = examine(args)
    terminal = Terminal()
    if args.json:
        terminal.result(as_json(report))
    else:
        _show(report, terminal)
    return 1 if report.fits is False else 0


def examine(args: argparse.Namespace) -> Report:
    from qwenrt.loader.fit import Workload, options, place
    from qwenrt.loader.footprint import BATCH_TOKENS, memory_need

    for name, value, most in (("--ctx", args.ctx, _MOST), ("--users", args.users, 4096)):
        if value is not None and not 1 <= value <= most:
            raise RequestError(name, f"got {value}", f"It must be from 1 to {most}.")
    if args.memory is not None and not 0 < args.memory <= 2**20:
        raise RequestError("--memory", f"got {args.memory:g}", "Give the free memory in GiB.")
    config, source = find_config(args.model)
    device, free, total = _device(args.device, args.memory)
    quantize = None if args.quantize == "none" else args.quantize
    placed = partial(place, config, device, args.dtype, free)
    placement = placed(quantize)
    context = args.ctx or min(_USUAL_CONTEXT, config.max_position_embeddings)
    need = memory_need(
        config, placement.storage, context, users=args.users, quantize=quantize, kv_cache_dtype=args.kv
    )
    found = options(config, placed, Workload(context, args.users), free, BATCH_TOKENS) if free else []
    return Report(
        *(args.model, source, config, device, free, total, context, args.users, quantize, args.kv),
        *(placement, need, found),
    )


def find_config(name: str) -> tuple[ModelConfig, str]:
    """A config and where it is from: a file, a directory, the cache, or the table of released shapes."""
    from qwenrt.config.released import RELEASED, released_config
    from qwenrt.loader.hub import resolve

    path = Path(name).expanduser()
    if os.path.isfile(path):
        sidecar = path.with_name("quantize_config.json")
        quantize = read_json(sidecar) if is_there(sidecar, CheckpointError) else None
        return ModelConfig.from_dict(read_json(path), quantize), str(path)
    try:
        directory = resolve(name, offline=True, weights=False)
    except CheckpointError as missing:
        config_of_shape = released_config(name)
        if config_of_shape is not None:
            return config_of_shape, "the built-in table of released shapes"
        if name.count("/") > 1 or name.startswith((".", "~", os.sep)) or "\\" in name:
            raise
        close = difflib.get_close_matches(name.rpartition("/")[2], RELEASED, 3)
        raise CheckpointError(
            f"estimating {name[:120]!r}",
            "it is no file, no directory, not in the cache, and no released shape",
            f"Did you mean {' or '.join(close)}?" if close else f"Known shapes are: {', '.join(RELEASED)}.",
        ) from missing
    return _as_stored(ModelConfig.from_dir(directory), directory), str(directory)


def _as_stored(config: ModelConfig, directory: Path) -> ModelConfig:
    """With what the weights say where they are here and whole; else as config.json says."""
    from qwenrt.loader.as_stored import as_stored
    from qwenrt.loader.checkpoint import open_checkpoint

    try:
        return as_stored(config, open_checkpoint(directory))
    except CheckpointError:
        return config


def _device(wanted: str, memory: float | None) -> tuple[str, int | None, int | None]:
    """The device's name, and its free and whole memory where that can be told."""
    from qwenrt.loader.device_memory import device_memory

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
        "parameters": config.num_parameters,
        "active_parameters": config.num_active_parameters,
        "device": report.device,
        "dtype": report.placement.dtype,
        "context": report.context,
        "users": report.users,
        "quantize": report.quantize,
        "kv_cache_dtype": report.kv,
        "weight_bytes": report.need.weights,
        "kv_bytes_per_token": _token_bytes(report),
        "cache_bytes": report.need.cache,
        "workspace_bytes": report.need.workspace,
        "runtime_bytes": report.placement.runtime,
        "total_bytes": report.needed,
        "memory_free_bytes": report.free,
        "memory_total_bytes": report.total,
        "fits": report.fits,
        "options": [asdict(option) for option in report.options],
        "assumed": _assumed(report),
    }


def _token_bytes(report: Report) -> int:
    from qwenrt.loader.footprint import cache_bytes

    return cache_bytes(report.config, 1, report.placement.storage.activation, report.kv)


def _show(report: Report, terminal: Terminal) -> None:
    config, need = report.config, report.need

    def row(label: str, size: str, text: str = "", style: str = "") -> None:
        terminal.say(f"{label:<12} {size:>12}   {text}".rstrip(), style)

    origin = "" if report.source == report.model else f", from {report.source}"
    terminal.say(f"{report.model}: {config.model_type}{origin}", "bold")
    active = config.num_active_parameters
    part = "" if active == config.num_parameters else f"{_billions(active)} of them active for a token"
    row("parameters", _billions(config.num_parameters), part)
    row("weights", _gib(need.weights), _weights(report))
    cached = (
        f"{report.users} x {report.context} tokens of {_token_bytes(report) / 1024:.1f} KiB, {_kv(report)}"
    )
    row("cache", _gib(need.cache), cached)
    row("workspace", _gib(need.workspace), "activations, or what loading needs if that is more")
    row("runtime", _gib(report.placement.runtime), "Python and torch" if _on_cpu(report) else "the driver")
    row("total", _gib(report.needed), style="bold")
    if report.free is None:
        row("memory", "not known", f"of {report.device}: say how much it has with --memory GIB", "yellow")
    else:
        whole = "" if report.total is None else f" of {_gib(report.total)}"
        words = "it fits" if report.fits else f"{_gib(report.needed - report.free)} too little"
        row("memory", _gib(report.free), f"free{whole} on {report.device}: {words}", _colour(report.fits))
        _show_options(report, terminal)
    terminal.say()
    terminal.say(f"assumed: {_assumed(report)}", "dim")


def _show_options(report: Report, terminal: Terminal) -> None:
    """What would fit: a line for each way to load."""
    terminal.say()
    users = "1 user" if report.users == 1 else f"{report.users} users"
    head = (f"context for {users}", f"users at {report.context}")
    terminal.say(f"{'quantize':<10} {'cache':<9} {'weights':>12}   {head[0]:>20}   {head[1]:>16}", "bold")
    for option in report.options:
        kv = "int8" if option.kv_cache_dtype == "int8" else report.placement.dtype
        quantize = option.quantize or "none"
        whole = option.longest == report.config.max_position_embeddings
        longest = f"{option.longest}{' (all)' if whole else ''}" if option.longest else "-"
        asked = (option.quantize, option.kv_cache_dtype) == (report.quantize, report.kv)
        line = f"{quantize:<10} {kv:<9} {_gib(option.need.weights):>12}   {longest:>20}   "
        line += f"{option.most_users or '-':>16}"
        terminal.say(line + ("   <- as asked" if asked else ""), _colour(bool(option.longest)))


def _assumed(report: Report) -> str:
    """What the figures rest on, in one line."""
    config = report.config
    said = ["compiled kernels" if _on_cpu(report) else "plain torch", "512 tokens a step"]
    said.insert(0, f"activations in {report.placement.dtype}")
    if config.dtype is None and report.placement.storage.stored == 2:
        said.append("16-bit weights in the file")
    if config.quant is not None and not config.quant.has_codes and report.quantize is None:
        said.append("FP8 weights turned into 16 bits at load")
    if report.context > config.max_position_embeddings:
        said.append(f"a context beyond the {config.max_position_embeddings} tokens the model was made for")
    return ", ".join(said)


def _weights(report: Report) -> str:
    quant, storage = report.config.quant, report.placement.storage
    dense = f"{8 * storage.dense}-bit"
    if quant is not None and quant.has_codes:
        return f"{quant.method} int{quant.bits} in groups of {quant.group_size}, the rest {dense}"
    if report.quantize:
        return f"linears rounded to {rounded_form(report.quantize)}, the rest {dense}"
    return dense


def _kv(report: Report) -> str:
    return "int8" if report.kv == "int8" else report.placement.dtype


def _on_cpu(report: Report) -> bool:
    return report.device == "cpu"


def _colour(good: bool | None) -> str:
    return "green" if good else "red"


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 10**7 else f"{count / 1e6:.2f} M"
