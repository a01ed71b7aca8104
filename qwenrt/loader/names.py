"""Checkpoint tensor name -> where it belongs in the model: one table per Qwen generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from qwenrt.errors import ConfigError

KINDS = ("weight", "bias", "qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Place:
    """Where one checkpoint tensor goes.

    ``param``: the parameter's name in the model ("layers.3.qkv_proj"); ``part``: the part of a merged linear it
    fills ("gate", "up"), "" for the whole; ``kind``: one of KINDS, or "ignored" for a tensor that is known and
    carries no weight (buffers that old files hold).
    """

    param: str
    part: str
    kind: str

    @property
    def ignored(self) -> bool:
        return self.kind == "ignored"


IGNORED = Place("", "", "ignored")


@dataclass(frozen=True)
class NameTable:
    """The names of one generation, matched from end to end; ``{n}`` stands for a layer number.

    ``linears``: module path -> (parameter, part), to be followed by one of KINDS. ``tensors``: full name ->
    parameter. ``ignored``: patterns of names that are known and not needed. ``prefix``: first word that may be
    absent, as some tools save the inner model alone.
    """

    prefix: str
    linears: dict[str, tuple[str, str]]
    tensors: dict[str, str]
    ignored: tuple[str, ...]

    def _pattern(self, path: str) -> str:
        rest = re.escape(path.removeprefix(self.prefix)).replace(r"\{n\}", r"(?P<n>0|[1-9][0-9]{0,5})")
        return f"(?:{re.escape(self.prefix)})?{rest}" if path.startswith(self.prefix) else rest

    @cached_property
    def _rules(self) -> list[tuple[re.Pattern[str], str, str]]:
        kinds = rf"\.(?P<kind>{'|'.join(KINDS)})"
        return [
            *(
                (re.compile(self._pattern(p) + kinds), param, part)
                for p, (param, part) in self.linears.items()
            ),
            *((re.compile(self._pattern(p)), param, "") for p, param in self.tensors.items()),
        ]

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        return re.compile(f"(?:{re.escape(self.prefix)})?(?:{'|'.join(self.ignored)})")

    def locate(self, name: str) -> Place | None:
        """The place of the checkpoint tensor ``name``; IGNORED for a known buffer; None if it is unknown."""
        for pattern, param, part in self._rules:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                return Place(param.format(n=groups.get("n")), part, groups.get("kind") or "weight")
        return IGNORED if self._ignored.fullmatch(name) else None

    def parts(self, param: str) -> list[str]:
        """The parts in which checkpoints of this generation store a linear; [""] for one block."""
        n = next((word for word in param.split(".") if word.isdecimal()), "")
        return [part for name, part in self.linears.values() if name.format(n=n) == param]

    def source(self, param: str, part: str = "", kind: str = "weight") -> str:
        """The name under which a checkpoint holds a parameter: locate's inverse, for messages and for writing."""
        n = next((word for word in param.split(".") if word.isdecimal()), "")
        for path, place in self.linears.items():
            if (place[0].format(n=n), place[1]) == (param, part):
                return f"{path.format(n=n)}.{kind}"
        for path, owner in self.tensors.items():
            if owner.format(n=n) == param:
                return path.format(n=n)
        return f"{param}.{part}.{kind}" if part else f"{param}.{kind}"


# c_attn already holds q, k and v, one block under the other; silu is applied to w2, so w2 is the gate.
QWEN1 = NameTable(
    prefix="transformer.",
    linears={
        "transformer.h.{n}.attn.c_attn": ("layers.{n}.qkv_proj", ""),
        "transformer.h.{n}.attn.c_proj": ("layers.{n}.o_proj", ""),
        "transformer.h.{n}.mlp.w2": ("layers.{n}.gate_up_proj", "gate"),
        "transformer.h.{n}.mlp.w1": ("layers.{n}.gate_up_proj", "up"),
        "transformer.h.{n}.mlp.c_proj": ("layers.{n}.down_proj", ""),
        "lm_head": ("lm_head", ""),
    },
    tensors={
        "transformer.wte.weight": "embed_tokens",
        "transformer.h.{n}.ln_1.weight": "layers.{n}.input_norm",
        "transformer.h.{n}.ln_2.weight": "layers.{n}.post_norm",
        "transformer.ln_f.weight": "norm",
    },
    # attn.bias is the causal mask of early files; attn.c_attn.bias, a weight, was matched above.
    ignored=(
        r"h\.[0-9]+\.attn\.(?:bias|masked_bias|logn_tensor|rotary_emb\.inv_freq)",
        r"(?:logn_tensor|rotary_emb\.inv_freq)",
    ),
)

TABLES = {"qwen": QWEN1}


def table_for(model_type: str) -> NameTable:
    """The name table of a ``model_type``. Raises ConfigError for one that has none."""
    if model_type not in TABLES:
        raise ConfigError(
            f"cannot name the tensors of model_type {model_type!r}",
            f"known types: {', '.join(sorted(TABLES))}",
            "Check model_type in config.json, or use a version of qwenrt that supports this family.",
        )
    return TABLES[model_type]
