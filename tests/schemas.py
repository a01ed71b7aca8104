"""Random JSON schemas of the kinds that answers can be held to, and random answers that a constraint allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from qwenrt.engine.constraint import Allowed, Constraint
from qwenrt.engine.grammar import Compiled
from qwenrt.structure import Grammar
from qwenrt.text.tokenizer.tokenizer import Tokenizer

KEYS = ("name", "age", "x", "long key", "名字", 'a"b', "emoji🦊", "back\\slash", "type", "abc", "ab")
PATTERNS = (r"^[a-z]+$", r"^\d{3}-\d{2}$", "a|b", r"^[A-Z][a-z]{0,5}$", r"^.{2,4}$", r"é+", "^(foo|bar)*$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "duration", "hostname", "int32")


def random_schema(r: random.Random, depth: int = 3) -> Any:
    """A schema nested at most ``depth`` levels deep."""
    simple: list[Callable[[random.Random], Any]] = [
        _string, _string, _integer, _number, _enum, _const, _boolean, _null, _types, _anything
    ]  # fmt: skip
    if depth == 0 or r.random() < 0.3:
        return r.choice(simple)(r)
    nested: list[Callable[[random.Random, int], Any]] = [
        _object, _object, _object, _array, _array, _any_of, _all_of, _referring, _one_of
    ]  # fmt: skip
    return r.choice(nested)(r, depth - 1)


def _string(r: random.Random) -> Any:
    schema: dict[str, Any] = {"type": "string"}
    kind = r.randrange(5)
    if kind == 0:
        schema["pattern"] = r.choice(PATTERNS)
    elif kind == 1:
        schema["format"] = r.choice(FORMATS)
    elif kind == 2:
        least = r.randrange(4)
        schema |= {"minLength": least, "maxLength": least + r.randrange(5)}
    return schema | ({"title": "T", "description": "d"} if r.random() < 0.2 else {})


def _integer(r: random.Random) -> Any:
    schema: dict[str, Any] = {"type": "integer"}
    low = r.randrange(-1000, 1000)
    for key, value in (("minimum", low), ("maximum", low + r.randrange(0, 500))):
        if r.random() < 0.5:
            schema[key] = value
    if len(schema) == 1 and r.random() < 0.5:
        schema["multipleOf"] = r.choice([2, 5, 7, 10, 30])
    return schema


def _number(r: random.Random) -> Any:
    schema: dict[str, Any] = {"type": "number"}
    low = r.choice([-3, 0, 0.5, 17.25])
    if r.random() < 0.5:
        schema[r.choice(["minimum", "exclusiveMinimum"])] = low
    if r.random() < 0.5:
        schema[r.choice(["maximum", "exclusiveMaximum"])] = low + r.choice([1, 2.5, 100])
    return schema


def _value(r: random.Random, depth: int = 1) -> Any:
    values = [None, True, False, 0, -7, 2.5, "", "text", 'qu"ote\n', "名字", "🦊", "\\"]
    if depth and r.random() < 0.3:
        return r.choice([[_value(r, 0), 1], {"k": _value(r, 0)}, [], {}])
    return r.choice(values)


def _enum(r: random.Random) -> Any:
    return {"enum": [_value(r) for _ in range(r.randrange(1, 5))]}


def _const(r: random.Random) -> Any:
    return {"const": _value(r)}


def _boolean(r: random.Random) -> Any:
    return {"type": "boolean"}


def _null(r: random.Random) -> Any:
    return {"type": "null"}


def _types(r: random.Random) -> Any:
    return {"type": r.sample(["string", "integer", "null", "boolean", "number", "array", "object"], 2)}


def _anything(r: random.Random) -> Any:
    return r.choice([{}, True, {"description": "whatever"}])


def _object(r: random.Random, depth: int) -> Any:
    keys = r.sample(KEYS, r.randrange(0, 5))
    schema: dict[str, Any] = {"type": "object", "properties": {k: random_schema(r, depth) for k in keys}}
    if keys and r.random() < 0.7:
        schema["required"] = r.sample(keys, r.randrange(1, len(keys) + 1))
    more = r.random()
    if more < 0.4:
        schema["additionalProperties"] = False
    elif more < 0.6:
        schema["additionalProperties"] = random_schema(r, 0)
    if r.random() < 0.15:
        schema["patternProperties"] = {r.choice(["^a", "b$", "^[xy]", "e"]): random_schema(r, 0)}
    if r.random() < 0.1:
        schema[r.choice(["minProperties", "maxProperties"])] = r.randrange(1, 4)
    return schema


def _array(r: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array"}
    if r.random() < 0.8:
        schema["items"] = random_schema(r, depth)
    if r.random() < 0.3:
        schema["prefixItems"] = [random_schema(r, depth) for _ in range(r.randrange(1, 3))]
        if r.random() < 0.5:
            schema["items"] = False
    if r.random() < 0.5:
        least = r.randrange(3)
        schema |= {"minItems": least, "maxItems": least + r.randrange(3)}
    return schema


def _any_of(r: random.Random, depth: int) -> Any:
    return {"anyOf": [random_schema(r, depth) for _ in range(r.randrange(1, 4))]}


def _one_of(r: random.Random, depth: int) -> Any:
    return {"oneOf": [random_schema(r, depth) for _ in range(2)]}


def _all_of(r: random.Random, depth: int) -> Any:
    return {"allOf": [_object(r, depth), _object(r, 0)]}


def _referring(r: random.Random, depth: int) -> Any:
    node = {
        "type": "object",
        "properties": {"value": random_schema(r, 0), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
        "required": ["value"],
        "additionalProperties": False,
    }  # fmt: skip
    return {"$defs": {"n": node}, "$ref": "#/$defs/n"} if depth == 2 else random_schema(r, depth)


def written(
    compiled: Compiled,
    tokenizer: Tokenizer,
    r: random.Random,
    most: int = 300,
    grammar: Grammar | None = None,
    endings: tuple[str, ...] = (),
) -> tuple[str, bool]:
    """A random text that a constraint allows, and whether it came to its end within ``most`` tokens.

    Ends are taken where they can be, closing characters often, and now and then one of the ``endings`` of free text is
    tried: random texts hardly ever end otherwise.
    """
    eod = tokenizer.eod_id
    constraint = Constraint(compiled, grammar or Grammar.json_object(), [eod])
    ids: list[int] = []
    planned: list[int] = []
    while len(ids) < most:
        allowed = constraint.allowed()
        assert allowed is not None
        if endings and allowed.but and not planned and r.random() < 0.15:
            planned = tokenizer.encode(r.choice(endings))[::-1]
        token = planned.pop() if planned else next_token(allowed, tokenizer, r, len(ids))
        if (token in allowed.ids) is allowed.but:
            planned.clear()
            continue
        if token == eod:
            return tokenizer.decode(ids, errors="strict"), True
        ids.append(token)
        if constraint.take(token):
            return tokenizer.decode(ids, errors="strict"), True
    return tokenizer.decode(ids), False


def next_token(allowed: Allowed, tokenizer: Tokenizer, r: random.Random, done: int) -> int:
    ids = allowed.ids.tolist()
    if not allowed.but:
        assert ids
        if tokenizer.eod_id in ids and r.random() < 0.7:
            return tokenizer.eod_id
        closing = [i for i in ids if tokenizer.token_bytes(i)[-1:] in b'"}]']
        return r.choice(closing if closing and r.random() < min(0.9, 0.3 + done / 100) else ids)
    barred = set(ids)
    closing = [i for i in map(ord, '"}]') if i not in barred]
    if closing and r.random() < min(0.9, 0.3 + done / 100):
        return r.choice(closing)
    while (token := r.randrange(tokenizer.vocab_size)) in barred:
        pass
    return token
