"""Adapters made by hand, and models whose weights have them merged: the plain formula they are held against."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwenrt.backends.base import Backend
from qwenrt.config import ModelConfig
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import AdapterWeights, LoraPair, Packed, TokenRows


def random_pair(first: int, rows: int, inputs: int, rank: int, gen: torch.Generator, full: bool) -> LoraPair:
    """``full``: with DoRA's factors and a bias."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    return LoraPair(
        draw(rank, inputs) / inputs**0.5,
        draw(rows, rank) / rank**0.5,
        scale=0.5,
        first=first,
        row_scale=1 + draw(rows) / 5 if full else None,
        bias=draw(rows) / 5 if full else None,
    )


def random_adapter(
    model: Qwen, seed: int = 0, rank: int = 3, *, full: bool = False, skip: tuple[str, ...] = ()
) -> AdapterWeights:
    """A pair for each part of every linear of the layers whose part is not one to ``skip``. ``full``: with all else
    that an adapter may have: DoRA, biases, rows of embedding and head, pairs for both."""
    gen = torch.Generator().manual_seed(seed)
    linears = {}
    for name, spec in model.linear_specs.items():
        pairs, first = [], 0
        for part, rows in spec.parts:
            if part not in skip and (full or name != "lm_head"):
                pairs.append(random_pair(first, rows, spec.in_features, rank, gen, full))
            first += rows
        if pairs and not name.startswith("mtp"):
            linears[name] = tuple(pairs)
    if not full:
        return AdapterWeights(linears)
    vocab, d = model.embed_tokens.shape
    ids = torch.randperm(vocab, generator=gen)[:20].sort().values
    embed, head = (TokenRows(torch.randn(20, d, generator=gen), ids) for _ in range(2))
    pair = LoraPair(torch.randn(rank, vocab, generator=gen), torch.randn(d, rank, generator=gen) / 5, 0.5)
    return AdapterWeights(linears, embed, head, pair)


def dense_weight(w: Packed) -> torch.Tensor:
    """[N, K] of a linear of dense parts."""
    if w.kind == "parts":
        return torch.cat([dense_weight(part) for part in w.data["parts"]])
    assert w.kind == "dense"
    weight: torch.Tensor = w.data["weight"]
    return weight


def merged(model: Qwen, adapter: AdapterWeights) -> Qwen:
    """The model with an adapter in its weights, all dense and float32, by the formula alone."""
    own = Qwen(model.config, Backend(torch.device("cpu")), torch.float32)
    for name in model.tensor_specs:
        own.set_tensor(name, model.weights.tensor(name).clone())
    for name, spec in model.linear_specs.items():
        w = model.weights.packed(name)
        weight, bias = dense_weight(w).clone(), torch.zeros(spec.out_features)
        if w.kind == "parts":
            biases = [part.bias for part in w.data["parts"]]
            assert all(b is None for b in biases) or all(b is not None for b in biases)
            bias = torch.cat(biases) if biases[0] is not None else bias
        bias = bias if w.bias is None else bias + w.bias
        for pair in adapter.linears.get(name, ()):
            new = weight[pair.rows] + pair.scale * (pair.b @ pair.a)
            weight[pair.rows] = new if pair.row_scale is None else new * pair.row_scale[:, None]
            if pair.bias is not None:
                bias[pair.rows] += pair.bias
        if name == "lm_head" and adapter.head is not None:
            assert adapter.head.ids is not None
            weight[adapter.head.ids], bias[adapter.head.ids] = adapter.head.rows, 0.0
        own.set_linear(name, Packed("dense", *weight.shape, {"weight": weight}, bias))
    embed = own.embed_tokens
    if adapter.embed is not None and adapter.embed.ids is not None:
        embed[adapter.embed.ids] = adapter.embed.rows
    if adapter.embed_pair is not None:
        pair = adapter.embed_pair
        embed += pair.scale * (pair.b @ pair.a).t()
    own.bind()
    return own


def on_parameters(adapter: AdapterWeights) -> AdapterWeights:
    """The same whose A and B ask for gradients."""
    linears = {
        name: tuple(
            dataclasses.replace(p, a=p.a.clone().requires_grad_(), b=p.b.clone().requires_grad_())
            for p in pairs
        )
        for name, pairs in adapter.linears.items()
    }
    return dataclasses.replace(adapter, linears=linears)


def save_qwen1_adapter(directory: Path, config: ModelConfig, seed: int = 0, rank: int = 4) -> Path:
    """An adapter for every c_attn of a Qwen-1, as peft writes it."""
    gen = torch.Generator().manual_seed(seed)
    d, tensors = config.hidden_size, {}
    rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    for i in range(config.num_layers):
        module = f"base_model.model.transformer.h.{i}.attn.c_attn"
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, d, generator=gen) / d**0.5
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=gen) / rank**0.5
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["c_attn"]}
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory
