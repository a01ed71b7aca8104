"""Templates made at random of everything that jinja2 and transformers offer.

`Writer(random, tame=True)` keeps numbers small, so that transformers can be asked for the same text; without it widths,
counts and repeats are what an attacker would write.
"""

from __future__ import annotations

import random
import re

LITERALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|",
    "|>",
    "<",
    ">",
    "a",
    "user\n",
    "",
    " ",
    "%s",
    "ÄßΣ",
]
SMALL = ["0", "1", "2", "-1", "3"]
HUGE = [*SMALL, "99", "999999999", "10 ** 9", "2 ** 70", "4000000", "-999999999", "100000"]
NULLARY = [
    *("strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "upper", "lower", "title", "capitalize"),
    *("casefold", "swapcase", "isalpha", "isalnum", "isascii", "isdigit", "isdecimal", "isidentifier", "islower"),
    *("isnumeric", "isprintable", "isspace", "istitle", "isupper", "expandtabs"),
]  # fmt: skip
UNARY = [
    *("strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith", "find", "rfind", "index", "rindex"),
    *("count", "partition", "rpartition", "removeprefix", "removesuffix", "join"),
]  # fmt: skip
WIDE = ["center", "ljust", "rjust", "zfill", "expandtabs"]
FILTERS = [
    *("abs", "capitalize", "count", "dictsort", "first", "float", "int", "items", "last"),
    *("length", "list", "lower", "max", "min", "pprint", "reject", "reverse", "round", "select", "sort", "string"),
    *("striptags", "sum", "title", "tojson", "trim", "unique", "upper", "urlencode", "wordcount", "filesizeformat"),
    *("d", "default", "xmlattr", "wordwrap", "truncate", "indent", "center"),
]  # fmt: skip
LAZY = ["items", "reject", "reverse", "select", "unique"]
TESTS = [
    "string",
    "mapping",
    "iterable",
    "number",
    "none",
    "defined",
    "upper",
    "lower",
    "sequence",
    "true",
    "odd",
]
CONVERSIONS = "diouxXeEfFgGcrsa"


class Writer:
    def __init__(self, chance: random.Random, tame: bool) -> None:
        self._chance, self._tame = chance, tame
        self._numbers = SMALL if tame else HUGE
        self._depth = 0

    def template(self) -> str:
        body = "".join(self._statement() for _ in range(self._chance.randint(1, 4)))
        return "{% set ns = namespace(s='ab<', l=[1, 'x']) %}" + body

    def _pick(self, *choices: str) -> str:
        return self._chance.choice(choices)

    def _fill(self, *shapes: str) -> str:
        """One of the shapes, T, L, V, N, Q in it replaced by a text, a list, any value, a number, a literal."""
        self._depth += 1
        makers = {"T": self._text, "L": self._list, "V": self._value, "N": self._number, "Q": self._literal}
        filled = re.sub(r"\b[TLVNQ]\b", lambda found: makers[found[0]](), self._chance.choice(shapes))
        self._depth -= 1
        return filled

    def _statement(self) -> str:
        self._depth += 1
        most = 3 if self._depth > 3 else 11 if self._tame else 12  # growing in a loop is no work for a peer
        kind = self._chance.randint(0, most)
        shape = [
            "{{ T | " + self._pick("e", "escape | e", "safe", "e | forceescape", "e + T") + " }}",
            "{{ T }}", "{{ V }}", self._chance.choice(LITERALS), "{% set ns.s = T %}_", "{% set ns.l = [ns.l, V] %}_",
            "{% for x in L %}{{ loop.index }}_{{ x }}{% endfor %}",
            "{% if V is " + self._chance.choice(TESTS) + " %}_{% else %}b{% endif %}",
            "{% set y %}_{% endset %}{{ y" + self._filter() + " }}",
            "{% macro m(a) %}{{ a }}_{% endmacro %}{{ m(V) }}",
            "{% filter " + self._pick("upper", "trim", "lower", "length") + " %}_{% endfilter %}",
            "{% set ns.s = T ~ V %}_{{ ns.s }}",
            "{% for i in range(N) %}{% set ns.s = ns.s ~ T %}_{% endfor %}{{ ns.s }}",
        ][kind]  # fmt: skip
        made = re.sub("_$|_(?=[{])", lambda _: self._statement(), self._fill(shape))
        self._depth -= 1
        return made

    def _number(self) -> str:
        return self._chance.choice(self._numbers)

    def _literal(self) -> str:
        return repr(self._chance.choice(LITERALS))

    def _value(self) -> str:
        if self._depth > 8:
            return self._pick("1", "none", "data")
        return self._fill(
            "T", "L", "N", "messages", "messages[0]", "data", "ns.l", "none", "nothing", "1.5", "true",
            "T == T", "T in T", "T not in T", "T < T", "L | batch(N, Q) | list", "L | slice(N, Q) | list",
            "messages | groupby('role')", "messages | map(attribute='content') | list", "L | map('upper') | join(T)",
            "dict(a=Q, b=L)", "cycler(T, 2).next()", "N + N", "N * N", "N ** N", "V | tojson",
        )  # fmt: skip

    def _list(self) -> str:
        if self._depth > 8:
            return "ns.l"
        return self._fill(
            "messages", "ns.l", "[T, T]", "T.split(Q)", "(range(N) | list)", "(T | list)", "([1] * N)", "(T,)",
            "T.rsplit(sep=Q, maxsplit=N)", "(messages | map('string') | list)", "ns.l[N:]", "T.splitlines()",
        )  # fmt: skip

    def _text(self) -> str:
        leaves = ["Q", "ns.s", "messages[0].content", "messages[-1].content", "messages[0].role"]
        if self._depth > 8 or self._chance.random() < 0.3:
            return self._fill(*leaves)
        special = self._chance.randint(0, 9)
        if special < 2:
            return self._printf() if special else self._braces()
        return "(" + self._fill(
            "T ~ V", "T + T", "T[N:]", "T[:N]", "T[N:N]", f"T.{self._chance.choice(NULLARY)}()",
            f"T.{self._chance.choice(UNARY)}(T)", "T.replace(T, T)", "T" + self._filter(), "T * N",
            f"T.{self._chance.choice(WIDE)}(N)", "Q.join(L)", "T.join(L)", "L | join(T)", "T | replace(T, T, N)",
            "T | trim(T)",
        ) + ")"  # fmt: skip

    def _width(self) -> str:
        return self._pick("", "", "5", "2" if self._tame else "999999999", "3" if self._tame else "99999")

    def _printf(self) -> str:
        flags, width, point = (
            self._pick("", "-", "0", "+", "#", " "),
            self._width(),
            self._pick("", ".", ".3"),
        )
        point += "" if self._tame else self._width()
        form = f"<|%{self._pick('', '', '(a)')}{flags}{width}{point}{self._chance.choice(CONVERSIONS)}|>"
        value = "{'a': " + self._value() + "}" if "(a)" in form else "(" + self._value() + ",)"
        return (
            f"({form!r} % {value})"
            if self._chance.random() < 0.7
            else f"({form!r} | format({self._value()}))"
        )

    def _braces(self) -> str:
        spec = self._pick("", "", ":>" + self._width(), ":" + self._pick("d", "s", ".2f", "x"), "!r")
        return f"'<|{{{self._pick('', '0', 'a', 'a.b', '0[0]')}{spec}}}|>'.format({self._value()}, a={self._value()})"

    def _filter(self) -> str:
        name = self._chance.choice(FILTERS)
        if name in ("wordwrap", "center", "indent", "round"):
            return f" | {name}({self._number()})"
        if name == "truncate":
            return f" | truncate({self._number()}, {self._pick('true', 'false')}, {self._literal()}, 0)"
        if name == "tojson" and self._chance.random() < 0.5:
            return f" | tojson(indent={self._number()}, ensure_ascii={self._pick('true', 'false')})"
        return f" | {name} | list" if name in LAZY else f" | {name}"  # an iterator's name is nobody's prompt
