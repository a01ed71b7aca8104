"""Positions of Qwen1.5 and later: the base of the rotation, and YaRN. Files say both in up to four places."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from qwenrt.config.fields import bad, boolean, contradiction, integer, number
from qwenrt.config.model import YarnConfig
from qwenrt.errors import ConfigError

_NAMES = ("rope_parameters", "rope_scaling")  # of later files, and of earlier ones
# text alone has all sections of mrope at the same position, which is plain as well
_PLAIN = ("default", "mrope")
_LAYER_KINDS = ("full_attention", "sliding_attention")
_CLASS_DEFAULT = 10000.0  # what tools write where nothing was set
_CHECK = "Check the file against the model's repository."
logger = logging.getLogger("qwenrt")


def read_rope(
    config: Mapping[str, Any], positions: int, where: str, *, partial: bool = False
) -> tuple[float, YarnConfig | None]:
    """(rope_theta, YaRN or None for plain positions). ``partial``: whether a part of each head may be rotated alone
    (read_partial_rotary says which).

    ``config`` may hold rope_parameters, rope_scaling and rope_theta, and those of the level around it under
    "outer_rope". The more specific wins, with a warning that names both: YaRN over plain positions, a base
    over the class's default of 10000. A contradiction is a ConfigError.
    """
    stated = list(_settings(config, where))
    for label, level in (*stated, ("config.json", config)):
        if not partial and level.get("partial_rotary_factor") not in (None, 1, 1.0):
            found = f"partial_rotary_factor in {label} is {level['partial_rotary_factor']!r:.40}"
            raise ConfigError(f"reading {where}", found, "Heads of this family are rotated as a whole.")
    yarns = [(label, _yarn(rope, config, positions, where)) for label, rope in stated]
    scaled = [(label, yarn) for label, yarn in yarns if yarn is not None]
    for label, yarn in scaled[1:]:
        if yarn != scaled[0][1]:
            contradiction(where, f"{scaled[0][0]} {scaled[0][1]}", f"{label} {yarn}", strict=True)
    plain = [label for label, yarn in yarns if yarn is None and label != (scaled[0][0] if scaled else label)]
    if scaled and plain:
        contradiction(where, f"YaRN in {scaled[0][0]}", f"plain positions in {plain[0]}", strict=False)
    return _theta(config, stated, where), scaled[0][1] if scaled else None


def read_partial_rotary(config: Mapping[str, Any], where: str, default: float) -> float:
    """The share of a head's channels that are rotated, from wherever the file says it."""
    given = {
        label: number(level, "partial_rotary_factor", where, 0.0, 1.0, default, low_open=True)
        for label, level in (*_settings(config, where), ("config.json", config))
        if level.get("partial_rotary_factor") is not None
    }
    first = next(iter(given), None)
    for label, factor in given.items():
        if first is not None and factor != given[first]:
            ours = f"partial_rotary_factor {given[first]:g} in {first}"
            contradiction(where, ours, f"{factor:g} in {label}", strict=True)
    return default if first is None else given[first]


def _settings(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, settings) of each place in the file that describes positions."""
    outer = config.get("outer_rope") or {}
    for level, place in ((config, ""), (outer, " of the outer level")):
        for name in _NAMES:
            value = level.get(name)
            if value is None or (level is outer and value == config.get(name)):
                continue
            if not isinstance(value, Mapping):
                raise bad(where, name, value, "an object or null")
            kinds = [kind for kind in _LAYER_KINDS if isinstance(value.get(kind), Mapping)]
            if kinds:
                if any(value[kind] != value[kinds[0]] for kind in kinds):
                    found = f"{name} gives layers of several kinds different positions"
                    raise ConfigError(f"reading {where}", found, "One statement for all layers is supported.")
                value = value[kinds[0]]
            yield name + place, value


def _theta(config: Mapping[str, Any], stated: list[tuple[str, Mapping[str, Any]]], where: str) -> float:
    places = [(f"{label}.rope_theta", rope) for label, rope in stated]
    places += [("rope_theta", config), ("rope_theta of the outer level", config.get("outer_rope") or {})]
    given = [
        (label, number(level, "rope_theta", where, 1.0, 1e12, _CLASS_DEFAULT, low_open=True))
        for label, level in places
        if level.get("rope_theta") is not None
    ]
    if not given:
        logger.warning(
            "%s names no rope_theta: 10000 is assumed, which few Qwen models were trained with", where
        )
        return _CLASS_DEFAULT
    told = [pair for pair in given if pair[1] != _CLASS_DEFAULT] or given
    label, theta = told[0]
    for other, value in told[1:]:
        if value != theta:
            contradiction(where, f"{label} {theta:g}", f"{other} {value:g}", strict=True)
    defaults = [other for other, value in given if value != theta]
    if defaults:
        contradiction(where, f"{label} {theta:g}", f"{defaults[0]} {_CLASS_DEFAULT:g}", strict=False)
    return theta


def _kind(rope: Mapping[str, Any], where: str) -> str:
    """ "default" or "yarn"; both names of the setting are looked at, and YaRN under one of them counts."""
    named = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    scaled = [kind for kind in named if kind not in _PLAIN]
    if any(kind != "yarn" for kind in scaled):
        found = f"the rope type is {next(kind for kind in scaled if kind != 'yarn')!r:.80}"
        raise ConfigError(f"reading {where}", found, "Supported are 'default' and 'yarn'.")
    if scaled:
        return "yarn"
    if rope.get("factor") not in (None, 1, 1.0):
        factor = f"factor {rope['factor']!r:.40}"
        if not named:
            remedy = 'Add "rope_type", "yarn" where the model\'s page says so.'
            raise ConfigError(f"reading {where}", f"positions with a {factor} and no rope_type", remedy)
        contradiction(where, f"rope_type {named[0]!r:.40}", factor, strict=False)
    return "default"


def _yarn(
    rope: Mapping[str, Any], config: Mapping[str, Any], positions: int, where: str
) -> YarnConfig | None:
    """None for plain positions."""
    if _kind(rope, where) == "default":
        return None
    if rope.get("factor") is None:
        raise ConfigError(f"reading {where}", "YaRN without a factor", _CHECK)
    factor = number(rope, "factor", where, 1.0, 1024.0, 1.0)
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = _mscale(factor, number(rope, "mscale", where, 0.0, 100.0, 1.0))
            attention /= _mscale(factor, number(rope, "mscale_all_dim", where, 0.0, 100.0, 1.0))
    else:
        attention = number(rope, "attention_factor", where, 0.0, 100.0, 1.0, low_open=True)
    length = "original_max_position_embeddings"
    source = rope if rope.get(length) is not None else config
    return YarnConfig(
        factor=factor,
        original_length=integer(source, length, where, 1, 2**24, positions),
        attention_factor=attention,
        beta_fast=number(rope, "beta_fast", where, 0.0, 1e6, 32.0, low_open=True),
        beta_slow=number(rope, "beta_slow", where, 0.0, 1e6, 1.0, low_open=True),
        truncate=boolean(rope, "truncate", where, True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
