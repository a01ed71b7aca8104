"""Options that several commands share, and how they become load() arguments and SamplingParams."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qwenrt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwenrt.llm import LLM

_LOAD_OPTIONS = (
    *("device", "dtype", "quantize", "quantize_head", "kv_cache_dtype", "activations"),
    *("max_model_len", "fallback", "packed_cache", "source", "revision", "offline"),
)
MODEL_HELP = '"demo", an alias such as Qwen-7B-Chat, a repository such as Qwen/Qwen-7B-Chat, or a directory'


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves text that has lines (the examples) as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def example(text: str) -> dict[str, Any]:
    """Keywords for add_parser that put an example below the help."""
    return {"epilog": text, "formatter_class": _HelpFormatter}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the files come from")
    group.add_argument("--source", choices=("auto", "huggingface", "modelscope"), default="auto")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of the repository")
    group.add_argument("--offline", action="store_true", default=None, help="open no network connection")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model runs")
    group.add_argument("--device", default="auto", help='"auto", "cpu", "cuda", "cuda:1", "npu", "dcu", ...')
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    group.add_argument("--quantize", choices=("int8", "int4"), help="weight-only, while loading")
    group.add_argument(
        "--quantize-head",
        choices=("int8", "int4"),
        help="the output layer as well, which is left dense otherwise: a quarter of a small int4 model's time. A layer "
        "that is the embedding too is then there twice: more memory",
    )
    group.add_argument("--kv-cache-dtype", choices=("auto", "int8"), default="auto")
    group.add_argument(
        "--activations",
        choices=("auto", "exact", "int16", "int8"),
        default="auto",
        help="what the CPU rounds the inputs of quantised layers to: int8 is the fastest; exact also keeps prompts "
        "beside 16-bit layers in float32",
    )
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest context, in tokens")
    group.add_argument(
        "--fallback",
        choices=("warn", "error", "silent"),
        default="warn",
        help="when a device has no fast code for a layer",
    )
    group.add_argument(
        "--packed-cache",
        nargs="?",
        const="1",
        metavar="DIR",
        help="keep packed weights on disk: the next start maps them (default: QWENRT_PACKED_CACHE)",
    )
    add_source_options(parser)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how tokens are chosen (default: the checkpoint's own settings)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("thinking (models that think before they answer)")
    group.add_argument(
        "--thinking", choices=("on", "off"), help="for models that can do either (default: the model's own)"
    )
    group.add_argument(
        "--thinking-budget", type=int, metavar="N", help="tokens after which a thought is brought to its end"
    )


def thinking_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of chat and stream that the options of ``add_thinking_options`` stand for."""
    given = {}
    if args.thinking is not None:
        given["enable_thinking"] = args.thinking == "on"
    if args.thinking_budget is not None:
        given["thinking_budget"] = args.thinking_budget
    return given


def load_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of qwenrt.load that the options of ``add_model_options`` stand for."""
    return {name: getattr(args, name) for name in _LOAD_OPTIONS}


def load_model(args: argparse.Namespace) -> LLM:
    from qwenrt.llm import load

    return load(args.model, **load_arguments(args))


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the user set, checked now: a bad number should not wait for a model to load."""
    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    changes = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**changes)
    return changes
