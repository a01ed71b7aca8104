"""What is said about a loaded model: the line at load, and the table of `LLM.explain`."""

from __future__ import annotations

from collections.abc import Sequence

from qwenrt.backends.base import Backend
from qwenrt.model.qwen import Qwen


def line(name: str, backend: Backend, model: Qwen, *, cache: str, context: int, load_s: float) -> str:
    """The one line that says what serves. ``cache``: the dtype of the cache of keys and values; ``context``: in tokens;
    ``load_s``: seconds that loading took."""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{name}: {backend.name} ({backend.describe()}), {dtype}, {_weights(model)}, "
        f"{activations(roundings(backend, model), dtype)}{cache} cache, context {context} tokens, "
        f"loaded in {load_s:.1f} s"
    )


def roundings(backend: Backend, model: Qwen) -> list[str]:
    """What the inputs of linears are rounded to, "exact" where some are not: ["exact", "int16"]; [] where the backend
    rounds none."""
    pieces = (piece for linear in model.linears() for piece in linear.data.get("parts", [linear]))
    return sorted({backend.activations_of(piece) for piece in pieces} - {""})


def table(backend: Backend, model: Qwen) -> list[str]:
    """Lines: op, kind of weight, what serves it in how many places, and why or with which note; then bytes by kind."""
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
    for packed in model.linears():
        sizes[packed.kind] = sizes.get(packed.kind, 0) + packed.nbytes
    return lines + [f"{kind} weights: {nbytes / 2**20:.1f} MiB" for kind, nbytes in sizes.items()]


def _weights(model: Qwen) -> str:
    config = model.config
    bits = {packed.bits for linear in model.linears() for packed in linear.data.get("parts", [linear])}
    kinds = "+".join(f"int{b}" if b < 16 else "dense" for b in sorted(bits))
    if config.quant is not None and config.quant.method == "fp8":
        kinds += " (from FP8)"
    both = ""
    if config.tie_word_embeddings and model.lm_head.bits < 16:
        kept = _size(model.embed_tokens.nbytes)
        both = f" (the embedding, {kept}, is kept beside the rounded output layer)"
    return f"{kinds} weights {_size(model.weight_bytes)}{both}"


def activations(roundings: Sequence[str], dtype: str) -> str:
    """["exact", "int16"] -> "activations int16 (float32 in small layers), "; "" where the backend rounds none."""
    to = " and ".join(kind for kind in roundings if kind != "exact")
    if not to:
        return f"activations {dtype}, " if roundings else ""
    return f"activations {to}{f' ({dtype} in small layers)' if 'exact' in roundings else ''}, "


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MiB"
