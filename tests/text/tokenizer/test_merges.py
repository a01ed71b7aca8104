"""Merges against ranks: where both give the same ids, and what is refused. Oracle: the BPE of tokenizers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Oracle
from tokenizers.models import BPE

from qwenrt.errors import ConfigError
from qwenrt.text.tokenizer.merges import (
    FORMS_OF_BYTES,
    check_forms,
    check_ids,
    is_byte_level,
    merged_ranks,
    split_merges,
    to_bytes,
)
from tests.text.bpe_vocab import form, merges_of, small_bpe_ranks, vocab_json

BYTES = {form: byte for byte, form in enumerate(FORMS_OF_BYTES)}


def where(number: int) -> str:
    return f"merges[{number}]"


def encoder(ranks: dict[bytes, int]):
    import tiktoken

    return tiktoken.Encoding("test", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})


def test_the_forms_of_bytes() -> None:
    assert len(set(FORMS_OF_BYTES)) == 256
    assert (
        "".join(FORMS_OF_BYTES[byte] for byte in b" \n\x00\x7f\xa0\xad!~\xa1\xac\xae\xff") == "ĠĊĀġłŃ!~¡¬®ÿ"
    )
    assert to_bytes("".join(FORMS_OF_BYTES)) == bytes(range(256))
    assert is_byte_level("Ġhello") and not any(map(is_byte_level, ("", " hello", "猫", "\xad", "a\n", "ń")))


@st.composite
def vocabularies(draw: st.DrawFn) -> list[list[str]]:
    """For each token beside the bytes, in the order of ids, the pairs that make it; possibly in no sensible way."""
    known = list("abc")
    listed: list[list[tuple[str, str]]] = []
    for _ in range(draw(st.integers(0, 14))):
        first, second = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if first + second in known:
            continue
        known.append(first + second)
        listed.append([(first, second)])
        whole = first + second
        cuts = [
            i for i in range(1, len(whole)) if whole[:i] in known and whole[i:] in known and i != len(first)
        ]
        listed[-1] += (
            [(whole[:i], whole[i:]) for i in draw(st.lists(st.sampled_from(cuts), unique=True))]
            if cuts
            else []
        )
    return listed


@settings(deadline=None, max_examples=300)
@given(vocabularies(), st.lists(st.text(alphabet="abc", max_size=40), max_size=6))
def test_ranks_give_the_ids_of_the_merges(listed: list[list[tuple[str, str]]], texts: list[str]) -> None:
    """Whatever the merges: what they cannot make is left out of the ranks, and then both agree on every text."""
    vocab = dict(BYTES)
    for pairs in listed:
        vocab["".join(pairs[0])] = len(vocab)
    merges = [pair for pairs in listed for pair in pairs]
    ranks, unmerged = merged_ranks(vocab, merges, where)
    assert {**ranks, **unmerged} == {to_bytes(form): token_id for form, token_id in vocab.items()}
    oracle = Oracle(BPE(vocab=vocab, merges=merges))
    ours = encoder(ranks)
    tokens = ["".join(pairs[0]) for pairs in listed]
    for token in tokens:
        alone = oracle.encode(token).ids
        assert (alone == [vocab[token]]) == (to_bytes(token) in ranks), token
    for text in [*texts, *tokens]:
        assert ours.encode_ordinary(text) == oracle.encode(text).ids


def test_a_merge_that_another_one_forestalls() -> None:
    """`abc` is listed as a + bc, but in a, b, c the pair a, b comes first: no text ever gives `abc`."""
    vocab = {**BYTES, "ab": 256, "bc": 257, "abc": 258}
    ranks, unmerged = merged_ranks(vocab, [("a", "b"), ("b", "c"), ("a", "bc")], where)
    assert unmerged == {b"abc": 258} and ranks[b"bc"] == 257
    assert encoder(ranks).encode_ordinary("abc") == [256, BYTES["c"]]


@pytest.mark.parametrize(
    ("merges", "found"),
    [
        ([("a", "b"), ("b", "d")], r"merges\[1\]: 'bd' of the pair 'b', 'd' is not in the vocabulary"),
        ([("a", "猫")], r"merges\[0\]: '猫' of the pair 'a', '猫' is not in the vocabulary"),
        (
            [("b", "c"), ("a", "b")],
            r"merges\[1\]: the pair 'a', 'b' makes id 256 after id 257\. Only .* whose ids rise",
        ),
        ([("cab", "c")], r"merges\[0\]: the pair 'cab', 'c' makes id 258 of ids 259 and 66\. Only"),
    ],
)
def test_refuses_merges_against_the_ids(merges: list[tuple[str, str]], found: str) -> None:
    vocab = {**BYTES, "ab": 256, "bc": 257, "cabc": 258, "cab": 259}
    vocab["B"], vocab["c"] = vocab["c"], vocab["B"]
    with pytest.raises(ConfigError, match=found):
        merged_ranks(vocab, merges, where)


@pytest.mark.parametrize(
    "entry", ["a", "a b c", "a  b", " a", "", ["a"], ["a", "b", "c"], ["a", 1], 3, None, ["", "a"]]
)
def test_refuses_what_is_no_pair(entry: object) -> None:
    with pytest.raises(ConfigError, match=r"merges\[1\]: .* is not a pair of tokens"):
        split_merges(["a b", entry], where)


@pytest.mark.parametrize(
    ("vocab", "found"),
    [
        ({"a": -1}, r"file, 'a': id -1 is not 0 to 2097151"),
        ({"a": 2**21}, r"id 2097152 is not"),
        ({"a": 10**4000}, r"id 1000.* is not"),
        ({"a": "1"}, r"id '1' is not"),
        ({"a": 1.0}, r"id 1.0 is not"),
        ({"a": True}, r"id True is not"),
        ({"a": None}, r"id None is not"),
        ({"a": [[]]}, r"id \[\[\]\] is not"),
        ({"a": 1, "b": 2, "c": 1}, r"file, 'c': id 1 belongs to 'a' already"),
    ],
)
def test_refuses_ids(vocab: dict[str, object], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        check_ids(vocab, "file")


@pytest.mark.parametrize("odd", ["a b", "", "猫", "\ud800", "a\n", "▁the"])
def test_refuses_forms(odd: str) -> None:
    with pytest.raises(ConfigError, match=r"file, '.*': not a byte-level form of token 300"):
        check_forms({**BYTES, odd: 300}, "file")


def test_refuses_missing_bytes() -> None:
    vocab = {form: byte for form, byte in BYTES.items() if form not in "ĠĊ"}
    with pytest.raises(
        ConfigError, match=r"file: 2 of the 256 single bytes have no token, the first is 0x0a \('Ċ'\)"
    ):
        check_forms(vocab, "file")
    with pytest.raises(ConfigError, match="256 of the 256 single bytes"):
        check_forms({}, "file")
    with pytest.raises(ConfigError, match="8388864 characters in 257 tokens, more than 8388608"):
        check_forms({**BYTES, "x" * 2**23: 300}, "file")


def test_merges_of_a_small_vocabulary() -> None:
    ranks = small_bpe_ranks()
    merges = [(form(a), form(b)) for a, b in merges_of(ranks)]
    assert merged_ranks(vocab_json(ranks), merges, where) == (ranks, {})


def test_long_chains_end() -> None:
    """Tokens that double, and tokens that grow by one: the walk along a border is as long as the chain at most."""
    vocab, merges = dict(BYTES), []
    for length in range(2, 1500):
        vocab["a" * length] = len(vocab)
        merges.append(("a" * (length - 1), "a"))
    ranks, unmerged = merged_ranks(vocab, merges, where)
    rng = random.Random(0)
    oracle = Oracle(BPE(vocab=vocab, merges=merges))
    for text in ["a" * rng.randrange(1, 3000) for _ in range(10)]:
        assert encoder(ranks).encode_ordinary(text) == oracle.encode(text).ids
    assert len(ranks) + len(unmerged) == len(vocab)
