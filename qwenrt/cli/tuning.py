"""qwenrt tune: the best choices of the kernels for GPUs on the device that is here, kept for later loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qwenrt.cli.estimate import find_config
from qwenrt.cli.options import add_load_option, example
from qwenrt.cli.terminal import Terminal
from qwenrt.config import Environment, ModelConfig
from qwenrt.config.layers import head_linear, layer_linears

EXAMPLES = """examples:
  qwenrt tune Qwen2.5-7B --quantize int4
  qwenrt tune ./my-model --device cuda:1

Times launches over random weights of the model's shapes; no weight is loaded.
What is better than the table that comes with qwenrt is kept in QWENRT_HOME and
used by every later load on such a device with the same Triton; what is there of
other models stays.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "tune",
        help="time the kernels for GPUs at a model's shapes, and keep the best choices",
        description="Time the kernels of one token at a model's shapes on the device that is here, and keep the best "
        "choices for later loads. For NVIDIA's cards from sm_80 on.",
        **example(EXAMPLES),
    )
    parser.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="as of `qwenrt estimate`: also a released shape such as Qwen3-8B",
    )
    add_load_option(parser, "device")
    add_load_option(parser, "quantize")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there, where no load looks for it")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(command=tune)


def shapes_of(config: ModelConfig, quantize: str | None) -> list[tuple[int, int, int]]:
    """Bits, outputs and inputs of each linear of a layer, and of the head."""
    bits = config.quant.bits if config.quant is not None else {"int4": 4, "int8": 8}.get(quantize or "", 16)
    specs = [spec for layer in range(config.num_layers) for spec in layer_linears(config, layer)]
    found = [(bits if spec.quantizable and bits in (4, 8) else 16, spec) for spec in specs]
    found.append((16, head_linear(config)))
    return list(dict.fromkeys((b, spec.out_features, spec.in_features) for b, spec in found))


def tune(args: argparse.Namespace) -> int:
    """0 when done. Raises BackendError where there is nothing to tune."""
    from qwenrt.backends import registry
    from qwenrt.conformance.gpu import tuning

    terminal, environment = Terminal(), Environment.read()
    shapes = shapes_of(find_config(args.model)[0], args.quantize)
    backend = registry.create(args.device, environment.backend)

    def note(choice: tuning.Choice) -> None:
        bits, outputs, inputs = choice.shape
        how = f"{choice.warps.rows} x {choice.warps.inputs} warps"
        gain = f"{choice.usual_s / choice.best_s:.2f} times as fast as without a table"
        if terminal.looked_at:
            terminal.remark(
                f"{bits} bits, {outputs} x {inputs}: {choice.best_s * 1e6:.1f} us by {how}, {gain}"
            )

    clock = tuning.clock_of(backend)
    result, path = tuning.keep(backend, shapes, clock, environment.cache_dir, args.out, note)
    if args.json:
        rows = [vars(choice) | {"warps": vars(choice.warps)} for choice in result.choices]
        found = {"kind": "tune", "model": args.model, "device": str(backend.device), "file": str(path)}
        terminal.result({**found, "pdl": result.pdl, "linears": rows})
        return 0
    gained = sum(choice.best_s < choice.usual_s for choice in result.choices)
    terminal.say(f"{gained} of {len(result.choices)} shapes are faster with a table; kept in {path}")
    return 0
