"""qwenrt: run every Qwen on every device. `import qwenrt` is quick and imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qwenrt.errors import (
        BackendError as BackendError,
    )
    from qwenrt.errors import (
        CapacityError as CapacityError,
    )
    from qwenrt.errors import (
        CheckpointError as CheckpointError,
    )
    from qwenrt.errors import (
        ConfigError as ConfigError,
    )
    from qwenrt.errors import (
        QwenrtError as QwenrtError,
    )
    from qwenrt.errors import (
        RequestError as RequestError,
    )
    from qwenrt.finetune import finetune as finetune
    from qwenrt.llm import LLM as LLM
    from qwenrt.load_options import Activations as Activations
    from qwenrt.load_options import DType as DType
    from qwenrt.load_options import Fallback as Fallback
    from qwenrt.load_options import KVCacheDType as KVCacheDType
    from qwenrt.load_options import LoadOptions as LoadOptions
    from qwenrt.load_options import Quantize as Quantize
    from qwenrt.load_options import Source as Source
    from qwenrt.loading import load as load
    from qwenrt.loading import load_tokenizer as load_tokenizer
    from qwenrt.merging import merge as merge
    from qwenrt.outputs import Delta as Delta
    from qwenrt.outputs import FinishReason as FinishReason
    from qwenrt.outputs import Generation as Generation
    from qwenrt.outputs import Usage as Usage
    from qwenrt.quantize import quantize as quantize
    from qwenrt.sampling_params import SamplingParams as SamplingParams
    from qwenrt.structure import Grammar as Grammar
    from qwenrt.text.tokenizer.tokenizer import Tokenizer as Tokenizer

# name -> module that has it; looked up on first use so that importing the package stays cheap
_LAZY = {
    "load": "qwenrt.loading",
    "LLM": "qwenrt.llm",
    "merge": "qwenrt.merging",
    "load_tokenizer": "qwenrt.loading",
    "Tokenizer": "qwenrt.text.tokenizer.tokenizer",
    "LoadOptions": "qwenrt.load_options",
    "SamplingParams": "qwenrt.sampling_params",
    "Grammar": "qwenrt.structure",
    "Generation": "qwenrt.outputs",
    "Delta": "qwenrt.outputs",
    "Usage": "qwenrt.outputs",
    "QwenrtError": "qwenrt.errors",
    "ConfigError": "qwenrt.errors",
    "CheckpointError": "qwenrt.errors",
    "BackendError": "qwenrt.errors",
    "RequestError": "qwenrt.errors",
    "CapacityError": "qwenrt.errors",
    **dict.fromkeys(  # Literal types: what an option may be
        ("Activations", "DType", "Fallback", "KVCacheDType", "Quantize", "Source"), "qwenrt.load_options"
    ),
    "FinishReason": "qwenrt.outputs",
}
# packages, which are called as the functions of their names (qwenrt/called.py)
_CALLED = ("finetune", "quantize")
__all__ = ["__version__", *_LAZY, *_CALLED]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in (*_CALLED, "server"):  # so that qwenrt.server.app(llm) needs no import of its own
        return importlib.import_module(f"qwenrt.{name}")
    from qwenrt.other_names import unknown_attribute

    raise unknown_attribute("module 'qwenrt'", name)


def __dir__() -> list[str]:
    return sorted(__all__)
