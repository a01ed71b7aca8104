"""The adapters of one engine: by name for those who ask, by the number of their load for steps and cache."""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwenrt.errors import CapacityError, CheckpointError, RequestError
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import AdapterWeights, LoraPair, TokenRows

MAX_RANK = 512
logger = logging.getLogger("qwenrt")


@dataclass(eq=False)
class LoadedAdapter:
    """One load of an adapter. ``number``: no other load ever has it. ``info``: what its reader says of it.
    ``running``: requests in the engine that use it, ``served``: those that have begun with it."""

    name: str
    number: int
    weights: AdapterWeights
    info: Any = None
    running: int = 0
    served: int = 0
    asked: int = 0  # when it was asked for last, in the order of all that are asked for

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        pairs = [pair for pairs in self.weights.linears.values() for pair in pairs]
        return max((pair.a.shape[0] for pair in pairs), default=0)

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        return sum(tensor.nbytes for tensor in self.weights.tensors)


class Adapters:
    """Which adapters are loaded. Any thread may load, unload and look; requests begin and end in the engine's.

    Of more than ``most`` the least recently used one that is idle goes. One that requests still use loses its name at
    once and its memory when the last of them has ended, so nobody waits and nothing is torn. ``serving``: all that
    steps may name, by number. A name that is loaded again has another number: nothing in the cache that was made
    with the old one is ever found for it.
    """

    def __init__(self, model: Qwen, most: int) -> None:
        self._model, self._most = model, most
        self.serving: dict[int, AdapterWeights] = {}
        self._by_name: dict[str, LoadedAdapter] = {}
        self._dropped: dict[str, str] = {}  # names that went -> what came in their place
        self._gone: list[int] = []
        self._numbers, self._turns = itertools.count(1), itertools.count(1)
        self._lock = threading.Lock()

    @property
    def loaded(self) -> dict[str, LoadedAdapter]:
        """By name, in the order of loading."""
        with self._lock:
            return dict(self._by_name)

    def check_name(self, name: object) -> None:
        """Raises RequestError for what is no name, or one in use."""
        fits = isinstance(name, str) and 0 < len(name) <= 128 and name.isprintable() and name == name.strip()
        if not fits:
            found = f"got {name!r:.140}"
            raise RequestError("the name of an adapter", found, "Use 1 to 128 characters that print.")
        with self._lock:
            self._refuse_used(str(name))

    def load(self, name: str, weights: AdapterWeights, info: Any = None) -> LoadedAdapter:
        """Take an adapter in under a name. Raises RequestError for a name that is in use, CheckpointError for weights
        that are not this model's, CapacityError where it does not fit."""
        self.check_name(name)
        weights = self._placed(name, weights)
        with self._lock:
            self._refuse_used(name)
            self._make_room(name)
            loaded = LoadedAdapter(name, next(self._numbers), weights, info, asked=next(self._turns))
            self._by_name[name] = loaded
            self._dropped.pop(name, None)
            self.serving[loaded.number] = weights
        return loaded

    def unload(self, name: str) -> None:
        """Nobody can ask for it any more. Raises RequestError for an unknown name."""
        with self._lock:
            self._forget(self._found(name))

    def find(self, name: object) -> LoadedAdapter:
        """Raises RequestError that lists the names there are."""
        with self._lock:
            loaded = self._found(name)
            loaded.asked = next(self._turns)
            return loaded

    def begin(self, loaded: LoadedAdapter) -> None:
        """A request that was checked while the adapter was loaded is in the engine."""
        with self._lock:
            loaded.running += 1
            loaded.served += 1
            self.serving[loaded.number] = loaded.weights

    def end(self, loaded: LoadedAdapter) -> None:
        """A request with it has ended."""
        with self._lock:
            loaded.running -= 1
            if not loaded.running and self._by_name.get(loaded.name) is not loaded:
                self._free(loaded)

    def take_gone(self) -> list[int]:
        """The numbers that nothing will ask for again, since the last time."""
        if not self._gone:
            return []
        with self._lock:
            gone, self._gone = self._gone, []
        return gone

    # ---- inside

    def _refuse_used(self, name: str) -> None:
        if name in self._by_name:
            raise RequestError(
                f"loading an adapter as {name!r}",
                "an adapter of this name is loaded",
                "Unload it first, or choose another name.",
            )

    def _found(self, name: object) -> LoadedAdapter:
        loaded = self._by_name.get(name) if isinstance(name, str) else None
        if loaded is None:
            names = ", ".join(map(repr, self._by_name)) or "none"
            found = f"loaded: {names}"
            if isinstance(name, str) and name in self._dropped:
                found += f"; this one made room for {self._dropped[name]!r}"
            raise RequestError(f"adapter={name!r:.140}", found, "Load it with load_adapter(path, name=...).")
        return loaded

    def _make_room(self, name: str) -> None:
        while len(self._by_name) >= self._most:
            idle = [loaded for loaded in self._by_name.values() if not loaded.running]
            if not idle:
                raise CapacityError(
                    f"loading the adapter {name!r}",
                    f"{len(self._by_name)} are loaded, and requests use all of them",
                    "Wait for one to end, or load the model with a larger max_adapters.",
                )
            oldest = min(idle, key=lambda loaded: loaded.asked)
            logger.info("adapter %r makes room for %r", oldest.name, name)
            self._forget(oldest)
            self._dropped[oldest.name] = name

    def _forget(self, loaded: LoadedAdapter) -> None:
        del self._by_name[loaded.name]
        if not loaded.running:
            self._free(loaded)

    def _free(self, loaded: LoadedAdapter) -> None:
        self.serving.pop(loaded.number, None)
        self._gone.append(loaded.number)

    def _placed(self, name: str, weights: AdapterWeights) -> AdapterWeights:
        """On the device, pairs in float32, whole rows in the model's dtype; checked, as kernels trust its shapes."""
        self._check(name, weights)
        device, dtype = self._model.backend.device, self._model.dtype
        needed = sum(t.nbytes for t in weights.tensors if t.device != device)
        if needed and needed > (free := self._model.backend.memory()[0]):
            raise CapacityError(
                f"loading the adapter {name!r}",
                f"it takes {needed} bytes, and {free} are free",
                "Unload others, or merge it: qwenrt merge MODEL ADAPTER -o OUT.",
            )

        def placed(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().to(device, torch.float32).contiguous()

        def pair(p: LoraPair) -> LoraPair:
            a, b, row_scale, bias = map(placed, (p.a, p.b.t(), p.row_scale, p.bias))
            assert a is not None and b is not None
            # B's columns are contiguous, as kernels read them
            return LoraPair(a, b.t(), p.scale, p.first, row_scale, bias)

        def rows(changes: TokenRows | None) -> TokenRows | None:
            if changes is None:
                return None
            ids = None if changes.ids is None else changes.ids.to(device)
            return TokenRows(changes.rows.detach().to(device, dtype).contiguous(), ids)

        return replace(
            weights,
            linears={linear: tuple(map(pair, pairs)) for linear, pairs in weights.linears.items()},
            embed=rows(weights.embed),
            head=rows(weights.head),
            embed_pair=None if weights.embed_pair is None else pair(weights.embed_pair),
        )

    def _check(self, name: str, weights: AdapterWeights) -> None:
        specs, (vocab, d) = self._model.linear_specs, self._model.embed_tokens.shape

        def refuse(where: str, found: str) -> CheckpointError:
            return CheckpointError(
                f"the adapter {name!r}", f"{where}: {found}", "It was made for another model."
            )

        for linear, pairs in weights.linears.items():
            spec = specs.get(linear)
            if spec is None:
                raise refuse(linear, "this model has no such linear")
            row = 0
            for pair in pairs:
                _check_pair(pair, spec.in_features, refuse, linear)
                if pair.first < row or pair.rows.stop > spec.out_features:
                    raise refuse(linear, f"rows {pair.first} to {pair.rows.stop - 1} of {spec.out_features}")
                row = pair.rows.stop
        if weights.embed_pair is not None:
            _check_pair(weights.embed_pair, vocab, refuse, "embed_tokens")
        for where, changes in (("embed_tokens", weights.embed), ("lm_head", weights.head)):
            if changes is None:
                continue
            count = vocab if changes.ids is None else len(changes.ids)
            if tuple(changes.rows.shape) != (count, d):
                raise refuse(where, f"rows of shape {list(changes.rows.shape)} for {count} tokens of {d}")
            if changes.ids is not None and count:
                ids = changes.ids.tolist()
                if ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= vocab:
                    raise refuse(where, f"token ids that do not rise from 0 to {vocab - 1}")


def _check_pair(pair: LoraPair, inputs: int, refuse: Any, where: str) -> None:
    (rank, columns), (rows, inner) = pair.a.shape, pair.b.shape
    if columns != inputs or inner != rank:
        raise refuse(
            where, f"A {list(pair.a.shape)} and B {list(pair.b.shape)}, where there are {inputs} inputs"
        )
    if rank > MAX_RANK:
        raise CapacityError(
            f"an adapter of rank {rank}",
            f"ranks up to {MAX_RANK} are served",
            "Merge it: qwenrt merge MODEL ADAPTER -o OUT.",
        )
    for own in (pair.row_scale, pair.bias):
        if own is not None and tuple(own.shape) != (rows,):
            raise refuse(where, f"{list(own.shape)} factors or biases for {rows} rows")
