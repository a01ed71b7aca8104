"""Packages that are called by their own names: qwenrt.finetune(...) is qwenrt.finetune.finetune(...)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Called(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])


def as_function(package: str) -> None:
    """Make a package callable as the function in it that has its name. Python lets a module be given a class of its
    own for such things (The Python Language Reference, "Customizing module attribute access")."""
    sys.modules[package].__class__ = _Called
