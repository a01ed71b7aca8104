"""An adapter that is being trained: its pairs, rows of tokens, and what they make of the network in a step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from qwenrt.arguments import flag
from qwenrt.config import ModelConfig
from qwenrt.config.adapter import ALL_LINEAR, AdapterConfig
from qwenrt.config.layers import LinearSpec, head_linear, layer_linears
from qwenrt.errors import RequestError, shown
from qwenrt.finetune.settings import chosen, number_between, whole_number
from qwenrt.loader.checkpoint.names import table_for
from qwenrt.model.qwen import Qwen
from qwenrt.ops import reference
from qwenrt.ops.types import AdapterWeights, LoraPair, Packed, TokenRows

NEVER_LEARNED = (
    0.8  # cosine to the mean row of the head: that of a token that the base never had to say is above
)
SEED_PRESET = {
    "rank": 64,
    "alpha": 16,
    "dropout": 0.05,
    "learning_rate": 3e-4,
    "warmup_ratio": 0.01,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
}
SEED_TARGETS = ("c_attn", "c_proj", "w1", "w2")
KeepModules = Literal["auto", "none", "all"]


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter is made of.

    ``rank`` and ``alpha``: y = Wx + scale * B(A(x)), scale being alpha / rank, or alpha over its root with ``rslora``;
    ``rank_pattern``, ``alpha_pattern``: others for modules whose names end with a pattern. ``dropout`` of x before A.
    ``targets``: "all" linears of attention and MLP, or names of modules, as "q_proj". ``dora``: magnitudes of rows are
    trained too. ``lora_plus``: by how much B's learning rate is higher. ``train_tokens``: tokens of which the rows of
    embedding and head are trained; "auto": those that are learned and the base never had to say. ``keep_modules``
    "all": embedding and head are trained whole; "auto": of a base model without train_tokens. ``quantize``: the base
    is rounded when it is loaded. ``moe_layout``: how experts' pairs are written.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all"
    rslora: bool = False
    dora: bool = False
    lora_plus: float = 1.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    train_tokens: tuple[str | int, ...] | str | None = None
    keep_modules: KeepModules = "auto"
    quantize: Literal["int8", "int4"] | None = None
    moe_layout: Literal["experts", "fused"] = "experts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole_number("rank", self.rank, 1))
        for name, (low, high) in {
            "alpha": (1e-6, 1e6),
            "dropout": (0.0, 0.99),
            "lora_plus": (1e-3, 1e3),
        }.items():
            object.__setattr__(self, name, number_between(name, getattr(self, name), low, high))
        for name in ("rslora", "dora"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name in ("targets", "train_tokens"):
            value = getattr(self, name)
            if isinstance(value, str) and value not in ("all", "auto"):
                value = tuple(part.strip() for part in value.split(",") if part.strip())
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        chosen("keep_modules", self.keep_modules, ("auto", "none", "all"))
        chosen("moe_layout", self.moe_layout, ("experts", "fused"))
        if self.quantize is not None:
            chosen("quantize", self.quantize, ("int8", "int4"))
        for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            value = getattr(self, name)
            if not isinstance(value, dict):
                raise RequestError(f"{name}={shown(value)}", "no table", "Give {pattern: value}.")
            check: Callable[[str, object], float] = (
                (lambda n, v: whole_number(n, v, 1))
                if least
                else (lambda n, v: number_between(n, v, 1e-6, 1e6))
            )
            object.__setattr__(self, name, {key: check(f"{name} {key}", v) for key, v in value.items()})

    @property
    def config(self) -> AdapterConfig:
        """The same as adapter_config.json says it."""
        return AdapterConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets=ALL_LINEAR if self.targets == "all" else tuple(self.targets),
            rank_pattern=tuple(self.rank_pattern.items()),
            alpha_pattern=tuple(self.alpha_pattern.items()),
            rslora=self.rslora,
            dora=self.dora,
            dropout=self.dropout,
        )


@dataclass(frozen=True)
class Place:
    """A part of a linear that gets a pair: its name in files, rows ``first`` to ``first + rows`` - 1 of ``param``."""

    module: str
    param: str
    first: int
    rows: int
    inputs: int
    rank: int
    scale: float

    @property
    def numbers(self) -> int:
        return self.rank * (self.rows + self.inputs)


def places(config: ModelConfig, settings: LoraSettings) -> list[Place]:
    """Where pairs go, in the order of the network. Needs no weights. RequestError for targets that there are not."""
    said, found = settings.config, []
    modules = list(_modules(config))
    for module, spec, first, rows in modules:
        if (settings.targets == "all" and not spec.quantizable) or not said.is_target(module):
            continue
        rank = said.rank_of(module)
        if rank > min(rows, spec.in_features):
            raise RequestError(
                f"rank={rank}",
                f"{module} has {spec.in_features} inputs and {rows} outputs",
                f"Use a rank of at most {min(rows, spec.in_features)}, there or everywhere (rank_pattern).",
            )
        found.append(
            Place(module, spec.name, first, rows, spec.in_features, rank, said.scale_of(module, rank))
        )
    if settings.targets != "all":
        missing = [
            name for name in settings.targets if not any(f".{p.module}".endswith(f".{name}") for p in found)
        ]
        if missing:
            known = sorted({module.rpartition(".")[2] for module, *_ in modules})
            raise RequestError(
                f"targets={','.join(settings.targets)}",
                f"no linear of this model is called {', '.join(missing)}",
                f'Use "all", or some of {", ".join(known)}.',
            )
    return found


def num_trained(config: ModelConfig, settings: LoraSettings, rows: int = 0) -> int:
    """Parameters that are trained. ``rows``: of embedding and head."""
    numbers = sum(place.numbers + (place.rows if settings.dora else 0) for place in places(config, settings))
    return numbers + rows * config.hidden_size


def _modules(config: ModelConfig) -> Iterator[tuple[str, LinearSpec, int, int]]:
    """(name in files, linear, first row, rows) of each part of each linear."""
    names = table_for(config.model_type)
    specs = [spec for i in range(config.num_layers) for spec in layer_linears(config, i)]
    for spec in (*specs, head_linear(config)):
        blocks = names.parts(spec.name)
        parts = [("", spec.out_features)] if len(blocks) != len(spec.parts) or blocks == [""] else spec.parts
        first = 0
        for block, (_, rows) in zip([""] if len(parts) == 1 else blocks, parts, strict=True):
            yield names.source(spec.name, block).removesuffix(".weight"), spec, first, rows
            first += rows


class TrainedAdapter:
    """``parameters``: all that is trained, float32, by name. ``rates``: by how much learning rates differ. ``norms``:
    for DoRA, the norms of the rows of a linear, by its name. ``routers``: those that are trained, whole."""

    def __init__(
        self,
        model: Qwen,
        settings: LoraSettings,
        seed: int,
        tokens: Sequence[int] = (),
        whole: Collection[str] = (),
        norms: Callable[[str], torch.Tensor] | None = None,
        routers: Sequence[str] = (),
    ) -> None:
        self._model, self.settings = model, settings
        self._device = device = model.backend.device
        self._places = places(model.config, settings)
        self._norms: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.rates: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        for place in self._places:
            bound = place.inputs**-0.5  # Kaiming's for a slope of the root of 5, as peft begins
            a = torch.empty(place.rank, place.inputs).uniform_(-bound, bound, generator=generator)
            self._add(f"{place.module}.lora_A", a.to(device))
            self._add(f"{place.module}.lora_B", torch.zeros(place.rows, place.rank, device=device))
            self.rates[f"{place.module}.lora_B"] = settings.lora_plus
            if settings.dora:
                assert norms is not None
                own = norms(place.param)[place.first : place.first + place.rows].to(device)
                self._norms[place.module] = own
                self._add(f"{place.module}.magnitude", own.clone())
        self._ids = torch.tensor(sorted(tokens), device=device) if tokens else None
        for name, rows in (
            ("embed_tokens", model.embed_tokens),
            ("lm_head", model.lm_head.data.get("weight")),
        ):
            if name == "lm_head" and model.config.tie_word_embeddings and (whole or tokens):
                continue  # one with the embedding
            if name in whole or self._ids is not None:
                if rows is None:
                    raise RequestError(
                        "training rows of the head", "it is quantised", "Leave train_tokens out."
                    )
                chosen = rows if name in whole else rows.index_select(0, self._ids)  # type: ignore[arg-type]
                self._add(name, chosen.detach().float().clone())

        self._routers = tuple(routers)
        for name in routers:
            self._add(name, model.weights.tensor(name).detach().float().clone())

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self.parameters[name] = tensor.requires_grad_()

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters.values())

    def weights(self) -> AdapterWeights:
        """The adapter as it is now, for one pass through the network."""
        dropout = self.settings.dropout if torch.is_grad_enabled() else 0.0
        linears: dict[str, list[LoraPair]] = {}
        for place in self._places:
            a, b = (self.parameters[f"{place.module}.{kind}"] for kind in ("lora_A", "lora_B"))
            scales = self._row_scale(place) if self.settings.dora else None
            pair = LoraPair(a, b, place.scale, place.first, scales, None, dropout)
            linears.setdefault(place.param, []).append(pair)
        embed, head = self._rows("embed_tokens"), self._rows("lm_head")
        if self._model.config.tie_word_embeddings:
            head = embed
        routers = {name: self.parameters[name] for name in self._routers}
        pairs_of = {name: tuple(pairs) for name, pairs in linears.items()}
        return AdapterWeights(pairs_of, embed, head, routers=routers)

    def _rows(self, name: str) -> TokenRows | None:
        rows = self.parameters.get(name)
        return None if rows is None else TokenRows(rows, self._ids)

    def _row_scale(self, place: Place) -> torch.Tensor:
        """The trained magnitudes over the norms of the rows of W + scale BA, which count as constants."""
        a, b = (self.parameters[f"{place.module}.{kind}"].detach() for kind in ("lora_A", "lora_B"))
        packed = self._model.get(place.param)
        assert isinstance(packed, Packed)
        with torch.no_grad():
            products = reference.linear(a.to(self._model.dtype), packed).float()  # A Wᵀ, and the bias
            if packed.bias is not None:
                products = products - packed.bias.float()
            products = products[:, place.first : place.first + place.rows]
            squares = self._norms[place.module].square() + 2 * place.scale * (b * products.t()).sum(1)
            squares = squares + place.scale**2 * ((b @ (a @ a.t())) * b).sum(1)
            norms = squares.clamp(min=1e-12).sqrt()
        return self.parameters[f"{place.module}.magnitude"] / norms


def never_learned(head: torch.Tensor, tokens: Collection[int]) -> list[int]:
    """Of ``tokens`` those that the base never had to say: the rows of ``head`` [V, D] of all such tokens lie close to
    each other, since nothing but being wrong ever moved them, and so to the mean row."""
    ids = sorted(tokens)
    rows = head.index_select(0, torch.tensor(ids, device=head.device)).float()
    mean = torch.stack([part.float().sum(0) for part in torch.split(head, 8192)]).sum(0) / head.shape[0]
    alike = F.cosine_similarity(rows, mean.unsqueeze(0), dim=1)
    return [token for token, value in zip(ids, alike.tolist(), strict=True) if value > NEVER_LEARNED]
