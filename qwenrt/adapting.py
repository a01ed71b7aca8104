"""What a loaded model does with LoRA adapters: load them, list them, unload them; requests then ask for one by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from os import PathLike
from typing import TYPE_CHECKING

from qwenrt.errors import RequestError, memory_errors, shown
from qwenrt.files import expanded

if TYPE_CHECKING:
    from qwenrt.assembly import Assembled
    from qwenrt.loader.adapters import AdapterInfo


class Adaptable(ABC):
    """The part of an `LLM` that has adapters."""

    @abstractmethod
    def _alive(self) -> Assembled:
        """The model with its engine. RequestError where it was closed."""

    def load_adapter(
        self,
        path: str | PathLike[str],
        name: str | None = None,
        *,
        strict: bool = False,
        moe_layout: str | None = None,
    ) -> str:
        """Load the LoRA adapter in a directory as peft writes it -> its name, for ``adapter=`` of a request.

        Requests that are running go on meanwhile. ``name``: the directory's own if not given. ``strict``: refuse an
        adapter that lacks what its config lists, which else is a warning. ``moe_layout``: "out_in" or "in_out", where
        tensors for all experts can be read in two ways. Beyond ``max_adapters`` the one that was used least lately and
        is idle goes. Raises CheckpointError or ConfigError for files that are not this model's adapter, RequestError
        for a name that is in use, CapacityError where it does not fit.
        """
        from qwenrt.loader.adapters import read_adapter

        alive, asked = self._alive(), f"loading the adapter {shown(path)}"
        if not isinstance(path, (str, PathLike)):
            raise RequestError(asked, f"got {type(path).__name__}", "Pass the path of its directory.")
        directory = expanded(path, RequestError, asked=asked)
        name = directory.absolute().name if name is None else name
        adapters = alive.engine.adapters
        adapters.check_name(name)  # before anything is read
        with memory_errors(asked):
            weights, info = read_adapter(
                directory,
                alive.model.config,
                base=alive.base,
                device=alive.backend.device,
                strict=strict,
                moe_layout=moe_layout,
            )
            return adapters.load(name, weights, info).name

    def unload_adapter(self, name: str) -> None:
        """Let an adapter go: nobody can ask for it any more; requests that use it end as they began. RequestError for
        an unknown name."""
        self._alive().engine.unload_adapter(name)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, by name."""
        return {name: one.info for name, one in self._alive().engine.adapters.loaded.items()}
