"""What is said about a loaded model: the line at load, and the table of `LLM.explain`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from qwenrt.backends.base import Backend
from qwenrt.engine.adapters import LoadedAdapter
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed


def line(name: str, backend: Backend, model: Qwen, *, cache: str, context: int, load_s: float) -> str:
    """The one line that says what serves. ``cache``: the dtype of the cache of keys and values; ``context``: in tokens;
    ``load_s``: seconds that loading took."""
    dtype = _name(model.dtype)
    rounded = activations(roundings(backend, model), dtype)
    said = [
        f"{_weights(model)} weights ({_size(model.weight_bytes)}{_beside(model)})",
        f"computed in {dtype}",
        *([f"activations {rounded}"] if rounded else []),
        f"{cache} cache",
        f"context of {context} tokens",
        f"loaded in {load_s:.1f} s",
    ]
    return f"{name} on {backend.name} ({backend.describe()}): {', '.join(said)}"


def table(backend: Backend, model: Qwen) -> list[str]:
    """Lines: operation, form of the weights, what serves it in how many places, and why or with which note; what there
    is to say of stacks; then bytes by form."""
    forms = {"parts": "several forms"} | {piece.kind: _form(piece) for piece in _pieces(model)}
    rows: dict[tuple[str, str, str, str], int] = {}
    for b in backend.bindings:
        key = (b.op, forms.get(b.kind, b.kind), backend.name if b.native else "plain torch", b.why)
        rows[key] = rows.get(key, 0) + 1
    width = max(len(form) for form in ["weights", *(form for _, form, _, _ in rows)])
    lines = [f"{'operation':<16} {'weights':<{width}} {'served by':<12} places  note"]
    lines += [
        f"{op:<16} {form:<{width}} {served:<12} {count:>6}  {note}".rstrip()
        for (op, form, served, note), count in sorted(rows.items())
    ]
    stacks = [stack for held in backend.serving if (stack := held()) is not None]
    lines += [note for stack in stacks if (note := stack.note())]
    sizes: dict[str, int] = {}
    for piece in _pieces(model):
        sizes[_form(piece)] = sizes.get(_form(piece), 0) + piece.nbytes
    return lines + [f"{form} weights: {_size(nbytes)}" for form, nbytes in sizes.items()]


def adapters(loaded: Mapping[str, LoadedAdapter]) -> list[str]:
    """A line for each: its rank, what it changes, bytes, digest, and how many requests have had it."""
    lines = []
    for name, one in loaded.items():
        info = one.info
        said = [f"rank {one.rank}"]
        if info is not None:
            changed = ", ".join((*info.targets, *(f"rows of {module}" for module in info.whole)))
            said += [f"changes {changed or 'nothing'}", f"digest {info.digest[:12]}"]
        said += [_size(one.nbytes), f"{one.served} requests"]
        lines.append(f"adapter {name}: {'; '.join(said)}")
    return lines


def roundings(backend: Backend, model: Qwen) -> list[str]:
    """What the inputs of linears are rounded to, "exact" where some are not: ["exact", "int16"]; [] where the backend
    rounds none."""
    return sorted({backend.activations_of(piece) for piece in _pieces(model)} - {""})


def activations(roundings: Sequence[str], dtype: str) -> str:
    """["exact", "int16"] -> "int16 (float32 in small layers)"; "" where the backend rounds none."""
    to = " and ".join(kind for kind in roundings if kind != "exact")
    if not to:
        return dtype if roundings else ""
    return f"{to} ({dtype} in small layers)" if "exact" in roundings else to


def _pieces(model: Qwen) -> Iterator[Packed]:
    """All linears; one whose parts are stored in several forms part by part."""
    for linear in model.linears():
        yield from linear.data.get("parts", [linear])


def _form(piece: Packed) -> str:
    """What a weight is stored as, in words that stand in config files too: "int4", "bfloat16"."""
    if piece.bits < 16:
        return f"int{piece.bits}"
    weight = piece.data.get("weight")
    if isinstance(weight, torch.Tensor):
        return _name(weight.dtype)
    return {"dense12": "bfloat16 in 12 bits"}.get(piece.kind, piece.kind)


def _weights(model: Qwen) -> str:
    forms = " and ".join(sorted({_form(piece) for piece in _pieces(model)}))
    quant = model.config.quant
    return f"{forms} (from FP8)" if quant is not None and quant.method == "fp8" else forms


def _beside(model: Qwen) -> str:
    """A tied output layer that was rounded is in memory twice."""
    if not model.config.tie_word_embeddings or model.lm_head.bits == 16:
        return ""
    kept = _size(model.embed_tokens.nbytes)
    return f", of which {kept} are the embedding, kept beside the rounded output layer"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"
