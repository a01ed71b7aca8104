"""An adapter as a directory that peft loads."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from qwenrt.config import ModelConfig
from qwenrt.config.adapter import FILE, AdapterConfig, as_peft_writes, portable_base
from qwenrt.config.layers import file_rows
from qwenrt.errors import RequestError
from qwenrt.loader.adapters.names import PREFIX, WEIGHTS
from qwenrt.loader.adapters.placing import linears_of
from qwenrt.loader.adapters.reader import BASE_DIGEST, Base
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.loader.checkpoint.writing import save_atomically, write_atomically
from qwenrt.ops.types import AdapterWeights, LoraPair, TokenRows

EACH, FUSED = "experts", "fused"
LAYOUTS = (EACH, FUSED)  # experts one by one, or as peft keeps them beside transformers 5
_AGAIN = "save again"


def write_adapter(
    directory: str | Path,
    config: ModelConfig,
    adapter: AdapterWeights,
    *,
    base: Base | None = None,
    base_name: str | None = None,
    revision: str | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    moe_layout: str | None = None,
) -> AdapterConfig:
    """Write ``adapter``, which changes a model of ``config``, to ``directory`` as peft does: adapter_config.json and
    adapter_model.safetensors, float32, each whole or not there.

    Ranks, scales and targets are taken from the pairs. ``base``: the model's weights; they are named in the file by
    their digest, and DoRA's magnitudes need them. ``base_name``: a hub's id, or a path, of which the last name is kept.
    ``rslora``: alpha is meant as rsLoRA has it (the scales are those of the pairs either way). ``moe_layout``: see
    LAYOUTS; None is "experts", which all releases of peft read, unless their pairs have several ranks, which peft loads
    as "fused" alone. RequestError where peft has no form for it. Raises CheckpointError where nothing can be written.
    """
    if moe_layout is None:
        moe_layout = EACH if _are_uniform(adapter) or not _are_all(adapter, config) else FUSED
    if moe_layout not in LAYOUTS:
        found = f"moe_layout={moe_layout!r}"
        raise RequestError("writing an adapter", found, f"Give one of {', '.join(LAYOUTS)}.")
    writing = _Writer(config, adapter, base, moe_layout)
    writing.add_all()
    said = writing.config(rslora and not (writing.has_experts and moe_layout == EACH), dropout)
    said = dataclasses.replace(said, base=portable_base(base_name), revision=revision)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} if base is None else {"format": "pt", BASE_DIGEST: base.digest}
    save_atomically(writing.tensors, target / WEIGHTS, metadata, _AGAIN)
    text = json.dumps(as_peft_writes(said), indent=2, ensure_ascii=False) + "\n"
    write_atomically(target / FILE, text.encode(), _AGAIN)
    return said


class _Writer:
    """The tensors of one adapter under peft's names, and what its config has to say of them."""

    def __init__(self, config: ModelConfig, adapter: AdapterWeights, base: Base | None, layout: str) -> None:
        self._model, self._adapter, self._base, self._layout = config, adapter, base, layout
        self._table, self._linears = table_for(config.model_type), linears_of(config)
        self.tensors: dict[str, torch.Tensor] = {}
        self.has_experts = any(".experts." in param for param in adapter.linears)
        self._pairs: dict[str, tuple[int, float]] = {}  # module -> rank and scale
        self._kept: list[str] = []
        self._rows: dict[str, tuple[int, ...]] = {}
        self._stacked: dict[str, str] = {}  # target parameter -> its module
        self._tied = False

    def add_all(self) -> None:
        stacks: dict[tuple[str, str], dict[int, LoraPair]] = {}
        for param, pairs in self._adapter.linears.items():
            if ".experts." in param and self._layout == FUSED:
                layer, _, rest = param.partition(".experts.")
                expert, _, role = rest.partition(".")
                stacks.setdefault((layer, role), {})[int(expert)] = _joined(
                    pairs, self._linears[param].out_features
                )
                continue
            for pair in self._one_pair(param, pairs) if self._is_one_module(param) else pairs:
                for module, own in self._parts(param, pair):
                    self._pair(param, module, own)
        for (layer, role), each in stacks.items():
            both = (layer, "gate_up_proj") in stacks and (layer, "down_proj") in stacks
            self._stack(layer, role, each, both)
        self._vocabulary()
        for param, router in self._adapter.routers.items():
            module = self._table.source(param).removesuffix(".weight")
            self._put(f"{module}.weight", router)
            # peft keeps whole what ends with the name, in all layers: shared_expert_gate must not
            kept = ".".join(module.split(".")[-2:])
            self._kept += [kept] if kept not in self._kept else []

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[PREFIX + name] = tensor.detach().to("cpu", torch.float32).contiguous().clone()

    def _is_one_module(self, param: str) -> bool:
        """Whether the file has all rows of a linear in one piece, as Qwen-1 has queries, keys and values."""
        parts = self._table.parts(param)
        return parts == [""] or len(parts) != len(self._linears[param].parts)

    def _one_pair(self, param: str, pairs: tuple[LoraPair, ...]) -> tuple[LoraPair, ...]:
        """The pairs of a linear that is one module as one pair for all of its rows."""
        rows = self._linears[param].out_features
        if not pairs or (len(pairs) == 1 and len(pairs[0].b) == rows):
            return pairs
        if any(pair.row_scale is not None or pair.bias is not None for pair in pairs):
            found = f"{param} is one module in the file, and some of its rows have magnitudes or biases of their own"
            raise RequestError("writing an adapter", found, "Merge the adapter instead (qwenrt merge).")
        return (_joined(pairs, rows),)

    def _parts(self, param: str, pair: LoraPair) -> Iterator[tuple[str, LoraPair]]:
        """(module, its pair) for a pair of a linear: one, or one for each part that it spans."""
        if self._is_one_module(param):
            yield self._table.source(param).removesuffix(".weight"), pair
            return
        first = 0
        for part, rows in self._linears[param].parts:
            low, high = first - pair.first, first - pair.first + rows
            if high > 0 and low < len(pair.b):
                if low < 0 or high > len(pair.b):
                    found = (
                        f"a pair of {param} covers rows {pair.first} to {pair.rows.stop}, parts of modules"
                    )
                    raise RequestError(
                        "writing an adapter", found, "Give each of its parts a pair of its own."
                    )
                cut = slice(low, high)
                used = _own_half(pair, low) if ".experts." in param else slice(None)
                scales, bias = (None if t is None else t[cut] for t in (pair.row_scale, pair.bias))
                own = LoraPair(pair.a[used], pair.b[cut, used], pair.scale, first, scales, bias)
                yield self._table.source(param, part).removesuffix(".weight"), own
            first += rows

    def _pair(self, param: str, module: str, pair: LoraPair) -> None:
        rank = len(pair.a)
        if pair.bias is not None and (rank == 0 or pair.row_scale is not None):
            found = f"{module} has a new bias beside {'DoRA' if rank else 'no pair'}"
            raise RequestError("writing an adapter", found, "Merge the adapter instead (qwenrt merge).")
        rows = file_rows(self._model, param, "")
        order = None if rows is None else torch.tensor(rows, device=pair.b.device).argsort()

        def as_in_file(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if order is None else tensor[order]

        self._pairs[module] = rank, pair.scale
        self._put(f"{module}.lora_A.weight", pair.a)
        self._put(f"{module}.lora_B.weight", as_in_file(pair.b))
        if pair.bias is not None:
            self._put(f"{module}.lora_B.bias", as_in_file(pair.bias) / pair.scale)
        if pair.row_scale is not None:
            if self._base is None:
                found = f"the magnitude of {module} is a share of the norms of the model's own rows"
                raise RequestError("writing an adapter with DoRA", found, "Give the model's weights (base=).")
            weight = self._base.weight(param)[pair.rows].to(pair.b.device)
            norms = torch.linalg.vector_norm(weight + pair.scale * (pair.b @ pair.a), dim=1)
            self._put(f"{module}.lora_magnitude_vector", as_in_file(pair.row_scale * norms))

    def _stack(self, layer: str, role: str, each: Mapping[int, LoraPair], both: bool) -> None:
        """All experts' pairs in one: A's rows expert by expert, B's columns rank by rank."""
        moe = self._model.moe
        number = 0 if moe is None else moe.num_experts
        forms = {
            (len(pair.a), pair.scale, pair.row_scale is None, pair.bias is None) for pair in each.values()
        }
        if len(each) != number or len(forms) != 1 or forms != {(*next(iter(forms))[:2], True, True)}:
            found = f"{len(each)} of the {number} experts of {layer} have pairs of {len(forms)} kinds"
            raise RequestError(
                'writing an adapter with moe_layout="fused"', found, 'Use moe_layout="experts".'
            )
        stem = self._table.source(f"{layer}.experts.0.{role}", kind="weight").rpartition(".0.")[0]
        # peft adapts gate_up_proj first, so what it adapts next lies around that
        module = f"{stem}.base_layer" if role == "gate_up_proj" and both else stem
        pairs = [each[e] for e in range(number)]
        self._put(f"{module}.lora_A.weight", torch.cat([pair.a for pair in pairs]))
        stacked = torch.stack([pair.b for pair in pairs], dim=2)  # [out, r, E]
        self._put(f"{module}.lora_B.weight", stacked.flatten(1))
        self._stacked[f"{stem}.{role}"] = role
        self._pairs[f"{stem}.{role}"] = len(pairs[0].a), pairs[0].scale

    # ---- embedding and head

    def _vocabulary(self) -> None:
        adapter, tied = self._adapter, self._model.tie_word_embeddings
        names = {"embed_tokens": adapter.embed, "lm_head": adapter.head}
        same = (
            adapter.embed is not None and adapter.head is not None and same_rows(adapter.embed, adapter.head)
        )
        some = [param for param, rows in names.items() if rows is not None and rows.ids is not None]
        if tied and some and not same:
            found = f"head and embedding are one, and new rows of {', '.join(some)} are not for both"
            raise RequestError("writing an adapter", found, "Train them together.")
        for param, rows in names.items():
            if rows is None or (tied and same and rows.ids is not None and param == "lm_head"):
                continue
            module = self._table.source(param).removesuffix(".weight")
            if rows.ids is None:
                self._put(f"{module}.weight", rows.rows)
                self._kept.append(module)
            else:
                self._put(f"{module}.token_adapter.trainable_tokens_delta", rows.rows)
                self._rows[module] = tuple(rows.ids.tolist())
        self._tied = tied and same and not some
        if adapter.embed_pair is not None:
            module = self._table.source("embed_tokens").removesuffix(".weight")
            self._put(f"{module}.lora_embedding_A", adapter.embed_pair.a)
            self._put(f"{module}.lora_embedding_B", adapter.embed_pair.b)
            self._pairs[module] = len(adapter.embed_pair.a), adapter.embed_pair.scale

    # ---- the config

    def config(self, rslora: bool, dropout: float) -> AdapterConfig:
        """What makes peft give each module its rank and its scale."""
        forms = {module: (rank, _alpha(rank, scale, rslora)) for module, (rank, scale) in self._pairs.items()}
        (rank, alpha), _ = Counter(forms.values()).most_common(1)[0] if forms else ((8, 8.0), 0)
        others = {module: form for module, form in forms.items() if form != (rank, alpha)}
        biases = any(name.endswith(".lora_B.bias") for name in self.tensors)
        if biases:
            for module, (own, _) in self._pairs.items():
                b = self.tensors.get(f"{PREFIX}{module}.lora_B.weight")
                if b is not None and own:
                    self.tensors.setdefault(f"{PREFIX}{module}.lora_B.bias", torch.zeros(len(b)))
        return AdapterConfig(
            rank=rank,
            alpha=alpha,
            targets=self._targets(),
            rank_pattern=tuple(
                (re.escape(module), own) for module, (own, _) in others.items() if own != rank
            ),
            alpha_pattern=tuple(
                (re.escape(module), own) for module, (_, own) in others.items() if own != alpha
            ),
            kept_modules=tuple(self._kept),
            token_rows=tuple(self._rows.items()),
            target_parameters=tuple(sorted({f"mlp.experts.{role}" for role in self._stacked.values()})),
            rslora=rslora,
            dora=any(name.endswith("magnitude_vector") for name in self.tensors),
            lora_bias=biases,
            tie=self._tied,
            dropout=dropout,
        )

    def _targets(self) -> tuple[str, ...]:
        """The adapted modules, by their last words where these mean no others."""
        adapted = self._pairs.keys() - self._stacked.keys()
        modules: dict[str, set[str]] = {}
        for spec in self._linears.values():
            for part in self._table.parts(spec.name):
                module = self._table.source(spec.name, part).removesuffix(".weight")
                modules.setdefault(module.rpartition(".")[2], set()).add(module)
        found: set[str] = set()
        for module in adapted:
            word = module.rpartition(".")[2]
            found.add(word if modules.get(word, set()) <= adapted else module)
        return tuple(sorted(found))


def _alpha(rank: int, scale: float, rslora: bool) -> float:
    """What gives ``scale`` at ``rank``, without the last digits of a division."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _joined(pairs: tuple[LoraPair, ...], rows: int) -> LoraPair:
    """Pairs of a linear's parts as one for all of its rows: A one below the other, B's blocks on the diagonal."""
    if len(pairs) == 1 and len(pairs[0].b) == rows:
        return pairs[0]
    scale = pairs[0].scale
    b = pairs[0].b.new_zeros(rows, sum(len(pair.a) for pair in pairs))
    at = 0
    for pair in pairs:
        b[pair.rows, at : at + len(pair.a)] = pair.b.detach() * (pair.scale / scale)
        at += len(pair.a)
    scales = [pair.row_scale for pair in pairs] + [pair.bias for pair in pairs]
    given = next((tensor for tensor in scales if tensor is not None), None)
    return LoraPair(torch.cat([pair.a for pair in pairs]), b, scale, 0, None, given)


def _are_uniform(adapter: AdapterWeights) -> bool:
    """Whether experts have pairs of one rank and scale, and gate and up each one or none: so peft joins them."""
    forms = set[tuple[int, float]]()
    for param, pairs in adapter.linears.items():
        if ".experts." not in param:
            continue
        halves = [_own_half(pair, 0) != slice(None) for pair in pairs]
        if param.endswith("gate_up_proj") and len(pairs) + sum(halves) != 2:
            return False
        forms |= {
            (len(pair.a) // (2 if half else 1), pair.scale) for pair, half in zip(pairs, halves, strict=True)
        }
    return len(forms) <= 1


def _are_all(adapter: AdapterWeights, config: ModelConfig) -> bool:
    """Whether all experts of a layer have pairs for one of their linears, or none has."""
    number = 0 if config.moe is None else config.moe.num_experts
    of_layer = Counter(
        re.sub(r"\.experts\.[0-9]+\.", ".", param) for param in adapter.linears if ".experts." in param
    )
    return all(count == number for count in of_layer.values())


def _own_half(pair: LoraPair, first: int) -> slice:
    """Which ranks a pair has for the half of its rows that begins at ``first``: all, or where B is two blocks on a
    diagonal, as peft makes of gate and up, those of one block."""
    rows, ranks = len(pair.b) // 2, len(pair.a) // 2
    if len(pair.a) % 2 or not pair.b.any() or pair.b[:rows, ranks:].any() or pair.b[rows:, :ranks].any():
        return slice(None)
    return slice(ranks) if first == 0 else slice(ranks, None)


def same_rows(one: TokenRows, other: TokenRows) -> bool:
    """Whether two are new rows of the same tokens, and equal."""
    if (one.ids is None) != (other.ids is None) or one.rows.shape != other.rows.shape:
        return False
    ids = one.ids is None or other.ids is None or torch.equal(one.ids, other.ids)
    return ids and torch.equal(one.rows, other.rows)
