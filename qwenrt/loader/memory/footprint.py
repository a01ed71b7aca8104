"""Bytes a model takes, from its config alone: weights, cache, and what loading and computing need besides.

Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from qwenrt.config import ModelConfig, QuantConfig
from qwenrt.config.layers import (
    BLOCK_SIZE,
    is_wide,
    kinds_of_layers,
    kv_bytes_per_token,
    layer_linears,
    layer_tensors,
    least_state_bytes,
    mtp_linears,
    mtp_tensors,
    state_bytes,
)
from qwenrt.config.quant import ROUNDED
from qwenrt.errors import ConfigError
from qwenrt.ops.stored import WORD_BITS, num_groups

GIB = 2**30
BATCH_TOKENS = 512  # computed in one step, unless the user says otherwise
_ROWS = 8  # output rows the kernels' layout stores together
_CHUNK, _WORTH_TWELVE = (
    64,
    1 << 20,
)  # inputs whose 12 bits lie together; weights from which on they are kept so
_PADDING_WORTH = 1.25  # groups that fill their words worse than this stay in plain torch's layout
_UNPACKING = (
    14  # bytes an element of plain torch's dequantisation at its peak: int16, and three times float32
)
_SAMPLING = 28  # bytes an entry of a row of logits: sorted, exponentiated and summed in float64
_GATHERED = 1024  # tokens of each sequence whose keys a captured step looks at together
_FIXED = 48 * 2**20  # the engine, the tokenizer, and the libraries' own buffers


@dataclass(frozen=True)
class Storage:
    """How a device keeps a model, in bytes of an element.

    ``activation``: also of norms, routers and, in most places, biases. ``dense``: of weights without codes and of the
    embedding. ``stored``: of dense weights in the file. ``kernels``: integer codes are in the layout of the CPU's
    kernels and multiplied as they are; elsewhere plain torch makes a matrix of a linear's codes for every product.
    ``dense_codes``: no code is kept, each becomes an element of a dense matrix. ``least_bits``: what a code takes at
    least. ``on_host``: what reading and rounding the file takes comes out of the same memory. ``captured``: steps that
    decode work in memory of their own, which they keep. ``twelve``: dense linears of many bfloat16 weights take 12 bits
    each, as the CPU's kernels keep all but the few whose exponents are far from the others'.
    """

    activation: int
    dense: int
    stored: int = 2
    kernels: bool = False
    on_host: bool = False
    dense_codes: bool = False
    least_bits: int = 4
    captured: bool = False
    twelve: bool = False


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes a model takes: its weights, the cache for the tokens asked for, and what computing needs besides."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


class Linear(NamedTuple):
    """``number`` equal linears [rows, columns]; ``part``: rows of the largest of the file's tensors one is merged
    from, 0 where it is a single tensor. Where it is not ``quantizable``, it is dense beside codes."""

    number: int
    rows: int
    columns: int
    bias: bool
    part: int
    quantizable: bool = True


@cache
def linears(config: ModelConfig) -> tuple[Linear, ...]:
    """Every linear of the layers, those of a head that guesses among them; the model's head is not."""
    found: Counter[tuple[int, int, bool, int, bool]] = Counter()
    counted = [(layer_linears(config, layer), layers) for layer, layers in kinds_of_layers(config)]
    for specs, layers in (*counted, (mtp_linears(config), 1)):
        for spec in specs:
            part = max(rows for _, rows in spec.parts) if len(spec.parts) > 1 else 0
            found[spec.out_features, spec.in_features, spec.bias, part, spec.quantizable] += layers
    return tuple(Linear(number, *shape) for shape, number in found.items())


def other_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of all that is neither linear nor embedding, as norms and routers, in elements of ``itemsize`` but for what
    is always float32."""

    def taken(tensors: dict[str, tuple[int, ...]]) -> int:
        return sum(
            math.prod(shape) * (4 if is_wide(config, name) else itemsize) for name, shape in tensors.items()
        )

    layers = (layers * taken(layer_tensors(config, layer)) for layer, layers in kinds_of_layers(config))
    return sum(layers) + taken(mtp_tensors(config)) + taken({"norm": (config.hidden_size,)})


def codes_of(config: ModelConfig, quantize: str | None) -> QuantConfig | None:
    """The integer codes linears are served from: the checkpoint's own, what ``quantize`` rounds to, or None.

    Raises ConfigError where the two contradict each other.
    """
    if quantize is not None and quantize not in ROUNDED:
        raise ConfigError(f"quantize={quantize!r}", "not a known way", 'Use None, "int8" or "int4".')
    if config.quant is not None and config.quant.has_codes:
        if quantize is not None and ROUNDED[quantize].bits != config.quant.bits:
            raise ConfigError(
                f"quantize={quantize!r}",
                f"the checkpoint is already quantised to {config.quant.bits} bits",
                "Load it without quantize, or load the model's dense release.",
            )
        return config.quant
    if quantize is None:
        return None
    form = ROUNDED[quantize]
    if quantize == "int8" and config.quant is not None and config.quant.block is not None:
        return replace(form, group_size=config.quant.block[1])
    return form


def forms_of(config: ModelConfig) -> list[tuple[int, int]]:
    """(bits, group size) of every kind of codes that the checkpoint's linears have, those of the most weights first."""
    quant = config.quant
    if quant is None or not quant.has_codes:
        return []
    weights = Counter(
        {
            (quant.bits, quant.group_size): sum(
                n * rows * k for n, rows, k, *_, coded in linears(config) if coded
            )
        }
    )
    for rows, columns, bits, group_size, number, _ in quant.corrections:
        if bits < 16:
            weights[bits, group_size] += number * rows * columns
    return [form for form, count in weights.most_common() if count > 0]


def dense_bytes(rows: int, columns: int, storage: Storage) -> int:
    """A matrix without codes once it is packed."""
    if not _in_twelve_bits(rows, columns, storage):
        return rows * columns * storage.dense
    return rows * -(-columns // _CHUNK) * _CHUNK * 12 // 8 + 4 * (rows + 1)


def _in_twelve_bits(rows: int, columns: int, storage: Storage) -> bool:
    return storage.twelve and rows * columns >= _WORTH_TWELVE


def linear_bytes(linear: Linear, storage: Storage, quant: QuantConfig | None) -> int:
    """One of these linears once it is packed, its bias included."""
    _, rows, columns, has_bias, _, quantizable = linear
    if quant is None or not quantizable:
        return dense_bytes(rows, columns, storage) + has_bias * rows * storage.activation
    group = columns if quant.group_size == -1 else min(quant.group_size, columns)
    groups = num_groups(columns, quant.group_size)
    words = -(-group * quant.bits // WORD_BITS)  # the kernels' layout starts every group of codes at a word
    order = 4 * columns if quant.desc_act else 0
    if storage.kernels and words * WORD_BITS <= group * quant.bits * _PADDING_WORTH:
        separate_zeros = not (quant.sym or quant.zeros_in_scales)
        beside = quant.group_bytes or 2 + (2 if separate_zeros else 0)  # a float16 scale, an int16 zero
        per_group = 4 * words + beside
        return -(-rows // _ROWS) * _ROWS * groups * per_group + order + has_bias * rows * 4
    codes = rows * -(-columns * max(quant.bits, storage.least_bits) // 8)
    return (
        codes + groups * rows * ((quant.group_bytes or 2) + 2) + order + has_bias * rows * storage.activation
    )


def weight_bytes(config: ModelConfig, storage: Storage, quantize: str | None = None) -> int:
    """All weights once they are packed. Routers, norms and the embedding are never in codes, the head where the file
    has it so."""
    quant = None if storage.dense_codes else codes_of(config, quantize)
    layers = sum(linear.number * linear_bytes(linear, storage, quant) for linear in linears(config))
    for rows, columns, bits, group_size, number, group_bytes in (
        quant.corrections if quant is not None else ()
    ):
        form = None
        if quant is not None and bits < 16:
            form = replace(quant, bits=bits, group_size=group_size, group_bytes=group_bytes)
        layers += number * linear_bytes(Linear(number, rows, columns, False, 0), storage, form)
    vocabulary = config.vocab_size * config.hidden_size * storage.dense
    head = 0 if config.tie_word_embeddings else dense_bytes(config.vocab_size, config.hidden_size, storage)
    return layers + vocabulary + head + other_bytes(config, storage.activation)


def cache_bytes(config: ModelConfig, tokens: int, dtype_bytes: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of the KV cache for ``tokens``."""
    heads = (config.num_paged_layers, config.num_kv_heads, config.head_dim)
    return tokens * kv_bytes_per_token(*heads, dtype_bytes, kv_cache_dtype == "int8")


def memory_need(
    config: ModelConfig,
    storage: Storage,
    context: int,
    *,
    users: int = 1,
    sequences: int | None = None,
    quantize: str | None = None,
    kv_cache_dtype: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    draft_tokens: int = 0,
) -> MemoryNeed:
    """What loading the model and serving ``users`` sequences of ``context`` tokens each take.

    ``sequences``: that may run together, each of which has a state where the model has layers of linear attention;
    ``users`` unless given. ``batch_tokens``: computed in one step; ``draft_tokens``: that are guessed for each
    sequence, if the config has the head that guesses. The workspace is what a step needs beside weights
    and cache or, if that is more, what loading needs beside the weights while there is no cache yet.
    """
    tokens = users * -(-context // BLOCK_SIZE) * BLOCK_SIZE
    cache = cache_bytes(config, tokens, storage.activation, kv_cache_dtype)
    running = max(users, sequences or 0)
    cache += least_state_bytes(config, storage.activation, running, draft_tokens)
    at_once = min(max(batch_tokens, users), users * context)
    quant = None if storage.dense_codes else codes_of(config, quantize)
    step = _step_peak(config, storage, quant, at_once, context, users, kv_cache_dtype)
    step += _captured(config, context, users, running) if storage.captured else 0
    load = _load_peak(config, storage, quantize) if storage.on_host else 0
    return MemoryNeed(weight_bytes(config, storage, quantize), cache, max(step, load - cache) + _FIXED)


# ---- a step


def _step_peak(
    config: ModelConfig,
    storage: Storage,
    quant: QuantConfig | None,
    tokens: int,
    context: int,
    users: int,
    kv_cache_dtype: str,
) -> int:
    """The most that exists at once in a step of ``tokens`` tokens: within attention, within an MLP, or as logits.

    Counted in the order a layer computes: the residual x [T, D], q, k and v as they come and once more rotated.
    """
    a, d = storage.activation, config.hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projected = d + (q + 2 * kv)
    rotated = projected + (q + kv)
    # Rotation is computed in float32: the turned half, two products, their sum, and a copy of what is 16 bits.
    rotation = tokens * (projected * a + (q + kv) * (16 if a == 4 else 20 + a * config.qk_norm))
    attention = tokens * a * (rotated + 2 * q)
    attention += _context_peak(config, storage, tokens, context, users, kv_cache_dtype)
    delta = config.linear_attention
    if delta is not None:
        # Its inputs, then float32 queries and keys of every value head, values, what is read.
        inside = delta.channels + delta.values + 3 * delta.num_value_heads * (delta.key_dim + delta.value_dim)
        attention = max(attention, tokens * (a * projected + 4 * inside) + state_bytes(config, 4))
    held = tokens * a * (rotated + q + d)
    mlp = held + tokens * _mlp_width(config, storage, quant)
    if quant is not None and not storage.kernels:  # the codes of 4 bits are spread to bytes first
        per_element = _UNPACKING + (1 if quant.bits == 4 else 0)
        largest = max(linear.rows * linear.columns for linear in linears(config))
        mlp = max(mlp, held + tokens * a * 2 * config.intermediate_size + per_element * largest)
    drawn_together = 1 if storage.on_host else users
    head = tokens * a * 2 * d + config.vocab_size * (users * (4 + a % 4) + drawn_together * _SAMPLING)
    length = 1 << (context - 1).bit_length()
    tables = 2 * length * config.rotary_dim * 4  # cos and sin
    return tables + max(rotation, attention, mlp, head, tables)


def _mlp_width(config: ModelConfig, storage: Storage, quant: QuantConfig | None) -> int:
    """Bytes a token takes within the widest MLP: gate and up, silu of the gate, the product."""
    a, d = storage.activation, config.hidden_size

    def inside(width: int) -> int:
        gate_up = 2 * width * a
        if quant is not None and storage.kernels and a != 4:  # these kernels take and give float32
            return max(gate_up + 4 * (2 * width + d), 2 * gate_up)
        return 2 * gate_up

    widest = inside(config.intermediate_size) if config.num_moe_layers < config.num_layers else 0
    if config.moe is not None and config.num_moe_layers:
        width = max(config.moe.intermediate_size, config.moe.shared_intermediate_size)
        # The normed input, the sum so far, the rows an expert takes; then its output weighted, and the new sum.
        widest = max(widest, 3 * d * a + max(inside(width), 2 * d * a))
    return max(widest, 2 * d * a)


def _context_peak(
    config: ModelConfig, storage: Storage, tokens: int, context: int, users: int, kv_cache_dtype: str
) -> int:
    """Copies plain torch makes of one sequence's keys and values, and the mask of a prompt's later chunks.

    Keys and values are gathered from scattered blocks or turned back from int8, repeated for every query head that
    shares them, and for a single query in 16 bits brought to float32.
    """
    a, keys = storage.activation, context * config.num_kv_heads * config.head_dim
    repeated = context * config.num_heads * config.head_dim
    fetched = 0 if users == 1 and kv_cache_dtype == "auto" else 2 * a * keys
    unpacking = (8 - a) * keys if kv_cache_dtype == "int8" else 0  # float32, twice, while the second is made
    copies = 2 * a * repeated if config.num_kv_heads < config.num_heads else 0
    decode = (4 * repeated if a != 4 else 0) + 8 * config.num_heads * context  # scores, and their softmax
    chunk = min(tokens, context)
    mask = chunk * context * (2 + a) if chunk < context else 0  # bool, its complement, and the sum's summand
    return fetched + max(unpacking, copies + max(decode, mask))


def _captured(config: ModelConfig, context: int, users: int, sequences: int) -> int:
    """What captured steps keep: logits of every row and the rotary rows of every position, which do not move; and what
    they work in for ``users``: a share of keys and values as they are gathered, brought to float32 and masked, scores,
    draws. What the driver keeps of the graphs themselves is not known."""
    alphas = 1
    if config.use_dynamic_ntk and context > config.train_length:
        alphas += (-(-context // config.train_length) - 1).bit_length()
    kept = sequences * config.vocab_size * 4 + alphas * 2 * context * config.rotary_dim * 4
    share = min(context, _GATHERED) * config.num_kv_heads * config.head_dim
    attention = 12 * share + 12 * config.num_heads * context
    return kept + users * max(attention, config.vocab_size * (4 + _SAMPLING))


# ---- loading


def _load_peak(config: ModelConfig, storage: Storage, quantize: str | None) -> int:
    """The most that loading holds beside all weights. The head comes last: its bytes are still free before that."""
    vocabulary = config.vocab_size * config.hidden_size
    shape = config.vocab_size, config.hidden_size
    head = 0 if config.tie_word_embeddings else dense_bytes(*shape, storage)
    made_anew = storage.dense != storage.stored or _in_twelve_bits(*shape, storage)
    converted = made_anew and not config.tie_word_embeddings
    layers = max(_packing(linear, config, storage, quantize) for linear in linears(config))
    return max(layers - head, vocabulary * storage.stored if converted else 0)


def _packing(linear: Linear, config: ModelConfig, storage: Storage, quantize: str | None) -> int:
    """What exists beside the packed linear while it is made: tensors of the file, the merged matrix, one byte for
    each code."""
    whole, part = linear.rows * linear.columns, linear.part * linear.columns
    stored = storage.stored
    made_anew = storage.dense != stored or _in_twelve_bits(linear.rows, linear.columns, storage)
    if not linear.quantizable:
        return stored * (max(part, whole) if made_anew else part)
    if config.quant is not None and config.quant.has_codes:
        return whole * (2 * 8 + config.quant.bits) // 8  # the codes of the parts, and merged
    if config.quant is None:
        if quantize is not None:
            return max(stored * (whole + part), (stored + 1) * whole)
        return stored * (max(part, whole) if made_anew else part)
    if quantize == "int8":
        return 2 * whole
    wide = 4 if quantize is not None else storage.dense  # what a part of FP8 becomes
    merged = wide * whole if quantize is not None else 0
    return max(merged + (wide + 1) * part, merged + whole)
