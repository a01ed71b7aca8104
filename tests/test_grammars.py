"""Answers held to a grammar: what is compiled and refused, and that whatever is written fits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from functools import cache
from typing import Any

import pytest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

from qwenrt.engine import grammar as grammar_module  # noqa: E402
from qwenrt.engine import grammar_bounds  # noqa: E402
from qwenrt.engine.constraint import Constraint  # noqa: E402
from qwenrt.engine.grammar import Compiled, Grammars  # noqa: E402
from qwenrt.errors import RequestError  # noqa: E402
from qwenrt.loading import load_tokenizer  # noqa: E402
from qwenrt.structure import Grammar  # noqa: E402
from qwenrt.text.tokenizer.tokenizer import Tokenizer  # noqa: E402
from tests.schemas import random_schema, written  # noqa: E402


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer("demo")


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer())


def compiled(schema: Any) -> Compiled:
    return grammars().compile(Grammar.json_schema(json.dumps(schema)))


def fits(grammar: Grammar, text: str) -> bool:
    """Whether the whole text is an answer."""
    matcher = grammars().compile(grammar).matcher()
    return bool(matcher.consume_tokens(tokenizer().encode(text)) and matcher.is_accepting())


def validate(text: str, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=checker)


# ---- what is written


def random_answers(first: int, last: int) -> tuple[int, int]:
    """Answers to as many random schemas, each validated -> how many came to an end, and schemas refused."""
    ended = refused = 0
    for seed in range(first, last):
        r = random.Random(seed)
        schema = random_schema(r)
        try:
            grammar = compiled(schema)
        except RequestError:
            refused += 1
            continue
        text, whole = written(grammar, tokenizer(), r)
        if whole:
            ended += 1
            validate(text, schema)
    return ended, refused


def test_finished_answers_to_random_schemas_validate() -> None:
    ended, refused = random_answers(0, 300)
    assert ended > 200 and refused < 60


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_finished_answers_to_ten_thousand_random_schemas_validate() -> None:
    ended, refused = random_answers(300, 13_300)
    assert ended >= 10_000 and refused < 2700


def test_answers_with_patterns_for_keys_validate() -> None:
    number, text, null = {"type": "integer"}, {"type": "string"}, {"type": "null"}
    schemas: list[Any] = [
        {"patternProperties": {"^a": number}, "properties": {"abc": {"minimum": 5}, "b": null}},
        {"patternProperties": {"^a": number}, "additionalProperties": False},
        {"patternProperties": {"^a": number, "^b": {"type": "boolean"}}, "additionalProperties": null},
        {"patternProperties": {"b$": text}, "properties": {"ab": {"maxLength": 2}}, "required": ["ab", "cb"]},
        {"patternProperties": {"^x": False}},
        {"patternProperties": {"e": number}, "properties": {"type": {}}, "required": ["type"]},
    ]
    r = random.Random(1)
    for schema in schemas:
        schema["type"] = "object"
        keys = set()
        for _ in range(30):
            text, whole = written(compiled(schema), tokenizer(), r)
            if whole:
                validate(text, schema)
                keys |= set(json.loads(text))
        assert keys


def test_white_space_is_bounded_and_other_scripts_are_not_escaped() -> None:
    anything = Grammar.json_object()
    for text in (
        '{"a":1}',
        '{ "a" : [1, 2] }',
        '{\n  "a": {\n    "b": null\n  }\n}',
        '{"名字": "小明 🦊"}',
        r'{"a":"\n\""}',
    ):
        assert fits(anything, text)
    for text in (
        '{  "a":1}',
        '{"a":\n\n1}',
        ' {"a":1}',
        '{"a":1} ',
        '{"a":1}\n',
        "{" + "\n" + " " * 17 + "}",
    ):
        assert not fits(anything, text)
    assert not fits(anything, r'{"a":"\u4f60"}')
    longest = max(
        _white_run(written(compiled({}), tokenizer(), random.Random(seed))[0]) for seed in range(50)
    )
    assert longest <= 17


def _white_run(text: str) -> int:
    """The longest run of white space outside of strings."""
    try:
        json.loads(text)
    except ValueError:
        return 0
    outside, inside, escaped = [""], False, False
    for character in text:
        if inside:
            inside, escaped = escaped or character != '"', not escaped and character == "\\"
        elif character == '"':
            inside = True
        outside.append(character if not inside and character.isspace() else "|")
    return max(map(len, "".join(outside).split("|")))


def test_settings_inside_a_schema_change_nothing() -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_pattern": "[ ]*", "lenient": True}}
    assert not fits(Grammar.json_schema(schema), "{    }")
    with pytest.raises(RequestError, match="not"):
        compiled({"x-guidance": {"lenient": True}, "not": {}})


def test_control_tokens_are_never_text() -> None:
    special = tokenizer().special_ids
    for grammar in (
        Grammar.json_object(),
        Grammar.regex("(?s:.*)"),
        Grammar.choice(["<|im_start|>", "<|endoftext|> no", '%json {"a": 1}']),
    ):
        constraint = Constraint(grammars().compile(grammar), grammar, [tokenizer().eod_id])
        allowed = constraint.allowed()
        assert allowed is not None
        ids = set(allowed.ids.tolist())
        if allowed.but:
            ids = set(range(tokenizer().vocab_size)) - ids
        assert ids and not ids & (special - {tokenizer().eod_id})
    assert fits(Grammar.choice(["<|im_start|>"]), "<|im_start|>")


def test_a_regular_expression_matches_from_end_to_end() -> None:
    grammar = Grammar.regex(r"[0-9]{3}-(foo|bar)+")
    assert fits(grammar, "123-foobar") and not fits(grammar, "x123-foo") and not fits(grammar, "123-foo ")
    assert fits(Grammar.choice(['say "yes"', "否"]), "否") and fits(
        Grammar.choice(['say "yes"']), 'say "yes"'
    )
    odd = ['%json {"a": 1}', "a*?{3}+ // #b", "%llguidance {}", "line\nend\\"]
    assert all(fits(Grammar.choice(odd), text) for text in odd)


# ---- what is refused

HOSTILE: list[tuple[str, Any, str]] = [
    ("recursive without end", {"$ref": "#"}, "no answer"),
    ("recursive without end below", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no answer"),
    ("deep", json.loads('{"items":' * 500 + "{}" + "}" * 500), "501 levels"),
    ("unsupported", {"properties": {"a": {"not": {"type": "string"}}}}, r"\$\.properties\.a\.not"),
    ("conditions", {"if": {"type": "string"}, "then": {"minLength": 3}}, r"\$\.if.*if"),
    ("remote", {"properties": {"b": {"$ref": "http://127.0.0.1:9/x"}}}, r"\$\.properties\.b\.\$ref"),
    ("a file", {"$ref": "file:///etc/passwd"}, r"\$\.\$ref"),
    ("missing", {"$ref": "#/$defs/none"}, "does not exist"),
    ("a wrong type", {"properties": {"a": {"type": "text"}}}, r"\$\.properties\.a\.type.*text"),
    ("nothing", {"enum": []}, "empty"),
    ("contradiction", {"type": "integer", "minimum": 5, "maximum": 3}, "greater"),
    ("required and forbidden", {"type": "object", "required": ["a"], "additionalProperties": False}, "unsatisfiable"),
    ("both of one", {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, r"\$\.oneOf"),
    ("a broken expression", {"properties": {"a": {"type": "string", "pattern": "("}}}, r"\$\.properties\.a\.pattern"),
    ("look-ahead", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ("many repetitions", {"type": "string", "pattern": r"\p{L}*" * 3000}, "3000 repetitions"),
    ("nested repetitions", {"type": "string", "pattern": "(" * 300 + "a" + ")*" * 300}, "nest"),
    ("a large multiple", {"type": "integer", "multipleOf": 1_000_003}, r"\$\.multipleOf"),
    ("multiples", {"allOf": [{"type": "integer", "multipleOf": n} for n in (991, 997, 1009)]}, "multipleOf"),
    ("many properties", {"properties": {f"k{i}": {} for i in range(2100)}}, r"\$\.properties.*2100 of them"),
    ("many optional", {"properties": {f"k{i}": {} for i in range(401)}}, r"\$\.properties.*401 of them are optional"),
    (
        "many optional in alternatives",
        {"anyOf": [{"properties": {f"{a}{i}": {} for i in range(150)}} for a in "abc"]}, r"\$\.anyOf.*450 of them",
    ),
    ("keys that may repeat", {"type": "object", "minProperties": 3}, r"\$\.minProperties.*twice"),
    ("unique items", {"type": "array", "uniqueItems": True}, r"\$\.uniqueItems"),
    ("false", False, "false"),
    ("a list", [], r"\[\]"),
    ("a text", "string", "string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "says"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
def test_what_cannot_be_kept_to_is_refused_with_its_place(schema: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        compiled(schema)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar.json_schema("{"), "no JSON"),
        (Grammar.json_schema('{"minimum": NaN}'), "NaN"),
        (Grammar.json_schema("[" * 30_000), "no JSON"),
        (Grammar.regex("("), "unclosed"),
        (Grammar.regex("a?" * 501), "501 repetitions"),
        (Grammar.lark("start: other"), "unknown name"),
        (Grammar.lark('start: start "a"'), "no answer"),
        (Grammar.lark('start: ""'), "no answer"),
        (Grammar.lark('%llguidance {"no_forcing": false}\nstart: "a"'), "settings"),
        (Grammar.lark('start: %json {"multiple\\u004ff": 1000003}'), "1000003"),
        (Grammar.lark("start: %json {"), "JSON"),
        (Grammar.lark("start: " + "(" * 3000 + '"a"' + ")" * 3000), "nested"),
    ],
)
def test_a_grammar_that_is_wrong_or_too_much_is_refused(grammar: Grammar, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        grammars().compile(grammar)


def test_a_large_grammar_that_is_in_bounds_is_served() -> None:
    words = [f"x{i}" for i in range(6000)]
    assert fits(Grammar.json_schema({"enum": words}), '"x5999"')
    assert fits(Grammar.json_schema({"anyOf": [{"const": w} for w in words[:1000]]}), '"x77"')
    # What could only be written as thousands of the same is not written ahead.
    doubled = "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(40)) + '\na40: "x"'
    for grammar in (Grammar.lark(doubled), Grammar.regex("a{1000000}")):
        constraint = Constraint(grammars().compile(grammar), grammar, [])
        assert constraint.allowed() is not None


def test_a_grammar_that_gets_too_much_on_the_way_fails_its_answer_alone() -> None:
    grammar = Grammar.regex("((a{0,100}){0,100}){0,100}b")
    constraint = Constraint(grammars().compile(grammar), grammar, [tokenizer().eod_id])
    token = tokenizer().encode("a")[0]
    with pytest.raises(RequestError, match="too much"):
        for _ in range(1000):
            assert constraint.allowed() is not None
            constraint.take(token)


# ---- how it is compiled


def test_the_tables_are_made_once_and_grammars_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = [], grammar_module._vocabulary

    def counted(*args: Any) -> Any:
        made.append(threading.current_thread())
        return plain(*args)

    monkeypatch.setattr(grammar_module, "_vocabulary", counted)
    monkeypatch.setattr(grammar_module, "KEPT", 3)
    fresh, found = Grammars(tokenizer()), []
    threads = [
        threading.Thread(target=lambda: found.append(fresh.compile(Grammar.json_object()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(found) == 4
    kept = fresh.compile(Grammar.json_object())
    for word in ("a", "b"):
        fresh.compile(Grammar.choice([word]))
    assert fresh.compile(Grammar.json_object()) is kept
    for word in ("c", "d", "e"):
        fresh.compile(Grammar.choice([word]))
    # the first by whoever of the four began before another had ended
    assert fresh.num_compiled in range(6, 10)
    assert len(fresh._kept) == 3 and fresh.compile(Grammar.json_object()) is not kept


def test_the_package_is_imported_when_a_grammar_is_asked_for() -> None:
    code = "import sys, qwenrt, qwenrt.engine.engine; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammar_module._llguidance.cache_clear()
    with pytest.raises(RequestError, match=r"qwenrt\[server\]"):
        Grammars(tokenizer()).compile(Grammar.json_object())
    with pytest.raises(RequestError, match="no tokenizer"):
        Grammars(None).compile(Grammar.json_object())


def test_as_many_optional_properties_as_are_taken_can_be_written() -> None:
    """A parser's row has room for them, whichever are written and left out."""
    names = [f"k{i}" for i in range(grammar_bounds.MAX_OPTIONAL)]
    for more in ({}, {"additionalProperties": False}):
        schema = Grammar.json_schema({"type": "object", "properties": {name: {} for name in names}, **more})
        for keys in (names, names[::9], names[-1:]):
            assert fits(schema, json.dumps(dict.fromkeys(keys, 1)))
    both = [
        {"type": "object", "properties": {f"{a}{i}": {} for i in range(200)}, "required": []} for a in "ab"
    ]
    assert fits(Grammar.json_schema({"anyOf": both}), json.dumps({"a0": 1, "a199": 2}))


def test_an_older_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, fine in (
        ("1.8.2", False),
        ("0.7.30", False),
        ("1.9.0", True),
        ("1.10.0rc1", True),
        ("2", True),
    ):
        grammar_module._llguidance.cache_clear()
        monkeypatch.setattr(grammar_module, "version", lambda name: found)  # noqa: B023
        if fine:
            assert Grammars(tokenizer()).compile(Grammar.json_object())
        else:
            with pytest.raises(RequestError, match=rf"llguidance {found} is too old.*1\.9 or later"):
                Grammars(tokenizer()).compile(Grammar.json_object())
    grammar_module._llguidance.cache_clear()


def test_what_grammars_share_is_built_once_and_may_be_built_before(monkeypatch: pytest.MonkeyPatch) -> None:
    build, built = grammar_module._vocabulary, []
    monkeypatch.setattr(grammar_module, "_vocabulary", lambda *args: built.append(build(*args)) or built[-1])
    made = Grammars(tokenizer())
    made.build()
    made.build()
    assert made.compile(Grammar.json_object()).vocabulary is built[0] and len(built) == 1
    Grammars(None).build()
