"""torch's own threads, which do not survive a fork: GNU's OpenMP waits for them in the child, for ever."""

from __future__ import annotations

import functools
import os
import sys

import torch

_in_child = False


def use(wanted: int | None) -> int:
    """Give torch ``wanted`` threads, None leaves them as they are -> how many threads it stands for.

    From the first call on, a forked child's torch computes on one thread, whatever is asked for; that says nothing
    about other threads there, so it stands for any number.
    """
    _watch_forks()
    if _in_child:
        return sys.maxsize
    if wanted is not None:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_stay_alone)


def _stay_alone() -> None:
    global _in_child
    _in_child = True
    torch.set_num_threads(1)
