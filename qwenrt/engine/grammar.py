"""Grammars compiled for one tokenizer by llguidance, which is imported when the first one is asked for."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from qwenrt.engine.grammar_bounds import check_regex, checked_lark, checked_schema, place_of
from qwenrt.engine.openings import Misfits
from qwenrt.errors import RequestError, shown
from qwenrt.structure import Begins, Grammar
from qwenrt.text.tokenizer.tokenizer import Tokenizer

KEPT = 64  # compiled grammars
# Older ones know no pattern for white space, would take any, and do not keep to patternProperties.
_NEEDED = (1, 9)
# What may stand between two parts of JSON: at most a space, or a line's end with an indentation. In a grammar that has
# JSON within, such as a call, only the space.
_BETWEEN, _BETWEEN_IN_LINE = r"[ ]?|\n[ ]{0,16}", "[ ]?"
# Texts that a grammar leaves no choice about are not computed ahead: one could be made to take for ever.
_NO_FORCING = '\n%llguidance {"no_forcing": true}'
_LIMITS = {
    "max_grammar_size": 20_000,  # symbols; 0.1 s
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,  # some milliseconds of one token
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,  # of about 2 kB
}


_EXCERPT = re.compile(r"^(?:\s*\d+ \| |<state>)", re.MULTILINE)  # of the source, or of the compiler's state
_WHERE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")


@dataclass(frozen=True)
class Vocabulary:
    """What a grammar's masks are made with. ``tables``: llguidance's; ``size`` ids, whose bytes are ``texts``, none for
    those that are not used; ``eod``: the id whose bit says that a text may end; ``text``: uint8 [ceil(size / 8)], a bit
    for each id that may be written; ``line_ends``: the ids of line ends."""

    tables: Any
    size: int
    texts: list[bytes]
    eod: int
    text: np.ndarray
    line_ends: tuple[int, ...]


class Compiled:
    """A grammar that answers can be held to. `matcher` gives each of them its own state. ``misfits``: see `Openings`,
    where the grammar begins within an answer."""

    def __init__(
        self, vocabulary: Vocabulary, matcher: Any, tokenizer: Tokenizer, begins: Begins | None = None
    ) -> None:
        self.vocabulary, self.tokenizer = vocabulary, tokenizer
        self._matcher = matcher
        self._lock = threading.Lock()
        self.misfits: Misfits = {} if begins is None else self._misfits(begins)

    def begun(self, opening: bytes, rest: bytes) -> list[int]:
        """The tokens with which a matcher begins, where an opening and a little more were written."""
        encode = self.tokenizer.encode
        return encode(opening.decode(), allow_special=True) + encode(rest.decode("utf-8", "replace"))

    def _misfits(self, begins: Begins) -> Misfits:
        found = {}
        for opening in (text.encode() for text in begins.openings):
            for written in range(len(opening)):
                missing = opening[written:]
                behind = (
                    (i, text.partition(missing)[2])
                    for i, text in enumerate(self.vocabulary.texts)
                    if (missing in text if not written else text.startswith(missing))
                )
                if ids := [i for i, rest in behind if rest and not self._fits(self.begun(opening, rest))]:
                    found[opening, written] = np.array(ids)
        return found

    def _fits(self, tokens: list[int]) -> bool:
        return bool(self._matcher.validate_tokens(tokens) == len(tokens))

    def matcher(self) -> Any:
        """An llguidance.LLMatcher at the beginning."""
        with self._lock:
            return self._matcher.deep_copy()


class Grammars:
    """Compiles grammars for one tokenizer and keeps the latest. Any thread may use it: `compile` does its work in the
    caller's. ``num_compiled``: how often that was needed."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.num_compiled = 0
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[tuple[str, str, Begins | None], Compiled] = OrderedDict()
        self._lock, self._building = threading.Lock(), threading.Lock()

    def compile(self, grammar: Grammar) -> Compiled:
        """Raises RequestError for what cannot be kept to, naming the place where it can be told."""
        key = grammar.kind, grammar.text, grammar.begins
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        compiled = self._compiled(grammar)
        with self._lock:
            self.num_compiled += 1
            self._kept[key] = compiled
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return compiled

    def build(self) -> None:
        """Make what all grammars share before the first one is asked for: some tenths of a second for a large
        vocabulary. Raises RequestError where llguidance is missing."""
        if self._tokenizer is not None:
            self._shared(self._tokenizer)

    def _shared(self, tokenizer: Tokenizer) -> Vocabulary:
        with self._building:  # once, however many ask first
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(_llguidance(), tokenizer)
            return self._vocabulary

    def _compiled(self, grammar: Grammar) -> Compiled:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise RequestError(
                f"a grammar ({grammar.kind})", "this model has no tokenizer", "Generate without one."
            )
        guidance, vocabulary = _llguidance(), self._shared(tokenizer)
        lark, schema = _as_lark(grammar)
        limits = guidance.LLParserLimits(**_LIMITS)
        source = guidance.LLMatcher.grammar_from_lark(lark)
        matcher = guidance.LLMatcher(vocabulary.tables, source, log_level=0, limits=limits)
        if not matcher.is_error():
            _try(matcher, vocabulary, grammar)
        if matcher.is_error():
            raise _refused(grammar, schema, matcher.get_error())
        return Compiled(vocabulary, matcher, tokenizer, grammar.begins)


def _lark_json(schema: dict[str, Any], between: str) -> str:
    """A schema, checked, as a term of a Lark grammar. Characters that need no escape are written without: text of any
    script stays readable."""
    options = {"whitespace_pattern": between, "json_allow_general_unicode_escapes": False}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _as_lark(grammar: Grammar) -> tuple[str, dict[str, Any] | None]:
    """The grammar as Lark, and the schema where it is one."""
    if grammar.kind == "json_schema":
        schema = checked_schema(grammar)
        return f"start: {_lark_json(schema, _BETWEEN)}{_NO_FORCING}", schema
    if grammar.kind == "regex":
        check_regex(grammar.text)
        source = json.loads(_llguidance().LLMatcher.grammar_from_regex(grammar.text))
        return source["grammars"][0]["lark_grammar"] + _NO_FORCING, None
    pieces = checked_lark(grammar.text)
    terms = (piece if isinstance(piece, str) else _lark_json(piece, _BETWEEN_IN_LINE) for piece in pieces)
    return "".join(terms) + _NO_FORCING, None


def _try(matcher: Any, vocabulary: Vocabulary, grammar: Grammar) -> None:
    """The first mask, which shows at once what cannot be computed, and what allows no answer."""
    first = matcher.deep_copy()
    bits = np.frombuffer(first.compute_bitmask(), dtype=np.uint8)
    if first.is_error():
        raise _refused(grammar, None, first.get_error())
    allowed = np.flatnonzero(np.unpackbits(bits, count=vocabulary.size, bitorder="little"))
    if not set(allowed.tolist()) - {vocabulary.eod}:
        raise RequestError(f"a grammar ({grammar.kind})", "no answer fits it", "Say what is allowed.")


def _refused(grammar: Grammar, schema: dict[str, Any] | None, message: str) -> RequestError:
    words = _EXCERPT.split(message, maxsplit=1)[0].removesuffix(":").strip()
    if schema is not None or grammar.kind == "regex":
        words = _WHERE.sub("", words)
    said = " ".join(words.split())
    if len(said) > 240:
        said = f"{said[:150]} ... {said[-80:]}"
    if not said or said.startswith("NoExtension"):
        said = "no answer fits it"
    where = "" if schema is None else f", {place_of(schema, words)}"
    return RequestError(
        f"a grammar ({grammar.kind}){where}", said, "Leave that out, or write it in another way."
    )


def _vocabulary(guidance: Any, tokenizer: Tokenizer) -> Vocabulary:
    size = tokenizer.vocab_size
    unused = set(tokenizer.unused_ids())
    texts = [b"" if i in unused else tokenizer.token_bytes(i) for i in range(size)]
    tables = guidance.LLTokenizer(_Wrapped(tokenizer, texts), n_vocab=size, eos_token=tokenizer.eod_id)
    text = np.ones(size, dtype=np.uint8)
    text[[*unused, *tokenizer.special_ids, tokenizer.eod_id]] = 0
    line_ends = tuple(i for i, token in enumerate(texts) if token in (b"\n", b"\n\n"))
    return Vocabulary(tables, size, texts, tokenizer.eod_id, np.packbits(text, bitorder="little"), line_ends)


class _Wrapped:
    """A tokenizer as llguidance reads one. Its special tokens are written by a grammar that names them alone, never as
    text; control tokens, and the tags of thoughts and calls."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, texts: list[bytes]) -> None:
        self._tokenizer = tokenizer
        self.tokens, self.eos_token_id = texts, tokenizer.eod_id
        self.special_token_ids = sorted(tokenizer.added_tokens.values())

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


@cache
def _llguidance() -> Any:
    found = ""
    try:
        import llguidance
    except ImportError as error:
        found = f"the package llguidance cannot be imported ({shown(str(error))})"
    else:
        if _numbers(here := version("llguidance")) < _NEEDED:
            found = f"llguidance {here} is too old"
    if found:
        wanted = ".".join(map(str, _NEEDED))
        how = f'Install {wanted} or later with `pip install "qwenrt[server]"`.'
        raise RequestError("a grammar", found, how)
    return llguidance


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
