"""Checkpoint tensor name -> the model's parameter that it fills: one table per Qwen generation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from qwenrt.errors import ConfigError

# What a module's tensors are called: dense, GPTQ and AWQ, FP8 with what its values are multiplied by.
KINDS = ("weight", "bias", "qweight", "qzeros", "scales", "g_idx", "weight_scale_inv", "weight_scale")
_NUMBER = "(?:0|[1-9][0-9]{0,5})"


@dataclass(frozen=True)
class ParamSlot:
    """What one checkpoint tensor fills.

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


IGNORED = ParamSlot("", "", "ignored")


@dataclass(frozen=True)
class NameTable:
    """The names of one generation, matched as a whole; ``{n}`` stands for a layer's number, ``{e}`` for an
    expert's.

    ``linears``: module path -> (parameter, part), to be followed by one of KINDS. ``tensors``: full name ->
    parameter. ``ignored``: patterns of names that are known and not needed. ``prefix``: first word that may be
    absent, as some tools save the inner model alone, or be one of ``other_prefixes``. ``stacked``: names of tensors
    that hold a module of all experts one after the other -> the path of one expert's module (in no file).
    """

    prefix: str
    linears: dict[str, tuple[str, str]]
    tensors: dict[str, str]
    ignored: tuple[str, ...]
    other_prefixes: tuple[str, ...] = ()
    stacked: dict[str, str] = field(default_factory=dict)

    @property
    def _prefixes(self) -> str:
        return f"(?:{'|'.join(re.escape(p) for p in (self.prefix, *self.other_prefixes))})?"

    def _pattern(self, path: str) -> str:
        rest = re.escape(path.removeprefix(self.prefix))
        for letter in ("n", "e"):
            rest = rest.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{_NUMBER})")
        return f"{self._prefixes}{rest}" if path.startswith(self.prefix) else rest

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
    def _stacked(self) -> list[tuple[re.Pattern[str], str]]:
        return [(re.compile(self._pattern(name)), path) for name, path in self.stacked.items()]

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        return re.compile(f"{self._prefixes}(?:{'|'.join(self.ignored)})")

    def locate(self, name: str) -> ParamSlot | None:
        """The slot of the checkpoint tensor ``name``; IGNORED for a known buffer; None if it is unknown."""
        for pattern, param, part in self._rules:
            if match := pattern.fullmatch(name):
                groups = match.groupdict()
                return ParamSlot(param.format(**groups), part, groups.get("kind") or "weight")
        return IGNORED if self._ignored.fullmatch(name) else None

    def expert_of(self, name: str) -> str | None:
        """For a tensor that holds a module of all experts: the name of one expert's, with ``{e}`` in it; else None."""
        for pattern, path in self._stacked:
            if match := pattern.fullmatch(name):
                return path.replace("{n}", match["n"])
        return None

    def parts(self, param: str) -> list[str]:
        """The parts in which checkpoints of this generation store a linear; [""] for one block."""
        numbers = _numbers(param)
        found = [part for name, part in self.linears.values() if name.format(**numbers) == param]
        return found if "" not in found or len(found) == 1 else [part for part in found if part]

    def source(self, param: str, part: str = "", kind: str = "weight") -> str:
        """The name under which a checkpoint holds a parameter: locate's inverse, for messages and for writing."""
        numbers = _numbers(param)
        for path, (owner, own_part) in self.linears.items():
            if (owner.format(**numbers), own_part) == (param, part):
                return f"{path.format(**numbers)}.{kind}"
        for path, owner in self.tensors.items():
            if owner.format(**numbers) == param:
                return path.format(**numbers)
        return f"{param}.{part}.{kind}" if part else f"{param}.{kind}"


def _numbers(param: str) -> dict[str, str]:
    """{"n": layer, "e": expert} of a parameter's name, as far as it has them."""
    found = [word for word in param.split(".") if word.isdecimal()]
    return dict(zip(("n", "e"), [*found, "", ""]))


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

_ATTENTION = {f"model.layers.{{n}}.self_attn.{p}_proj": ("layers.{n}.qkv_proj", p) for p in ("q", "k", "v")}


def _mlp(module: str, param: str) -> dict[str, tuple[str, str]]:
    """The three linears of an MLP, whichever of a layer's MLPs it is."""
    return {
        f"model.layers.{{n}}.mlp.{module}gate_proj": (f"layers.{{n}}.{param}gate_up_proj", "gate"),
        f"model.layers.{{n}}.mlp.{module}up_proj": (f"layers.{{n}}.{param}gate_up_proj", "up"),
        f"model.layers.{{n}}.mlp.{module}down_proj": (f"layers.{{n}}.{param}down_proj", ""),
    }


_DELTA = {
    "model.layers.{n}.linear_attn.in_proj_qkv": ("layers.{n}.in_proj", "qkv"),
    "model.layers.{n}.linear_attn.in_proj_z": ("layers.{n}.in_proj", "z"),
    "model.layers.{n}.linear_attn.out_proj": ("layers.{n}.out_proj", ""),
}
_APART = {
    "model.layers.{n}.linear_attn.in_proj_b": ("layers.{n}.rates_proj", "b"),
    "model.layers.{n}.linear_attn.in_proj_a": ("layers.{n}.rates_proj", "a"),
}
_GROUPED = {  # their rows key head by key head: config.layers.file_rows
    "model.layers.{n}.linear_attn.in_proj_qkvz": ("layers.{n}.in_proj", ""),
    "model.layers.{n}.linear_attn.in_proj_ba": ("layers.{n}.rates_proj", ""),
}
_DELTA_TENSORS = {
    "model.layers.{n}.linear_attn.conv1d.weight": "layers.{n}.conv",
    "model.layers.{n}.linear_attn.A_log": "layers.{n}.log_decay",
    "model.layers.{n}.linear_attn.dt_bias": "layers.{n}.decay_bias",
    "model.layers.{n}.linear_attn.norm.weight": "layers.{n}.out_norm",
}


_MTP = r"mtp\..+"

# Qwen1.5 to Qwen3, dense and mixtures of experts: one table, since no name means two things.
QWEN2 = NameTable(
    prefix="model.",
    linears={
        **_ATTENTION,
        "model.layers.{n}.self_attn.qkv_proj": ("layers.{n}.qkv_proj", ""),  # as some GGUF files have it
        "model.layers.{n}.self_attn.o_proj": ("layers.{n}.o_proj", ""),
        **_mlp("", ""),
        **_mlp("experts.{e}.", "experts.{e}."),
        "model.layers.{n}.mlp.experts.{e}.gate_up_proj": ("layers.{n}.experts.{e}.gate_up_proj", ""),
        **_mlp("shared_expert.", "shared_expert."),
        # dense in the network, in whatever format a quantising tool left them in the file
        "model.layers.{n}.mlp.gate": ("layers.{n}.router", ""),
        "model.layers.{n}.mlp.shared_expert_gate": ("layers.{n}.shared_expert_gate", ""),
        "lm_head": ("lm_head", ""),
    },
    tensors={
        "model.embed_tokens.weight": "embed_tokens",
        "model.layers.{n}.input_layernorm.weight": "layers.{n}.input_norm",
        "model.layers.{n}.post_attention_layernorm.weight": "layers.{n}.post_norm",
        "model.layers.{n}.self_attn.q_norm.weight": "layers.{n}.q_norm",
        "model.layers.{n}.self_attn.k_norm.weight": "layers.{n}.k_norm",
        "model.norm.weight": "norm",
    },
    # Vision towers and extra prediction heads are whole networks beside the text's.
    ignored=(
        r"(?:layers\.[0-9]+\.self_attn\.)?rotary_emb\.inv_freq",
        # of activations and of a cache in FP8, which have more than 8 bits here or find their own scales
        r"(?:layers\..+|lm_head)\.(?:input|output|q|k|v|kv|kv_cache|prob)_(?:scale|zero_point)",
        r"visual\..+",
        _MTP,
    ),
    other_prefixes=("model.language_model.",),
    stacked={
        "model.layers.{n}.mlp.experts.gate_up_proj": "model.layers.{n}.mlp.experts.{e}.gate_up_proj.weight",
        "model.layers.{n}.mlp.experts.down_proj": "model.layers.{n}.mlp.experts.{e}.down_proj.weight",
    },
)

_HYBRID = replace(QWEN2, linears={**_DELTA, **QWEN2.linears}, tensors={**_DELTA_TENSORS, **QWEN2.tensors})
QWEN3_NEXT = replace(_HYBRID, linears={**_GROUPED, **_HYBRID.linears})
QWEN3_5 = replace(_HYBRID, linears={**_APART, **_HYBRID.linears})


def _with_mtp(table: NameTable) -> NameTable:
    """A table that also knows the head that guesses the token after next; some writers put it below "model."."""
    within = "model.layers.{n}."
    linears = {
        "fc": ("mtp.fc", ""),
        **{
            f"layers.{{n}}.{path.removeprefix(within)}": (f"mtp.{param}", part)
            for path, (param, part) in QWEN2.linears.items()
            if path.startswith(within)
        },
    }
    tensors = {
        "pre_fc_norm_embedding.weight": "mtp.embedding_norm",
        "pre_fc_norm_hidden.weight": "mtp.hidden_norm",
        "norm.weight": "mtp.norm",
        **{
            f"layers.{{n}}.{path.removeprefix(within)}": f"mtp.{param}"
            for path, param in QWEN2.tensors.items()
            if path.startswith(within)
        },
    }
    places = ("mtp.", "model.mtp.")
    stacked = {
        f"{place}{name.removeprefix('model.')}": f"{place}{path.removeprefix('model.')}"
        for place in places
        for name, path in QWEN2.stacked.items()
    }
    return replace(
        table,
        linears=table.linears | {place + path: to for place in places for path, to in linears.items()},
        tensors=table.tensors | {place + path: to for place in places for path, to in tensors.items()},
        stacked=table.stacked | stacked,
        ignored=tuple(pattern for pattern in table.ignored if pattern != _MTP),
    )


TABLES = {
    "qwen": QWEN1,
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), QWEN2),
    "qwen3_next": QWEN3_NEXT,
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), QWEN3_5),
}


_WITH_MTP = {name: _with_mtp(TABLES[name]) for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe")}


def table_for(model_type: str, with_mtp: bool = False) -> NameTable:
    """The name table of a ``model_type``, ``with_mtp`` with the names of the head that guesses the token after next,
    which are ignored otherwise. Raises ConfigError for one that has none."""
    if with_mtp and model_type in _WITH_MTP:
        return _WITH_MTP[model_type]
    if model_type not in TABLES:
        raise ConfigError(
            f"cannot name the tensors of model_type {model_type!r}",
            f"known types: {', '.join(sorted(TABLES))}",
            "Check model_type in config.json, or use a version of qwenrt that supports this family.",
        )
    return TABLES[model_type]
