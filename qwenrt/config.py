"""What a model is and what the user set: frozen dataclasses, and the only reader of the environment."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwenrt.errors import ConfigError, RequestError
from qwenrt.sampling_params import SamplingParams

MAX_JSON_BYTES = 64 * 2**20
DEFAULT_MAX_WINDOW_SIZE = 6144  # what Qwen-1's first chat code used where none was given

# Qwen-1 was released with two spellings of its config; the early one on the left.
_EARLY_KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
_LIMITS = {  # name -> largest value that any Qwen comes near; more is a damaged or hostile file
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "intermediate_size": 2**20,
    "kv_channels": 4096,
    "seq_length": 2**24,
    "max_position_embeddings": 2**24,
}
_OTHER_MODEL_TYPES = {
    "qwen2": "Qwen1.5, Qwen2 or Qwen2.5",
    "qwen2_moe": "a Qwen1.5 or Qwen2 mixture of experts",
    "qwen3": "Qwen3",
    "qwen3_moe": "a Qwen3 mixture of experts",
}


@dataclass(frozen=True)
class QuantConfig:
    """How a GPTQ checkpoint was quantised. ``group_size`` -1 is one group for the whole input dim;
    ``zero_offset`` is added to stored zeros (1 in the v1 format of AutoGPTQ, 0 in v2)."""

    bits: int
    group_size: int
    desc_act: bool = False
    sym: bool = True
    zero_offset: int = 1

    @classmethod
    def from_dict(cls, quant: Mapping[str, Any], where: str) -> QuantConfig:
        method = quant.get("quant_method", "gptq")
        if method != "gptq":
            raise ConfigError(f"reading {where}", f"quant_method is {method!r}", "Supported is: gptq.")
        bits = _integer(quant, "bits", where, 1, 64)
        if bits not in (4, 8):
            raise ConfigError(f"reading {where}", f"{bits}-bit GPTQ weights", "Supported are 4 and 8 bits.")
        group = quant.get("group_size", 128)
        if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and not 1 <= group <= 2**20):
            raise _bad(where, "group_size", group, "-1 or a positive integer")
        form = quant.get("checkpoint_format", "gptq")
        if form not in ("gptq", "gptq_v2"):
            raise ConfigError(
                f"reading {where}", f"checkpoint_format is {form!r}", "Supported are: gptq, gptq_v2."
            )
        return cls(
            bits=bits,
            group_size=group,
            desc_act=_boolean(quant, "desc_act", where, False),
            sym=_boolean(quant, "sym", where, True),
            zero_offset=0 if form == "gptq_v2" else 1,
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the constants of a network.

    ``intermediate_size`` is the width of each MLP projection (Qwen-1's config.json stores twice that).
    ``train_length`` is Qwen-1's seq_length: the length NTK and LogN are relative to, not the longest
    context. ``linear_bias``: whether o_proj and the MLP have biases as well (qkv_proj always has one).
    ``dtype`` is None where the checkpoint leaves the choice open.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    train_length: int
    max_position_embeddings: int
    use_dynamic_ntk: bool
    use_logn_attn: bool
    tie_word_embeddings: bool = False
    linear_bias: bool = False
    dtype: str | None = None
    quant: QuantConfig | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], quantize: Mapping[str, Any] | None = None) -> ModelConfig:
        """From the content of config.json (either spelling) and of quantize_config.json, if there is one."""
        where = "config.json"
        model_type = config.get("model_type", "qwen")
        if model_type != "qwen":
            known = _OTHER_MODEL_TYPES.get(str(model_type))
            what = f"model_type is {str(model_type)[:80]!r}" + (f" ({known})" if known else "")
            raise ConfigError(
                f"reading {where}", what, "This version of qwenrt runs model_type 'qwen' (Qwen-1)."
            )
        config = {**config, **{late: config[early] for early, late in _EARLY_KEYS.items() if early in config}}
        hidden = _integer(config, "hidden_size", where)
        heads = _integer(config, "num_attention_heads", where)
        if hidden % heads:
            raise ConfigError(
                f"reading {where}",
                f"hidden_size {hidden} does not divide into {heads} heads",
                "Check the file against the model's repository.",
            )
        head_dim = _integer(config, "kv_channels", where, default=hidden // heads)
        if head_dim * heads != hidden:
            raise ConfigError(
                f"reading {where}",
                f"kv_channels {head_dim} x {heads} heads is {head_dim * heads}, hidden_size is {hidden}",
                "Check the file against the model's repository.",
            )
        doubled = _integer(config, "intermediate_size", where)
        if doubled % 2:
            raise _bad(where, "intermediate_size", doubled, "even (Qwen-1 stores twice the width)")
        train_length = _integer(config, "seq_length", where)
        quant = config.get("quantization_config") or quantize
        if quant is not None and not isinstance(quant, Mapping):
            raise _bad(where, "quantization_config", quant, "an object")
        return cls(
            model_type="qwen",
            vocab_size=_integer(config, "vocab_size", where, default=151936),
            hidden_size=hidden,
            num_layers=_integer(config, "num_hidden_layers", where),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            intermediate_size=doubled // 2,
            rms_norm_eps=_number(config, "layer_norm_epsilon", where, 1e-12, 0.1, 1e-6),
            rope_theta=_number(config, "rotary_emb_base", where, 1.0, 1e12, 10000.0, low_open=True),
            rotary_dim=_rotary_dim(config, head_dim, where),
            train_length=train_length,
            max_position_embeddings=_integer(
                config, "max_position_embeddings", where, default=max(train_length, 8192)
            ),
            use_dynamic_ntk=_boolean(config, "use_dynamic_ntk", where, True),
            use_logn_attn=_boolean(config, "use_logn_attn", where, True),
            tie_word_embeddings=_boolean(config, "tie_word_embeddings", where, False),
            linear_bias=not _boolean(config, "no_bias", where, True),
            dtype=_dtype(config, where),
            quant=QuantConfig.from_dict(quant, "the quantisation config") if quant else None,
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> ModelConfig:
        """Read config.json (and quantize_config.json). Keys that name code (auto_map) are never looked at."""
        directory = Path(directory)
        sidecar = directory / "quantize_config.json"
        return cls.from_dict(
            read_json(directory / "config.json"), read_json(sidecar) if sidecar.exists() else None
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network, embeddings and head included."""
        d, i, kv = self.hidden_size, self.intermediate_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        layer = (q + 2 * kv) * (d + 1) + q * d + 3 * i * d + 2 * d
        if self.linear_bias:
            layer += d + 2 * i + d
        return self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + self.num_layers * layer + d

    def kv_bytes_per_token(self, element_bytes: float) -> int:
        """Bytes one token takes in the cache of all layers, keys and values together."""
        return int(2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes)


@dataclass(frozen=True)
class GenerationConfig:
    """generation_config.json: how the checkpoint wants to be sampled, prompted and stopped."""

    chat_format: str | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    max_window_size: int = DEFAULT_MAX_WINDOW_SIZE
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(top_p=0.8))

    @classmethod
    def from_dict(cls, generation: Mapping[str, Any]) -> GenerationConfig:
        where = "generation_config.json"
        chat_format = generation.get("chat_format")
        if chat_format not in (None, "chatml", "raw"):
            raise _bad(where, "chat_format", chat_format, "'chatml' or 'raw'")
        eos = generation.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        stops = generation.get("stop_words_ids") or []
        if not isinstance(stops, list) or not all(isinstance(s, list) and s for s in stops):
            raise _bad(where, "stop_words_ids", stops, "a list of non-empty lists of token ids")
        pad = generation.get("pad_token_id")
        for token in [*eos_ids, *([] if pad is None else [pad]), *(t for s in stops for t in s)]:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
                raise _bad(where, "a token id", token, "an integer >= 0")
        return cls(
            chat_format=chat_format,
            eos_token_ids=tuple(eos_ids),
            pad_token_id=pad,
            max_window_size=_integer(generation, "max_window_size", where, 1, 2**31, DEFAULT_MAX_WINDOW_SIZE),
            stop_words_ids=tuple(tuple(s) for s in stops),
            sampling=_sampling(generation, where),
        )

    @classmethod
    def from_dir(cls, directory: str | Path) -> GenerationConfig:
        """Read generation_config.json; a directory without one gets the defaults."""
        path = Path(directory) / "generation_config.json"
        return cls.from_dict(read_json(path)) if path.exists() else cls()


@dataclass(frozen=True)
class Environment:
    """Every environment variable qwenrt looks at. Nothing else in the package reads os.environ."""

    cache_dir: Path  # QWENRT_HOME: downloads and caches
    hf_endpoint: str | None = None  # HF_ENDPOINT: a mirror of huggingface.co
    hf_token: str | None = None  # HF_TOKEN: for gated or private repositories
    modelscope_endpoint: str | None = None  # MODELSCOPE_ENDPOINT
    offline: bool = False  # QWENRT_OFFLINE or HF_HUB_OFFLINE: never open a socket
    backend: str | None = None  # QWENRT_BACKEND: what device="auto" means
    num_threads: int | None = None  # QWENRT_NUM_THREADS: CPU threads of our kernels and of torch
    kernels: str = "auto"  # QWENRT_KERNELS: auto | off | avx2 | scalar, the C++ kernels of the CPU

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Environment:
        env = os.environ if environ is None else environ
        threads = env.get("QWENRT_NUM_THREADS")
        if threads and not (threads.isdecimal() and 1 <= int(threads) <= 1024):
            raise ConfigError("QWENRT_NUM_THREADS", f"is {threads!r}", "Set a number of threads, 1 to 1024.")
        home = env.get("QWENRT_HOME")
        return cls(
            cache_dir=Path(home).expanduser() if home else Path.home() / ".cache" / "qwenrt",
            hf_endpoint=env.get("HF_ENDPOINT") or None,
            hf_token=env.get("HF_TOKEN") or None,
            modelscope_endpoint=env.get("MODELSCOPE_ENDPOINT") or None,
            offline=any(_truthy(env.get(k)) for k in ("QWENRT_OFFLINE", "HF_HUB_OFFLINE")),
            backend=env.get("QWENRT_BACKEND") or None,
            num_threads=int(threads) if threads else None,
            kernels=env.get("QWENRT_KERNELS", "auto") or "auto",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that nobody has vouched for. Raises ConfigError that names what it really is."""
    asked = f"reading {path}"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise ConfigError(
            asked,
            "no such file" if missing else f"{type(error).__name__}: {error.strerror}",
            "Is this a model directory? It needs config.json, the tokenizer and *.safetensors."
            if missing
            else "Check the file's permissions.",
        ) from error
    if len(raw) > MAX_JSON_BYTES:
        raise ConfigError(asked, f"more than {MAX_JSON_BYTES} bytes", "This is not a configuration file.")
    unlike = not_the_file(raw)
    if unlike:
        raise ConfigError(asked, *unlike)
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            asked, f"not valid JSON ({str(error)[:120]})", "Fetch the file again; it may be cut off."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(asked, f"a JSON {type(value).__name__}, not an object", "Fetch the file again.")
    return value


def not_the_file(head: bytes) -> tuple[str, str] | None:
    """(found, remedy) where the first bytes of a file show that something else was saved in its place."""
    if not head.strip():
        return "an empty file", "The download did not finish: fetch the file again."
    if head.startswith(b"version https://git-lfs"):
        return (
            "a git-lfs pointer, not the file itself",
            "Run `git lfs install && git lfs pull` in the repository, or use `qwenrt pull`.",
        )
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML page, not the file itself",
            "A proxy or login page was saved in its place: fetch the file again.",
        )
    return None


def _bad(where: str, name: str, value: object, wanted: str) -> ConfigError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ConfigError(f"reading {where}", f"{name} is {shown}", f"It must be {wanted}.")


def _integer(
    config: Mapping[str, Any],
    name: str,
    where: str,
    low: int = 1,
    high: int | None = None,
    default: int | None = None,
) -> int:
    value = config.get(name, default)
    if value is None:
        if name in config and default is not None:
            return default
        raise ConfigError(f"reading {where}", f"no {name}", "The file is incomplete: fetch it again.")
    high = _LIMITS.get(name, 2**31) if high is None else high
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(where, name, value, f"an integer from {low} to {high}")
    return value


def _number(
    config: Mapping[str, Any],
    name: str,
    where: str,
    low: float,
    high: float,
    default: float,
    *,
    low_open: bool = False,
) -> float:
    value = config.get(name)
    value = default if value is None else value
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (low_open and value == low):
        raise _bad(where, name, value, f"a number {'above' if low_open else 'from'} {low:g} to {high:g}")
    return float(value)


def _boolean(config: Mapping[str, Any], name: str, where: str, default: bool) -> bool:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _bad(where, name, value, "true or false")
    return value


def _rotary_dim(config: Mapping[str, Any], head_dim: int, where: str) -> int:
    percent = _number(config, "rotary_pct", where, 0.0, 1.0, 1.0, low_open=True)
    dim = head_dim if percent == 1.0 else int(head_dim * percent)
    if dim < 4 or dim % 2:
        raise ConfigError(
            f"reading {where}",
            f"rotary_pct {percent:g} of {head_dim} channels rotates {dim} of them",
            "The rotated part must be an even number of at least 4 channels.",
        )
    return dim


def _dtype(config: Mapping[str, Any], where: str) -> str | None:
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    on = [name for name in flags if _boolean(config, name, where, False)]
    if len(on) > 1:
        raise ConfigError(f"reading {where}", f"{' and '.join(on)} are all true", "At most one may be.")
    return flags[on[0]] if on else None


def _sampling(generation: Mapping[str, Any], where: str) -> SamplingParams:
    """The checkpoint's own sampling; `top_k` 0 or null is off, do_sample false is greedy."""
    renamed = {
        "temperature": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "repetition_penalty": "repetition_penalty",
        "max_new_tokens": "max_tokens",
    }
    given = {ours: generation[key] for key, ours in renamed.items() if generation.get(key) is not None}
    if not _boolean(generation, "do_sample", where, True):
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(
            f"reading {where}", str(error), "Check it against the repository's file."
        ) from error


def _truthy(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "on")
