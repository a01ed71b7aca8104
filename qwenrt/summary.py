"""What is said about a loaded model: the line at load, and the table of `LLM.explain`."""

from __future__ import annotations

from collections.abc import Iterator

from qwenrt.backends.base import Backend
from qwenrt.model.qwen import Qwen
from qwenrt.ops.types import Packed


def line(
    name: str, backend: Backend, model: Qwen, *, rounded: str, cache: str, context: int, load_s: float
) -> str:
    """The one line that says what serves. ``rounded``: what inputs of linears are rounded to ("exact+int16");
    ``cache``: the dtype of the cache of keys and values."""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{name}: {backend.name} ({backend.describe()}), {dtype}, {_weights(model)}, "
        f"{_activations(rounded, dtype)}{cache} cache, context {context} tokens, loaded in {load_s:.1f} s"
    )


def table(backend: Backend, model: Qwen) -> list[str]:
    """Lines: op, kind of weight, what serves it in how many places, and why or with which note; then bytes by kind,
    those of linears in parts by the kind of each part."""
    rows: dict[tuple[str, str, str, str], int] = {}
    for b in backend.bindings:
        key = (b.op, b.kind, backend.name if b.native else "plain torch", b.why)
        rows[key] = rows.get(key, 0) + 1
    width = max(len(kind) for kind in ["weights", *(kind for _, kind, _, _ in rows)])
    lines = [f"{'op':<16} {'weights':<{width}} {'served by':<12} places  note"]
    lines += [
        f"{op:<16} {kind:<{width}} {served:<12} {count:>6}  {note}".rstrip()
        for (op, kind, served, note), count in sorted(rows.items())
    ]
    sizes: dict[str, int] = {}
    for piece in _pieces(model):
        sizes[piece.kind] = sizes.get(piece.kind, 0) + piece.nbytes
    return lines + [f"{kind} weights: {_size(nbytes)}" for kind, nbytes in sizes.items()]


def _pieces(model: Qwen) -> Iterator[Packed]:
    """Every linear, or its parts where they have several forms."""
    for linear in model.linears():
        yield from linear.data.get("parts", [linear])


def _weights(model: Qwen) -> str:
    config = model.config
    bits = {piece.bits for piece in _pieces(model)}
    kinds = "+".join(f"int{b}" if b < 16 else "dense" for b in sorted(bits))
    if config.quant is not None and config.quant.method == "fp8":
        kinds += " (from FP8)"
    both = ""
    if config.tie_word_embeddings and model.lm_head.bits < 16:
        kept = _size(model.embed_tokens.nbytes)
        both = f" (the embedding, {kept}, is kept beside the rounded output layer)"
    return f"{kinds} weights {_size(model.weight_bytes)}{both}"


def _activations(rounded: str, dtype: str) -> str:
    """ "exact+int16" -> "activations int16 (float32 in small layers), "; nothing where no backend rounds any."""
    kinds = rounded.split("+") if rounded else []
    to = " and ".join(kind for kind in kinds if kind != "exact")
    if not to:
        return f"activations {dtype}, " if kinds else ""
    return f"activations {to}{f' ({dtype} in small layers)' if 'exact' in kinds else ''}, "


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"
