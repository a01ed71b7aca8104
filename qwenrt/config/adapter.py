"""adapter_config.json, as peft reads and writes it: what a LoRA adapter changes, and how strongly. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenrt.config.fields import bad, boolean, integer, logger, number, read_json
from qwenrt.config.patterns import Pattern
from qwenrt.errors import ConfigError, shown

FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"
MAX_RANK = 2**14
_BIASES = ("none", "all", "lora_only")
_MAX_NAMES = 100_000
# what changes the arithmetic in a way that is not known here, unless it is null, false or empty
_REFUSED = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
            "use_bdlora", "use_qalora")  # fmt: skip
# what decides how an adapter is trained, or how a program lays it out: nothing that is computed with it depends on that
_IGNORED = ("auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config",
            "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
            "runtime_config", "task_type", "velora_config")  # fmt: skip
_LATER = ("ensure_weight_tying", "exclude_modules", "lora_bias", "target_parameters", "trainable_token_indices",
          "use_dora", "use_rslora")  # fmt: skip
# beginnings that leave the base as it is; all others subtract from it what the adapter begins with
_BEGINNINGS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_LAYER = re.compile(r"\.[^.]*\.([0-9]+)\.")


@dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter says of itself. Modules are named as in the model's files (``model.layers.0.mlp.up_proj``).

    ``targets``: names, each that of a module or its end after a dot; a pattern for the whole name; or "all-linear".
    ``excluded``: the same, of modules that are left out; ``kept_modules`` are trained as a whole, so never targets.
    ``layers``: of which numbers only, None for all, counted behind the names in ``layer_names`` or the first number.
    ``rank_pattern`` and ``alpha_pattern``: (pattern for the end of a name, value), the first that fits counts.
    ``token_rows``: module -> ids of the rows that the adapter replaces. ``target_parameters``: names of tensors that
    hold a module of all experts. ``tie``: what is new of the embedding counts for a head that is one with it, too, as
    ``token_rows`` do in any case. ``base``, ``revision``: the model it was trained on, as the file names it.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] | str = ()
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layer_names: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    kept_modules: tuple[str, ...] = ()
    token_rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    target_parameters: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    tie: bool = False
    dropout: float = 0.0
    base: str | None = None
    revision: str | None = None

    def is_target(self, module: str) -> bool:
        """Whether a linear of this name gets a LoRA pair. Raises ConfigError for a pattern that is refused."""
        if _is_named(module, self.excluded, "exclude_modules"):
            return False
        if any(f".{kept}." in f".{module}." for kept in self.kept_modules):
            return False
        if self.targets == ALL_LINEAR:
            return not module.endswith("lm_head")
        if not _is_named(module, self.targets, "target_modules"):
            return False
        return self.layers is None or isinstance(self.targets, str) or self._layer_of(module) in self.layers

    def rank_of(self, module: str) -> int:
        """The rank that the file says a module's pair has."""
        return next((rank for fits, rank in self._ranks if fits.matches(module)), self.rank)

    def alpha_of(self, module: str) -> float:
        return next((alpha for fits, alpha in self._alphas if fits.matches(module)), self.alpha)

    def scale_of(self, module: str, rank: int) -> float:
        """What B·A of a module's pair, which has ``rank``, is multiplied by: alpha / rank or, as rsLoRA has it, alpha
        over its square root."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(_ending(key, "rank_pattern"), rank) for key, rank in self.rank_pattern]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(_ending(key, "alpha_pattern"), alpha) for key, alpha in self.alpha_pattern]

    def _layer_of(self, module: str) -> int | None:
        if not self.layer_names:
            found = _LAYER.search(module)
            return int(found[1]) if found else None
        for name in self.layer_names:
            _, behind, rest = f".{module}".partition(f".{name}.")
            own = rest.partition(".")[0]
            if behind and own.isdecimal():
                return int(own)
        return None


def read_adapter_config(path: Path) -> AdapterConfig:
    """What the file ``path`` says. Raises ConfigError for a method other than LoRA, for a setting that makes no sense,
    and for one that would change the result and is not known here; warns of other unknown ones."""
    config, where = read_json(path), path.name
    kind = config.get("peft_type")
    if kind != "LORA":
        found = f"peft_type is {shown(kind)}"
        raise ConfigError(
            f"reading {path}", found, "Adapters of peft_type LORA can be read (with use_dora, too)."
        )
    _refuse_unknown(config, where)
    return AdapterConfig(
        rank=integer(config, "r", where, 1, MAX_RANK, 8),
        alpha=number(config, "lora_alpha", where, 0, 1e6, 8, low_open=True),
        targets=_names(config, "target_modules", where, pattern=True),
        excluded=_names(config, "exclude_modules", where, pattern=True),
        layers=_numbers(config, "layers_to_transform", where),
        layer_names=tuple(_names(config, "layers_pattern", where)),
        rank_pattern=tuple(
            (key, integer(_object(config, "rank_pattern", where), key, f"rank_pattern of {where}", 1, MAX_RANK))
            for key in _object(config, "rank_pattern", where)
        ),
        alpha_pattern=tuple(
            (key, number({key: value}, key, f"alpha_pattern of {where}", 0, 1e6, 8, low_open=True))
            for key, value in _object(config, "alpha_pattern", where).items()
        ),
        kept_modules=tuple(_names(config, "modules_to_save", where)),
        token_rows=_token_rows(config, where),
        target_parameters=tuple(_names(config, "target_parameters", where)),
        rslora=boolean(config, "use_rslora", where, False),
        dora=boolean(config, "use_dora", where, False),
        bias=_choice(config, "bias", where, _BIASES),
        lora_bias=boolean(config, "lora_bias", where, False),
        tie=boolean(config, "ensure_weight_tying", where, False),
        dropout=number(config, "lora_dropout", where, 0, 1, 0),
        base=_text(config, "base_model_name_or_path", where),
        revision=_text(config, "revision", where),
    )  # fmt: skip


def as_peft_writes(config: AdapterConfig) -> dict[str, Any]:
    """The content of adapter_config.json: what peft has written since its first releases, and later settings where they
    are other than its defaults, as releases before 0.14 refuse names that they do not know."""
    written: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": config.base,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": list(config.layer_names) or None,
        "layers_to_transform": None if config.layers is None else list(config.layers),
        "lora_alpha": _plain(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": list(config.kept_modules) or None,
        "peft_type": "LORA",
        "r": config.rank,
        "revision": config.revision,
        "target_modules": config.targets if isinstance(config.targets, str) else list(config.targets),
        "task_type": "CAUSAL_LM",
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(alpha) for key, alpha in config.alpha_pattern},
    }
    excluded = config.excluded if isinstance(config.excluded, str) else list(config.excluded)
    later = {
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "lora_bias": config.lora_bias,
        "ensure_weight_tying": config.tie,
        "exclude_modules": excluded,
        "trainable_token_indices": {module: list(ids) for module, ids in config.token_rows},
        "target_parameters": list(config.target_parameters),
    }
    return written | {name: value for name, value in later.items() if value}


def portable_base(name: str | None) -> str | None:
    """How a file names its base: a hub's id, else the directory's name alone, so that adapters can be moved."""
    if name is None or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")):
        return name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] or None


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _is_named(module: str, names: Sequence[str] | str, where: str) -> bool:
    if isinstance(names, str):
        return Pattern(names, where).matches(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _ending(key: str, where: str) -> Pattern:
    """What a key of a pattern table fits: names that end with it, at a dot."""
    return Pattern(rf"(.*\.)?({key})", where)


def _refuse_unknown(config: Mapping[str, Any], where: str) -> None:
    set_ = [name for name in _REFUSED if config.get(name) not in (None, False, [], {}, "")]
    if boolean(config, "fan_in_fan_out", where, False):
        set_.append("fan_in_fan_out")
    if set_:
        found = f"{', '.join(f'{name} is {shown(config[name], 40)}' for name in set_)}"
        raise ConfigError(
            f"reading {where}",
            f"{found}: that changes what the adapter computes in a way that is not known here",
            "Merge the adapter with the version of peft that trained it, and load the merged model.",
        )
    beginning = str(config.get("init_lora_weights", True)).lower()
    if beginning not in _BEGINNINGS:
        raise ConfigError(
            f"reading {where}",
            f"init_lora_weights is {shown(beginning, 40)}: the adapter belongs to a base that this has changed",
            "Convert it with peft: save_pretrained(directory, path_initial_model_for_weight_conversion=...).",
        )
    known = {*_REFUSED, *_IGNORED, *as_peft_writes(AdapterConfig()), *_LATER}
    unknown = [
        name for name, value in config.items() if name not in known and value not in (None, False, [], {})
    ]
    if unknown:
        logger.warning(
            "%s has settings that are not known here and are ignored: %s", where, shown(unknown, 200)
        )


def _names(config: Mapping[str, Any], name: str, where: str, *, pattern: bool = False) -> Any:
    """A list of names; a single one as well or, with ``pattern``, a pattern, which stays a text."""
    value = config.get(name)
    if value is None:
        return ()
    if isinstance(value, str):
        return value if pattern else (value,)
    if (
        not isinstance(value, list)
        or len(value) > _MAX_NAMES
        or not all(isinstance(n, str) and n for n in value)
    ):
        raise bad(where, name, value, "a list of names")
    return tuple(value)


def _numbers(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...] | None:
    value = config.get(name)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int and each >= 0 for each in values):
        raise bad(where, name, value, "a layer's number or a list of them")
    return tuple(values) or None


def _token_rows(config: Mapping[str, Any], where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    name = "trainable_token_indices"
    value = config.get(name)
    table = {"embed_tokens": value} if isinstance(value, list) and value else value or {}
    if not isinstance(table, dict):
        raise bad(where, name, value, "a list of token ids, or an object of them")
    for ids in table.values():
        good = isinstance(ids, list) and all(type(each) is int and 0 <= each < 2**31 for each in ids)
        if not good or len(set(ids)) < len(ids):
            raise bad(where, name, ids, "a list of token ids, each once")
    return tuple((module, tuple(ids)) for module, ids in table.items())


def _object(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict) or len(value) > _MAX_NAMES:
        raise bad(where, name, value, "an object of patterns and numbers")
    return value


def _choice(config: Mapping[str, Any], name: str, where: str, known: Sequence[str]) -> str:
    value = config.get(name) or known[0]
    if value not in known:
        raise bad(where, name, value, f"one of {', '.join(known)}")
    return str(value)


def _text(config: Mapping[str, Any], name: str, where: str) -> str | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise bad(where, name, value, "a text")
    return value or None
