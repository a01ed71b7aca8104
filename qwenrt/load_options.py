"""How a model is loaded: the options of `qwenrt.load`, which the command line has under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from qwenrt.arguments import as_integer, flag, one_of, size
from qwenrt.errors import ConfigError, shown
from qwenrt.other_names import says_right_names

DType = Literal["auto", "float32", "bfloat16", "float16"]
Source = Literal["auto", "huggingface", "modelscope"]
Quantize = Literal["int8", "int4"]
KVCacheDType = Literal["auto", "int8"]
Activations = Literal["auto", "exact", "int16", "int8"]
Fallback = Literal["warn", "error", "silent"]
Draft = Literal["mtp"]
if TYPE_CHECKING:  # torch's own are taken as well, without importing it
    import torch

    AnyDType: TypeAlias = DType | torch.dtype
    AnyDevice: TypeAlias = str | torch.device
else:
    AnyDType, AnyDevice = DType, str

MOST_DRAFT_TOKENS = 8  # guesses for one sequence at a time
DTYPES = tuple(name for name in get_args(DType) if name != "auto")
# The texts that an option may be, where it may not be any other; None as well where that is its default.
CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": get_args(DType),
    "source": get_args(Source),
    "quantize": get_args(Quantize),
    "quantize_head": get_args(Quantize),
    "kv_cache_dtype": get_args(KVCacheDType),
    "activations": get_args(Activations),
    "fallback": get_args(Fallback),
    "draft": get_args(Draft),
}
# What each option means: its help on the command line, and its line in `help(qwenrt.load)`.
ABOUT: dict[str, str] = {
    "device": 'where the model runs: "cpu", "cuda", "cuda:1", "npu", "dcu" or the name of a plugin; auto takes the '
    "first that can be used",
    "dtype": "of activations, and of weights that are not quantised; auto lets the device choose",
    "source": "the hub that a name is looked up in; auto asks HuggingFace, and ModelScope where that cannot be reached",
    "revision": "branch, tag or commit of the repository (default: the newest)",
    "offline": "open no network connection (default: as QWENRT_OFFLINE or HF_HUB_OFFLINE says)",
    "quantize": "round dense weights while loading; int8 takes 8.25 bits a weight, int4 takes 4.5",
    "quantize_head": "round the output layer as well, which otherwise stays dense: it is a quarter of a small int4 "
    "model's time. An output layer that is also the embedding is then in memory twice",
    "kv_cache_dtype": "how the cache keeps keys and values: auto as activations are, int8 in a half or a quarter "
    "of that",
    "activations": "what the CPU rounds the inputs of quantised layers to: int8 is the fastest, exact rounds nothing, "
    "auto is int16 in large layers and exact in small ones (default: as QWENRT_ACTIVATIONS says, else auto). All but "
    "exact also multiply prompts by large 16-bit layers in fixed point, with an error of about 1e-4, and have queries "
    "of 16 bits beside an int8 cache",
    "max_model_len": "longest prompt and answer together, in tokens (default: what the model and the memory allow)",
    "max_num_seqs": "how many requests are computed at the same time",
    "max_num_batched_tokens": "how many tokens are computed in one step",
    "fallback": "what happens where a device has no fast code for an operation, so that plain torch serves: a "
    "warning, an error, or nothing",
    "progress": "progress bars and one summary line on stderr (default: where stderr is a terminal)",
    "packed_cache": "keep packed weights on disk, in this directory or in qwenrt's own, so that the next load maps "
    "them (default: as QWENRT_PACKED_CACHE says)",
    "step_target_ms": "while anybody's answer is written, prompts are computed in chunks so small that a step takes "
    "this many milliseconds, or twice what it takes without prompts where that is longer; 0 for chunks as large as "
    "they may be (default: 250 on a CPU, else 0)",
    "prefix_store": "keep what was computed of beginnings that prompts share in this directory, where the next process "
    "finds it; it tells what was asked, and only its owner may read it (default: nothing is kept)",
    "prefix_store_bytes": "how much that directory may hold; what was used least lately goes first",
    "draft": "guess tokens and check several in one step: the same answers, sooner where guesses are right; mtp "
    "guesses by the head that Qwen3-Next, Qwen3.5 and later have for it (default: only what a request asks for)",
    "draft_tokens": "how many tokens draft guesses for an answer at a time",
    "merge_system_messages": "where a chat template takes a system message in the first place alone (Qwen3.5 to 3.8), "
    "move the texts of later ones into that; otherwise they are an error",
    "adapters": "LoRA adapters to load as well, by the names that requests ask for them by: {name: directory}",
    "max_adapters": "how many adapters are in memory at once; beyond them the one that was used least lately goes",
}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. `qwenrt.load` takes each field as a keyword, and `help(qwenrt.load)` says what it means.

    Every field is checked when this is made. Raises ConfigError, which names the option, what was given and what may
    be given. torch's dtypes and devices, and numbers of other libraries, become Python's own values. A device that is
    not here, or a revision that no repository can have, is found when the model is loaded.
    """

    device: AnyDevice = "auto"
    dtype: AnyDType = "auto"
    source: Source = "auto"
    revision: str | None = None
    offline: bool | None = None
    quantize: Quantize | None = None
    quantize_head: Quantize | None = None
    kv_cache_dtype: KVCacheDType = "auto"
    activations: Activations = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    fallback: Fallback = "warn"
    progress: bool | None = None
    packed_cache: bool | str | PathLike[str] | None = None
    step_target_ms: int | None = None
    prefix_store: str | PathLike[str] | None = None
    prefix_store_bytes: int = 4 * 2**30
    draft: Draft | None = None
    draft_tokens: int = 1
    merge_system_messages: bool = False
    adapters: Mapping[str, str | PathLike[str]] | None = None
    max_adapters: int = 16

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _checked(option.name, getattr(self, option.name), option.default)
            object.__setattr__(self, option.name, value)


LoadOptions.__init__ = says_right_names(LoadOptions.__init__)  # type: ignore[method-assign,assignment]


def dtype_name(value: object) -> object:
    """A dtype as its name: torch's own, or its name with "torch." before it. Anything else as it is."""
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        value = str(value)
    return value.removeprefix("torch.") if isinstance(value, str) else value


_INTEGERS = {
    "step_target_ms": (0, 3600_000),
    "prefix_store_bytes": (2**20, 2**50),
    "draft_tokens": (1, MOST_DRAFT_TOKENS),
    "max_adapters": (1, 4096),
}
_DIRECTORIES: dict[str, tuple[type, ...]] = {"packed_cache": (bool, PathLike), "prefix_store": (PathLike,)}


def _integer(name: str, value: object, low: int, high: int) -> int:
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise ConfigError(
            f"{name}={shown(value)}", "not a usable number", f"Use an integer from {low} to {high}."
        )
    return number


def _adapters(value: object) -> dict[str, str | PathLike[str]]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            f"adapters={shown(value)}",
            f"a {type(value).__name__}",
            "It must be {name: directory of the adapter}.",
        )
    return dict(value)


def _checked(name: str, value: Any, default: object) -> Any:
    """``value`` as Python's own, if the option may have it. None may stand where it is the default."""
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        value = str(value)
    if name == "dtype":
        value = dtype_name(value)
    if name in CHOICES:
        one_of(name, value, CHOICES[name] if default is not None else (None, *CHOICES[name]))
        return value
    if value is None and default is None:
        return None
    if name == "adapters":
        return _adapters(value)
    if name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        return size(name, value)
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in ("offline", "progress", "merge_system_messages"):
        return flag(name, value, ConfigError)
    also = _DIRECTORIES.get(name, ())
    if isinstance(value, (str, *also)):
        return value
    expected = "text" if not also else "a directory, True or False" if bool in also else "a directory"
    raise ConfigError(f"{name}={shown(value)}", f"a {type(value).__name__}", f"It must be {expected}.")
