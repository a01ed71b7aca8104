"""What an answer must look like: a JSON schema, a regular expression, a grammar, or one of a few texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenrt.errors import RequestError, shown

Kind = Literal["json_schema", "regex", "lark"]
Thought = Literal["none", "open", "possible"]
MAX_GRAMMAR_CHARS = 65536
_MEANINGFUL = re.compile("[%*+?{}/#]")


@dataclass(frozen=True)
class Begins:
    """Where a grammar begins in an answer that is free until then: at one of ``openings``, which are the first of what
    it derives; the answer itself begins as behind a line's end, unless ``within_line``.

    ``again``: at its end the answer is free again, up to the next opening; else the answer ends there.
    ``not_after``: a text behind which nothing is an opening, "" for none.
    """

    openings: tuple[str, ...]
    again: bool = True
    not_after: str = ""
    within_line: bool = False


@dataclass(frozen=True)
class Grammar:
    """A language that an answer is held to while it is written: every finished answer is a text of it.

    kind and text: "json_schema" and the schema as JSON; "regex" and a regular expression that the whole answer matches;
    "lark" and a grammar in llguidance's Lark syntax. Compiling needs the package llguidance (`pip install
    qwenrt[server]`) and happens where a request is checked: what cannot be compiled is a RequestError there.

    thought: what may be written before the answer, free of the grammar: nothing ("none"), the rest of a thought that
    the prompt has begun ("open"), or a thought of the model's own ("possible"). A chat sets it by its prompt.
    begins: where in the answer it begins; None: at once.
    """

    kind: Kind
    text: str
    thought: Thought = "none"
    begins: Begins | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise RequestError(
                "a grammar's kind", f"got {shown(self.kind)}", "Known are json_schema, regex and lark."
            )
        if self.thought not in ("none", "open", "possible"):
            raise RequestError(
                "the thought before a grammar",
                f"got {shown(self.thought)}",
                "Known are none, open and possible.",
            )
        if not isinstance(self.text, str) or not self.text:
            raise RequestError(f"a grammar ({self.kind})", f"got {shown(self.text)}", "Pass its text.")
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"a grammar ({self.kind})",
                f"it has {len(self.text)} characters",
                f"At most {MAX_GRAMMAR_CHARS} are taken: make it smaller.",
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """Answers that are JSON of this schema, given as an object or as its JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else _json(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Answers that are a JSON object, whatever it holds."""
        return cls("json_schema", '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Answers that match this expression from end to end."""
        return cls("regex", pattern)

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Answers that llguidance's Lark grammar derives from its rule ``start``."""
        return cls("lark", grammar)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """Answers that are one of these texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError("a choice of answers", f"got {shown(texts)}", "Pass a list of texts.")
        return cls("lark", "start: " + " | ".join(map(lark_literal, texts)))


def lark_literal(text: str) -> str:
    """A text as a Lark grammar spells it. What means something outside of texts is written as an escape, so that
    nobody has to tell the two apart."""
    return _MEANINGFUL.sub(lambda c: f"\\u{ord(c[0]):04x}", json.dumps(text, ensure_ascii=False))


def _json(schema: object) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError("a JSON schema", str(error)[:120], "It must be expressible as JSON.") from error
