"""What goes wrong in a computation, as an error that says what to do."""

from __future__ import annotations

import torch

from qwenrt.backends.base import Backend
from qwenrt.errors import BackendError, CapacityError, QwenrtError


def typed(error: Exception, asked: str, backend: Backend) -> QwenrtError:
    """The error itself where it is one of ours; ``asked``: what was being computed, by ``backend``."""
    if isinstance(error, QwenrtError):
        return error
    found = f"{type(error).__name__}: {str(error)[:300]}"
    known = backend.meaning(str(error))
    if known is not None:
        kind, remedy = known
        return kind(asked, found, remedy)
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "out of memory" in found.lower() or "can't allocate memory" in found.lower():
        remedy = 'Lower max_num_batched_tokens or max_num_seqs, or set kv_cache_dtype="int8".'
        return CapacityError(asked, found, remedy)
    return BackendError(asked, found, 'If it happens again, load with device="cpu" to compare.')
