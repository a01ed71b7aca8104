"""Byte-level vocabularies with a list of merges, turned into ranks that give the same ids.

A list of merges is applied to a piece of text so: of all neighbours that form a listed pair, join the pair listed
first, leftmost if it occurs twice; repeat. The encoder knows no pairs: of all neighbours whose bytes together are a
token it joins those whose token has the lowest id. The two agree on every text if (1) the tokens that the
list produces have rising ids and (2) the encoder knows only tokens that the list makes out of their own bytes.

Proof. The pairs of the list are candidates of the encoder too, in the same order by (1), so at the first
difference the encoder joins x and y to a token u although the list has no pair (x, y). Nothing was joined across
the ends of u before, and within u each step was the first choice there; so the list, given the bytes of u alone,
comes to x, y as well, where it stops and does not make u. That contradicts (2). By the same argument a token that
the list does not make out of its own bytes is never made of any text: leaving it out of the ranks loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qwenrt.errors import ConfigError
from qwenrt.text.tokenizer.vocabulary import FETCH_ALL_AGAIN, MAX_TOKEN_ID

# of all forms together, which bounds the time of the check; the released ones have 1 million
MAX_VOCAB_CHARS = 2**23
_ID_BITS = MAX_TOKEN_ID.bit_length()


def _forms_of_bytes() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable Latin-1 as itself, the others from U+0100 upwards in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


FORMS_OF_BYTES = _forms_of_bytes()
_BYTES_OF_FORMS = {ord(form): byte for byte, form in enumerate(FORMS_OF_BYTES)}
_ALL_FORMS = frozenset(FORMS_OF_BYTES)


def is_byte_level(form: str) -> bool:
    """Whether a string consists of characters that stand for bytes."""
    return bool(form) and _ALL_FORMS.issuperset(form)


def to_bytes(form: str) -> bytes:
    """The bytes of a token's byte-level form."""
    return form.translate(_BYTES_OF_FORMS).encode("latin-1")


def check_ids(vocab: Mapping[str, object], where: str) -> dict[str, int]:
    """The vocabulary if its ids are integers in range, each used once."""
    ids: dict[int, str] = {}
    for form, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise _bad(f"{where}, {_shown(form)}", f"id {token_id!r:.40} is not 0 to {MAX_TOKEN_ID}")
        other = ids.setdefault(token_id, form)
        if other is not form:
            raise _bad(f"{where}, {_shown(form)}", f"id {token_id} belongs to {_shown(other)} already")
    return {form: token_id for token_id, form in ids.items()}


def check_forms(vocab: Mapping[str, int], where: str) -> None:
    """Refuse forms that are not byte-level, and a vocabulary that cannot express every text."""
    if not _ALL_FORMS.issuperset("".join(vocab)) or "" in vocab:
        odd = next(form for form in vocab if not is_byte_level(form))
        found = f"not a byte-level form of token {vocab[odd]}: it has other characters than GPT-2's 256"
        raise _bad(f"{where}, {_shown(odd)}", found)
    chars = sum(map(len, vocab))
    if chars > MAX_VOCAB_CHARS:
        raise _bad(where, f"{chars} characters in {len(vocab)} tokens, more than {MAX_VOCAB_CHARS}")
    missing = [byte for byte, form in enumerate(FORMS_OF_BYTES) if form not in vocab]
    if missing:
        found = f"{len(missing)} of the 256 single bytes have no token, the first is 0x{missing[0]:02x}"
        raise _bad(where, f"{found} ({_shown(FORMS_OF_BYTES[missing[0]])})")


def split_merges(merges: Sequence[object], where: Callable[[int], str]) -> list[tuple[str, str]]:
    """Merges as pairs of forms; an entry is "a b" or ["a", "b"]."""
    pairs = []
    for number, entry in enumerate(merges):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        match pair:
            case [str(first), str(second)] if first and second:
                pairs.append((first, second))
            case _:
                raise _bad(where(number), f"{_shown(entry)} is not a pair of tokens")
    return pairs


def merged_ranks(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: Callable[[int], str]
) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """(ranks of the tokens that the merges make, ids of the tokens that they never make).

    ``vocab`` has passed check_ids and check_forms. Raises ConfigError where the merges name other tokens than the
    vocabulary, or their order is not that of the ids.
    """
    made = _made_by_merges(vocab, merges, where)
    ranks: dict[bytes, int] = {}
    unmerged: dict[bytes, int] = {}
    for form, token_id in vocab.items():
        (ranks if made[token_id] else unmerged)[to_bytes(form)] = token_id
    return ranks, unmerged


def _made_by_merges(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: Callable[[int], str]
) -> bytearray:
    """By id, 1 for each token that the merges make out of its bytes."""
    size = max(vocab.values()) + 1
    made = bytearray(size)
    for form in FORMS_OF_BYTES:
        made[vocab[form]] = 1
    left, right = [-1] * size, [-1] * size  # the parts each token is made of
    products: dict[int, int] = {}
    last = -1
    for number, (first, second) in enumerate(merges):
        try:
            a, b, product = vocab[first], vocab[second], vocab[first + second]
        except KeyError as error:
            found = f"{_shown(error.args[0])} of the pair {_shown(first)}, {_shown(second)} is not in the vocabulary"
            raise _bad(where(number), found) from error
        made_before = (a < product or len(first) == 1) and (b < product or len(second) == 1)
        if product < last or not made_before:
            raise ConfigError(
                f"reading {where(number)}",
                f"the pair {_shown(first)}, {_shown(second)} makes id {product} "
                + (f"after id {last}" if made_before else f"of ids {a} and {b}"),
                "Only vocabularies whose ids rise in the order of their merges are supported, as all of Qwen's do.",
            )
        last = product
        if made[a] and made[b] and not made[product] and _meet(a, b, product, left, right, products):
            made[product] = 1
            left[product], right[product] = a, b
            products[a << _ID_BITS | b] = product
    return made


def _meet(
    a: int, b: int, product: int, left: Sequence[int], right: Sequence[int], products: Mapping[int, int]
) -> bool:
    """Whether the bytes of ``a`` followed by those of ``b`` become a and b, no merge crossing the border first.

    Merges happen in the order of their products. Follows the two tokens at the border while they grow: each
    lives until its parent on its own side is made, unless the two are a pair that is merged earlier. Equal ids are
    merged leftmost first, so at a tie the left parent comes before the crossing and the crossing before the right.
    """
    left_side, right_side = [a], [b]
    while (child := right[left_side[-1]]) >= 0:
        left_side.append(child)
    while (child := left[right_side[-1]]) >= 0:
        right_side.append(child)
    i, j = len(left_side) - 1, len(right_side) - 1
    while i or j:
        left_parent = left_side[i - 1] if i else product
        right_parent = right_side[j - 1] if j else product
        crossing = products.get(left_side[i] << _ID_BITS | right_side[j])
        if crossing is not None and crossing < left_parent and crossing <= right_parent:
            return False
        if left_parent <= right_parent:
            i -= 1
        else:
            j -= 1
    return True


def _bad(where: str, found: str) -> ConfigError:
    return ConfigError(f"reading {where}", found, FETCH_ALL_AGAIN)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
