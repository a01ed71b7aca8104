"""What adapters make of a model's weights, in float32, rounded once to the dtype that is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from qwenrt.config import ModelConfig
from qwenrt.config.layers import file_rows
from qwenrt.errors import RequestError
from qwenrt.loader.adapters import Adapter
from qwenrt.loader.adapters.writer import same_rows
from qwenrt.ops.types import LoraPair, TokenRows

_BLOCK = 1 << 22  # numbers of a weight that are float32 at once


@dataclass
class Loss:
    """How much of what adapters change is lost where the sum is rounded: |rounded - exact| / |change|, by weight."""

    by_name: dict[str, float] = field(default_factory=dict)
    _sums: tuple[float, float] = (0.0, 0.0)

    def add(self, name: str, change: float, error: float) -> None:
        """``change``, ``error``: sums of squares over one weight."""
        if change > 0:
            self.by_name[name] = math.sqrt(error / change)
            self._sums = self._sums[0] + change, self._sums[1] + error

    @property
    def overall(self) -> float:
        return math.sqrt(self._sums[1] / self._sums[0]) if self._sums[0] else 0.0

    @property
    def worst(self) -> tuple[str, float] | None:
        return max(self.by_name.items(), key=lambda each: each[1]) if self.by_name else None


class Changes:
    """What ``adapters``, each with its weight, make of a model: W + sum of weight * (that adapter's W' - W)."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]], config: ModelConfig) -> None:
        self.adapters, self.config, self.loss = adapters, config, Loss()

    def changes(self, param: str, first: int = 0, rows: int | None = None) -> bool:
        """Whether any adapter changes the weight of a model's ``param``, in its rows from ``first`` on."""
        last = math.inf if rows is None else first + rows
        return any(
            any(
                pair.rows.stop > first and pair.first < last and len(pair.a)
                for pair in _pairs(adapter, param)
            )
            or any(name == param and first <= at < last for name, at in adapter.replaced)
            or _rows(adapter, param) is not None
            or (param == "embed_tokens" and adapter.weights.embed_pair is not None)
            for adapter, _ in self.adapters
        )

    def weight(
        self, name: str, param: str, stored: torch.Tensor, dtype: torch.dtype, first: int = 0, part: str = ""
    ) -> torch.Tensor:
        """A file's tensor ``stored``, which is the weight of ``param`` from row ``first`` on (its ``part``) -> what it
        becomes, in ``dtype``."""
        flat = stored.reshape(len(stored), -1)
        out = torch.empty(flat.shape, dtype=dtype)
        makers = [
            (self._maker(adapter, param, first, len(flat), part), share) for adapter, share in self.adapters
        ]
        change = error = 0.0
        for block in _blocks(len(flat), flat.shape[1]):
            old = flat[block].float()
            new = torch.zeros_like(old)
            for make, share in makers:
                made = make(old, block)
                new += made if share == 1 and len(makers) == 1 else share * (made - old)
            if not (len(makers) == 1 and makers[0][1] == 1):
                new += old
            out[block] = new.to(dtype)
            change += float(torch.linalg.vector_norm(new - old)) ** 2
            error += float(torch.linalg.vector_norm(out[block].float() - new)) ** 2
        self.loss.add(name, change, error)
        return out.reshape(stored.shape)

    def bias(
        self, param: str, stored: torch.Tensor, dtype: torch.dtype, first: int = 0, part: str = ""
    ) -> torch.Tensor:
        """The same for a bias [rows]."""
        new = stored.float()
        for adapter, share in self.adapters:
            for pair in _pairs(adapter, param):
                if pair.bias is not None:
                    here, there = _overlap(pair, first, len(stored))
                    new[here] += share * self.in_file_order(pair.bias, param, part)[there]
        return new.to(dtype)

    def has_bias(self, param: str) -> bool:
        """Whether any adapter adds to the bias of ``param``."""
        return any(pair.bias is not None for adapter, _ in self.adapters for pair in _pairs(adapter, param))

    def head_parts(self) -> bool:
        """Whether a head that is one with the embedding is no longer so: what is new of the two is not the same."""
        for adapter, _ in self.adapters:
            embed, head = adapter.weights.embed, adapter.weights.head
            apart = (embed is None) != (head is None) or adapter.weights.embed_pair is not None
            if embed is not None and head is not None:
                apart = apart or not same_rows(embed, head)
            if apart or "lm_head" in adapter.weights.linears:
                return True
        return False

    # ---- one adapter

    def _maker(
        self, adapter: Adapter, param: str, first: int, rows: int, part: str
    ) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """A function from rows of the old weight, float32, and which they are, to the new ones."""
        whole = adapter.replaced.get((param, first))
        if whole is not None:
            fixed = self.in_file_order(whole, param, part).reshape(rows, -1)
            return lambda old, block: fixed[block]
        pairs = []
        for pair in _pairs(adapter, param):
            here, there = _overlap(pair, first, rows)
            if here.stop > here.start and len(pair.a):
                b = self.in_file_order(pair.b, param, part)[there]
                scale = (
                    None if pair.row_scale is None else self.in_file_order(pair.row_scale, param, part)[there]
                )
                pairs.append((here, pair.a, b * pair.scale, scale))
        replaced = _rows(adapter, param)
        embed = adapter.weights.embed_pair if param == "embed_tokens" else None

        def make(old: torch.Tensor, block: slice) -> torch.Tensor:
            new = old if replaced is None else _with_rows(old, replaced, block)
            new = new.clone() if new is old else new
            for here, a, b, scale in pairs:
                low, high = max(here.start, block.start), min(here.stop, block.stop)
                if low < high:
                    at = slice(low - block.start, high - block.start)
                    own = slice(low - here.start, high - here.start)
                    new[at] += b[own] @ a
                    if scale is not None:
                        new[at] *= scale[own].unsqueeze(1)
            if embed is not None:
                new += embed.scale * (embed.a[:, block].t() @ embed.b.t())
            return new

        return make

    def in_file_order(self, tensor: torch.Tensor, param: str, part: str) -> torch.Tensor:
        """Rows in the model's order -> in that of a file, where these differ."""
        order = file_rows(self.config, param, part)
        if order is None:
            return tensor
        return tensor[torch.tensor(order).argsort()]


def _pairs(adapter: Adapter, param: str) -> tuple[LoraPair, ...]:
    return (*adapter.weights.linears.get(param, ()), *adapter.gates.get(param, ()))


def _rows(adapter: Adapter, param: str) -> TokenRows | None:
    return {"embed_tokens": adapter.weights.embed, "lm_head": adapter.weights.head}.get(param)


def _overlap(pair: LoraPair, first: int, rows: int) -> tuple[slice, slice]:
    """Where a pair's rows and those from ``first`` on meet: counted from ``first``, and within the pair."""
    low, high = max(pair.first, first), min(pair.rows.stop, first + rows)
    high = max(low, high)
    return slice(low - first, high - first), slice(low - pair.first, high - pair.first)


def _with_rows(old: torch.Tensor, new: TokenRows, block: slice) -> torch.Tensor:
    if new.ids is None:
        return new.rows[block].clone()
    mine = (new.ids >= block.start) & (new.ids < block.stop)
    made = old.clone()
    made[new.ids[mine] - block.start] = new.rows[mine]
    return made


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def no_bias(param: str, module: str) -> RequestError:
    """What is said where an adapter adds a bias that the network has no place for."""
    return RequestError(
        f"merging a bias into {module}",
        f"{param} of this model has none",
        "Serve the adapter beside the model instead (--adapter).",
    )
