"""GGUF's names of tensors -> those of the same tensors in a directory as HuggingFace lays one out.

No Qwen's rows were moved by the conversion of attention: queries and keys lie as in the original. Only the experts of a
layer are one tensor, which is seen here as one matrix for each. What was done to layers of linear attention stays as it
is: config.model.LinearAttentionConfig says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from qwenrt.config.hybrid import MODEL_TYPES as HYBRID_TYPES
from qwenrt.errors import CheckpointError
from qwenrt.loader.checkpoint.header import TensorEntry

MAX_EXPERTS = 2**17  # in all layers of a file; the largest released model has 12,000
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_KIND = re.compile(r"(.+)\.(weight|bias)")

_QWEN1 = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{n}.ln_1",
    "ffn_norm": "transformer.h.{n}.ln_2",
    "attn_qkv": "transformer.h.{n}.attn.c_attn",
    "attn_output": "transformer.h.{n}.attn.c_proj",
    "ffn_gate": "transformer.h.{n}.mlp.w2",
    "ffn_up": "transformer.h.{n}.mlp.w1",
    "ffn_down": "transformer.h.{n}.mlp.c_proj",
}
_LATER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{n}.input_layernorm",
    "ffn_norm": "model.layers.{n}.post_attention_layernorm",
    "attn_q": "model.layers.{n}.self_attn.q_proj",
    "attn_k": "model.layers.{n}.self_attn.k_proj",
    "attn_v": "model.layers.{n}.self_attn.v_proj",
    "attn_qkv": "model.layers.{n}.self_attn.qkv_proj",
    "attn_output": "model.layers.{n}.self_attn.o_proj",
    "attn_q_norm": "model.layers.{n}.self_attn.q_norm",
    "attn_k_norm": "model.layers.{n}.self_attn.k_norm",
    "ffn_gate": "model.layers.{n}.mlp.gate_proj",
    "ffn_up": "model.layers.{n}.mlp.up_proj",
    "ffn_down": "model.layers.{n}.mlp.down_proj",
    "ffn_gate_inp": "model.layers.{n}.mlp.gate",
    "ffn_gate_inp_shexp": "model.layers.{n}.mlp.shared_expert_gate",
    "ffn_gate_shexp": "model.layers.{n}.mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "model.layers.{n}.mlp.shared_expert.up_proj",
    "ffn_down_shexp": "model.layers.{n}.mlp.shared_expert.down_proj",
}
_HYBRID = _LATER | {
    "post_attention_norm": "model.layers.{n}.post_attention_layernorm",
    "attn_qkv": "model.layers.{n}.linear_attn.in_proj_qkv",
    "attn_gate": "model.layers.{n}.linear_attn.in_proj_z",
    "ssm_in": "model.layers.{n}.linear_attn.in_proj_qkvz",
    "ssm_ba": "model.layers.{n}.linear_attn.in_proj_ba",
    "ssm_beta": "model.layers.{n}.linear_attn.in_proj_b",
    "ssm_alpha": "model.layers.{n}.linear_attn.in_proj_a",
    "ssm_conv1d": "model.layers.{n}.linear_attn.conv1d",
    "ssm_norm": "model.layers.{n}.linear_attn.norm",
    "ssm_out": "model.layers.{n}.linear_attn.out_proj",
}
_BARE = {  # whole names within a layer
    "ssm_a": "model.layers.{n}.linear_attn.A_log",
    "ssm_dt.bias": "model.layers.{n}.linear_attn.dt_bias",
}
_EXPERTS = {
    "ffn_gate_exps": "model.layers.{n}.mlp.experts.{e}.gate_proj",
    "ffn_up_exps": "model.layers.{n}.mlp.experts.{e}.up_proj",
    "ffn_gate_up_exps": "model.layers.{n}.mlp.experts.{e}.gate_up_proj",
    "ffn_down_exps": "model.layers.{n}.mlp.experts.{e}.down_proj",
}
_NEXTN = {
    "nextn.eh_proj": "fc",
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
}
_FREQUENCIES = ("rope_freqs", "attn_rot_embd")  # of rotations, which follow from the config


def renamed(entries: tuple[TensorEntry, ...], model_type: str, layers: int) -> dict[str, TensorEntry]:
    """The tensors of a file under their names in HuggingFace's layout; a name that is not known stays as it is, so that
    it is found to be unexpected. Blocks from ``layers`` on are heads that guess tokens. Raises CheckpointError where
    two are the same, or experts are without number."""
    found: dict[str, TensorEntry] = {}
    experts = 0
    for entry in entries:
        for each in _renamed(entry, model_type, layers):
            if each.name in found:
                raise CheckpointError(
                    f"reading {entry.shard.name}",
                    f"{entry.name[:80]!r} is another tensor of the name {each.name[:80]!r}",
                    "Convert the model again, or fetch another file of it.",
                )
            found[each.name] = each
        if len(entry.shape) == 3:
            experts += entry.shape[0]
            if experts > MAX_EXPERTS:
                found_ = f"{experts} experts in layers up to that of {entry.name[:80]!r}"
                remedy = f"No Qwen has more than {MAX_EXPERTS}: the file is damaged."
                raise CheckpointError(f"reading {entry.shard.name}", found_, remedy)
    return found


def _renamed(entry: TensorEntry, model_type: str, layers: int) -> Iterator[TensorEntry]:
    hybrid = model_type in HYBRID_TYPES
    table = _QWEN1 if model_type == "qwen" else _HYBRID if hybrid else _LATER
    in_layer = _LAYER.fullmatch(entry.name)
    number, rest = in_layer.groups() if in_layer else ("", entry.name)
    if hybrid and in_layer and int(number) >= layers:
        yield from _mtp(entry, int(number) - layers, rest)
        return
    if hybrid and in_layer and rest in _BARE:
        yield replace(entry, name=_BARE[rest].replace("{n}", number))
        return
    parts = _KIND.fullmatch(rest)
    module, kind = parts.groups() if parts else ("", "")
    path, stacked = table.get(module, ""), _EXPERTS.get(module, "") if model_type != "qwen" else ""
    if module in _FREQUENCIES:
        return
    if stacked and in_layer and kind == "weight" and len(entry.shape) == 3:
        yield from _experts(entry, f"{stacked}.{kind}".replace("{n}", number))
    elif path and ("{n}" in path) == bool(in_layer):
        shape = (1, *entry.shape) if module == "ffn_gate_inp_shexp" and len(entry.shape) == 1 else entry.shape
        if module == "ssm_conv1d" and len(shape) == 2:
            shape = (shape[0], 1, shape[1])
        yield replace(entry, name=f"{path}.{kind}".replace("{n}", number), shape=shape)
    else:
        yield entry


def _mtp(entry: TensorEntry, layer: int, rest: str) -> Iterator[TensorEntry]:
    """A tensor of a block behind the decoder's: of the head that guesses the token after next."""
    module, _, kind = rest.rpartition(".")
    if module in _NEXTN and layer == 0:
        yield replace(entry, name=f"mtp.{_NEXTN[module]}.{kind}")
        return
    for each in _renamed(replace(entry, name=f"blk.{layer}.{rest}"), "qwen3_next", layer + 1):
        known = each.name.startswith("model.layers.")
        yield replace(each, name=f"mtp.{each.name.removeprefix('model.') if known else entry.name}")


def _experts(entry: TensorEntry, name: str) -> Iterator[TensorEntry]:
    """One matrix for each expert of a tensor [experts, out, in]."""
    count, *shape = entry.shape
    size = entry.nbytes // count
    for expert in range(min(count, MAX_EXPERTS)):
        begin = entry.begin + expert * size
        yield replace(
            entry, name=name.replace("{e}", str(expert)), shape=tuple(shape), begin=begin, end=begin + size
        )
